"""The least that each stage of a step can take on a device, what it is expected to take, and what a run has taken.

    python benchmarks/roofline.py [--gpu h100] [--model xxl] [--image-size 384] [--batch-size 128] [--group-size 8]
        [--recipe va-pi] [--reward-dtype fp8]
    python benchmarks/roofline.py run.json
    python benchmarks/roofline.py --predict [--rates gpu_check.json]

A stage's floor is the sum of its kernels' floors, as one waits for what another wrote: each takes its FLOPs at the
matrix product's rate or its bytes at a copy's, whichever is longer (`vapi_fast.alignment.costs.step_costs`).
`--predict` takes rates that kernels reach, on one GPU and on many (`prediction.py`). Forms of the same work are the
run's, or those that were found faster on the GPU's architecture and those that `VAPI_FAST_FORMS` names.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import prediction
import torch
from prediction import GPUS, HOST, INFINIBAND, LATENCY, MACHINE, NVLINK, Rates, RatesError

from vapi_fast.alignment.config import REWARD_DTYPES
from vapi_fast.alignment.costs import (
    caption_cost,
    config_costs,
    model_flop_utilisation,
    stage_table,
    usual_size,
)
from vapi_fast.alignment.kernel_costs import Cost
from vapi_fast.models import LLAMAGEN_CONFIGS, VQ_CONFIGS, catalog
from vapi_fast.models.families import generator_config
from vapi_fast.models.sizes import Captions, Prompts
from vapi_fast.runtime import forms
from vapi_fast.runtime.ceilings import Ceilings, measure


class Device(NamedTuple):
    """`copy` and `matmul` say where the figures come from. Measured: a copy of GiBs, a bf16 product of 8192³."""

    name: str
    ceilings: Ceilings
    copy: str
    matmul: str
    memory: float = 0.0  # bytes
    architecture: str = ""


SPECIFICATION, MEASURED = "specification", "measured"
DEVICES = {
    "a100-40": Device("A100 40 GB", Ceilings(1.555e12, 312e12), SPECIFICATION, SPECIFICATION, 40e9, "sm_80"),
    "a100-80": Device("A100 80 GB", Ceilings(2.039e12, 312e12), SPECIFICATION, SPECIFICATION, 80e9, "sm_80"),
    "h100": Device("H100 80 GB", Ceilings(3.0e12, 798e12), MEASURED, MEASURED, 80e9, "sm_90"),
    "h200": Device("H200 141 GB", Ceilings(4.3e12, 788e12), MEASURED, MEASURED, 141e9, "sm_90"),
}
MEASURE = "measure"

MANY = (1, 8, 32, 64, 128)  # GPUs
SAMPLED = 256  # sequences at once
PROMPTED = 16  # images of a prompt, in Janus's `generation_inference.py`

# Name, format and width of each column behind the stage's.
COLUMNS = [("TFLOP", ".2f", 9), ("GB", ".2f", 9), ("bound", "", 8), ("floor s", ".4f", 10)]
COLUMNS += [("measured s", ".4f", 12), ("TFLOP/s", ".1f", 9), ("of matmul", ".1%", 11), ("of floor", ".1%", 10)]


def table(
    config: Mapping[str, Any], device: Device, seconds: Mapping[str, float] | None = None, processes: int = 1
) -> str:
    """One line a stage: work, floor, and measured seconds of a step."""
    costs = config_costs(config, processes=processes)
    ceilings = device.ceilings
    measured = stage_table(config, seconds or {}, ceilings, processes=processes)
    shown = COLUMNS[: len(COLUMNS) if seconds else 4]
    lines = [heading(config, device, processes), "stage     " + "".join(f"{name:>{width}}" for name, _, width in shown)]
    for stage in [*costs, *(each for each in measured if each not in costs)]:
        cost, taken = costs.get(stage), measured.get(stage, {})
        work = [cost.flops / 1e12, cost.bytes / 1e9, cost.bound(ceilings), cost.floor(ceilings)] if cost else [None] * 4
        tflops = taken.get("tflops")
        share = None if tflops is None else tflops * 1e12 / ceilings.matmul
        lines.append(row(stage, *work, taken.get("seconds"), tflops, share, taken.get("share")))
    flops, moved = (sum(getattr(cost, name) for cost in costs.values()) for name in ("flops", "bytes"))
    floor = sum(cost.floor(ceilings) for cost in costs.values())
    total = [flops / 1e12, moved / 1e9, None, floor]
    if seconds:
        step = sum(seconds.values())
        total += [step, flops / step / 1e12, None, floor / step]
    lines.append(row("total", *total))
    if seconds:
        share = model_flop_utilisation(costs, step, ceilings)
        lines.append(f"model FLOP utilisation (transformer alone, over the whole step): {share:.1%}")
    captions = generator_config(config["model"]).condition
    if isinstance(captions, Captions) and config.get("steps"):
        encoding = caption_cost(captions).times(config["batch_size"] * config["steps"] / processes)
        lines.append(
            f"captions, encoded once before the steps, if all are {captions.tokens} tokens long: "
            f"{encoding.flops / 1e12:.0f} TFLOP, {encoding.floor(ceilings):.1f} s"
        )
    return "\n".join(lines)


def heading(config: Mapping[str, Any], device: Device, processes: int) -> str:
    share = f", of which a process has 1/{processes}" if processes > 1 else ""
    name = "LlamaGen-" * (config["model"] in LLAMAGEN_CONFIGS) + config["model"]
    taken = {kind: form for kind, form in forms.taken("").items() if form != forms.FORMS[kind.split()[0]][0]}
    return (
        f"{name}, {config['method']}, {config['image_size']}², {config['batch_size']} images × "
        f"{config['group_size']} rollouts a step{share}, micro-batches of {config['micro_batch']}\n"
        f"{device.name}: copy {device.ceilings.copy / 1e12:.4g} TB/s ({device.copy}), "
        f"matrix product {device.ceilings.matmul / 1e12:.3g} TFLOP/s ({device.matmul})"
        + "".join(["\nforms:", *(f" {kind}={name}" for kind, name in taken.items())] * bool(taken))
    )


def row(stage: str, *values: float | str | None) -> str:
    cells = ("" if value is None else format(value, form) for value, (_, form, _) in zip(values, COLUMNS, strict=False))
    widths = (width for _, _, width in COLUMNS)
    return f"{stage:<10}{''.join(f'{cell:>{width}}' for cell, width in zip(cells, widths, strict=False))}".rstrip()


def predicted(
    config: Mapping[str, Any],
    devices: Sequence[Rates],
    seconds: Mapping[str, float] | None = None,
    processes: int = 1,
) -> str:
    """One line a stage: its floor on the first device, seconds expected on each, and by kernel on the first."""
    costs = config_costs(config, processes=processes)
    stages = {stage: [rates.by_kind(cost) for rates in devices] for stage, cost in costs.items()}
    names = ["floor s", *(rates.name for rates in devices), *["measured s"] * bool(seconds)]
    lines = [f"stage     {''.join(f'{name:>14}' for name in names)}  of which, on the first"]
    sums = [0.0] * len(names)
    for stage, kinds in stages.items():
        figures = [costs[stage].floor(devices[0].ceilings), *(sum(each.values()) for each in kinds)]
        figures += [seconds.get(stage, 0.0)] if seconds else []
        sums = [a + b for a, b in zip(sums, figures, strict=True)]
        lines.append(f"{stage:<10}{''.join(f'{each:>14.3f}' for each in figures)}  {shares(kinds[0])}")
    everything = devices[0].by_kind(Cost(tuple(each for cost in costs.values() for each in cost.kernels)))
    lines.append(f"{'total':<10}{''.join(f'{each:>14.3f}' for each in sums)}  {shares(everything)}")
    return "\n".join(lines)


def shares(kinds: Mapping[str, float], most: int = 4) -> str:
    """The largest of these seconds."""
    largest = sorted(kinds.items(), key=lambda each: -each[1])[:most]
    return ", ".join(f"{kind} {taken:.3f}" for kind, taken in largest if taken >= 5e-4)


def sampling(config: Mapping[str, Any], rates: Rates) -> str:
    """What a token of SAMPLED sequences takes, and so an image, with either cache."""
    tokenizer = VQ_CONFIGS[config["tokenizer"].lower()]
    generator = usual_size(generator_config(config["model"]), tokenizer, config["image_size"])
    lines = []
    for cache in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        token = prediction.token_seconds(generator, SAMPLED, rates, cache)
        step = sum(token.values())
        lines.append(
            f"sampling, {SAMPLED} at once without guidance, {rates.name}, cache in {str(cache)[6:]}: "
            f"{1e3 * step:.1f} ms a token ({', '.join(f'{kind} {1e3 * taken:.1f}' for kind, taken in token.items())}), "
            f"{SAMPLED / generator.grid_size**2 / step:.0f} images/s"
        )
    if isinstance(generator.condition, Prompts):  # both halves of the guidance are sequences
        public = prediction.public_token(generator, PROMPTED, rates)
        token = sum(prediction.token_seconds(generator, SAMPLED, rates, torch.bfloat16).values())
        engine, loop = (
            images / generator.grid_size**2 / seconds
            for images, seconds in ((SAMPLED / 2, token), (PROMPTED, public.seconds))
        )
        lines.append(
            f"guided, {SAMPLED // 2} images at once: {engine:.1f} images/s; the public loop, {PROMPTED} of a prompt at "
            f"once, {public.launches} launches a token: {loop:.2f} images/s, the engine {engine / loop:.0f} × as many"
        )
    return "\n".join(lines)


def shared(config: Mapping[str, Any], rates: Rates, memory: float) -> str:
    """One line a number of GPUs: what a step takes there, sharded and with whole weights, and what does not shrink."""
    lines = [
        f"many GPUs, {rates.name}: {MACHINE} a machine, NVLink {NVLINK / 1e9:.0f} GB/s, InfiniBand "
        f"{INFINIBAND / 1e9:.0f} GB/s a GPU, {1e6 * LATENCY:.0f} µs a collective, across machines twice",
        "GPUs  images each  kernels s  exposed s   step s  of linear  images/s   host s  with it   GB"
        "  | whole weights: step s   GB  | does not shrink",
    ]
    counts = [gpus for gpus in MANY if config["batch_size"] % gpus == 0]
    steps = {gpus: prediction.share_of_step(config, gpus, rates, memory) for gpus in counts}
    for gpus, step in steps.items():
        whole = prediction.share_of_step(config, gpus, rates, memory, sharded=False)
        lines.append(
            f"{gpus:>4}{config['batch_size'] // gpus:>13}{step.step - step.exposed:>11.3f}{step.exposed:>11.4f}"
            f"{step.step:>9.3f}{steps[1].step / gpus / step.step:>11.0%}{config['batch_size'] / step.step:>10.0f}"
            f"{step.host:>9.3f}{step.with_host:>9.3f}{gigabytes(step.memory)}  |{whole.step:>22.3f}"
            f"{gigabytes(whole.memory)}  | {shares(step.lost(steps[1], gpus), 3) if gpus > 1 else ''}".rstrip()
        )
    bound = next((gpus for gpus, step in steps.items() if step.host > step.launched), None)
    lines.append(
        f"host: launching what is in no graph, {1e6 * HOST:.0f} µs each"
        + (f"; from {bound} GPU{'s' * (bound > 1)} on that takes longer than those kernels" if bound else "")
        + f"; past {config['batch_size']} GPUs there is no image left for one"
    )
    return "\n".join(lines)


def gigabytes(size: int | None) -> str:
    return f"{'no' if size is None else format(size / 1e9, '.0f'):>5}"


def rates_of(key: str | None, device: Device) -> Rates:
    """Estimates for a device, by its key in DEVICES or its name; of others an H100's, with their ceilings."""
    known = key if key in GPUS else next((gpu for gpu in GPUS if gpu.upper() in device.name.upper()), None)
    return prediction.builtin(known or GPUS[0], device.ceilings, device.name)


def device_of(record: Mapping[str, Any]) -> Device:
    """The ceilings that the run measured, else the built-in ones of its device; SystemExit where there are neither."""
    if record.get("ceilings"):
        return Device(record["device"], Ceilings(**record["ceilings"]), "measured in the run", "measured in the run")
    name = record["device"].upper()
    for key, device in DEVICES.items():
        chip, _, memory = key.upper().partition("-")
        if chip in name and memory in name:
            return device
    raise SystemExit(f"roofline: no ceilings are known for {record['device']}: pass --gpu")


def measured_device() -> Device:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Device(name, measure(device), MEASURED, MEASURED, architecture=forms.architecture(device))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="run.json of an alignment, to hold against the floor")
    parser.add_argument("--gpu", choices=[*DEVICES, MEASURE], help="default h100; for a run its own device")
    parser.add_argument("--model", choices=tuple(catalog.CATALOG), default="xxl")
    recipes = [name for name, values in catalog.RECIPES.items() if values["rollouts"] != "free"]
    parser.add_argument("--recipe", choices=recipes, default=catalog.PAPER.recipe, help="a run has its own")
    for name in ("--image-size", "--batch-size", "--group-size", "--micro-batch"):
        parser.add_argument(name, type=int, help="default: the paper's; for a run its own")
    parser.add_argument("--reward-dtype", choices=REWARD_DTYPES, help="as align's; for a run its own")
    parser.add_argument(
        "--predict", action="store_true", help="what kernels, stages and many GPUs are expected to take"
    )
    parser.add_argument(
        "--rates", type=Path, help="with --predict: a gpu_check.json, or what benchmarks/rates.py printed"
    )
    options = parser.parse_args(arguments)
    if options.rates and not options.predict:
        parser.error("--rates goes with --predict")

    config = catalog.entry(options.model).preset("align", options.recipe)
    config |= {"model": options.model}
    seconds, processes, record = None, 1, None
    if options.run:
        record = json.loads(options.run.read_text())
        config, processes = record["config"], record.get("processes", 1)
        seconds = {stage: figures["seconds"] for stage, figures in record["stages"].items()}
    given = ("image_size", "batch_size", "group_size", "micro_batch", "reward_dtype")
    config |= {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    if options.gpu == MEASURE:
        device = measured_device()
    else:
        device = DEVICES[options.gpu or "h100"] if options.gpu or record is None else device_of(record)
    usual = {kind: names[0] for kind, names in forms.FORMS.items()}
    taken = forms.taken(device.architecture) if record is None else usual | record.get("forms", {})
    with forms.taking(**taken):
        if not options.predict:
            print(table(config, device, seconds, processes))
            return 0

        rates = [rates_of(options.gpu, device)]
        if options.rates:
            try:
                rates = [prediction.corrected(rates[0], prediction.read_rates(options.rates))]
            except RatesError as error:
                parser.error(str(error))
        elif not any(gpu.upper() in device.name.upper() for gpu in GPUS):
            parser.error(f"no kernel's rates are known for {device.name}: pass --rates, or --gpu {' or '.join(GPUS)}")
        elif not options.gpu and record is None:
            rates = [rates_of(gpu, DEVICES[gpu]) for gpu in GPUS]
        print(heading(config, device, processes))
        print(predicted(config, rates, seconds, processes))
        print(sampling(config, rates[0]))
        if record is None:
            print(shared(config, rates[0], device.memory))
        print(textwrap.fill(f"rates, bytes or FLOPs a second: {rates[0]}", 120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
