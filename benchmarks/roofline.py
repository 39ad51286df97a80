"""The least that each stage of a step can take on a device, and how near to it a measured run comes.

    python benchmarks/roofline.py [--gpu h100] [--model xxl] [--image-size 384] [--batch-size 128] [--group-size 8]
        [--recipe va-pi]
    python benchmarks/roofline.py run.json

A stage's floor is the longer of its FLOPs at the matrix product's rate and its bytes at a copy's; both count what the
mathematics needs (`vapi_fast.alignment.costs.step_costs`), not what a program happens to do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vapi_fast.alignment.costs import (
    caption_cost,
    config_costs,
    has_second_forward,
    model_flop_utilisation,
    stage_table,
)
from vapi_fast.models import LLAMAGEN_CONFIGS, catalog
from vapi_fast.models.families import generator_config
from vapi_fast.models.sizes import Captions
from vapi_fast.runtime.ceilings import Ceilings, measure


class Device(NamedTuple):
    """`copy` and `matmul` say where the figures come from. Measured: a copy of GiBs, a bf16 product of 8192³."""

    name: str
    ceilings: Ceilings
    copy: str
    matmul: str


SPECIFICATION, MEASURED = "specification", "measured"
DEVICES = {
    "a100-40": Device("A100 40 GB", Ceilings(1.555e12, 312e12), SPECIFICATION, SPECIFICATION),
    "a100-80": Device("A100 80 GB", Ceilings(2.039e12, 312e12), SPECIFICATION, SPECIFICATION),
    "h100": Device("H100 80 GB", Ceilings(3.0e12, 798e12), MEASURED, MEASURED),
    "h200": Device("H200 141 GB", Ceilings(4.3e12, 788e12), MEASURED, MEASURED),
}
MEASURE = "measure"

# Seconds a step that DESIGN.md allows for LlamaGen-XXL at 384², 128 images × 8 rollouts, on an H100.
BUDGET = {"encode": 0.10, "forward": 0.42, "decode": 1.3, "lpips": 0.25, "loss": 0.04, "backward": 0.85}
BUDGET |= {"optimizer": 0.03, "total": 2.95}
SECOND_FORWARD = {"forward": 0.42, "loss": 0.03}  # beside that, where rollouts have a forward of their own
BUDGETED = {"model": "xxl", "image_size": 384, "batch_size": 128, "group_size": 8, "method": "vapi", "prior": "ce"}

# Name, format and width of each column behind the stage's.
COLUMNS = [("TFLOP", ".2f", 9), ("GB", ".2f", 9), ("bound", "", 8), ("floor s", ".4f", 10), ("budget s", ".2f", 10)]
COLUMNS += [("measured s", ".4f", 12), ("TFLOP/s", ".1f", 9), ("of matmul", ".1%", 11), ("of floor", ".1%", 10)]


def table(
    config: Mapping[str, Any], device: Device, seconds: Mapping[str, float] | None = None, processes: int = 1
) -> str:
    """One line a stage: needed work, floor, DESIGN.md's budget where it applies, and measured seconds of a step."""
    costs = config_costs(config, processes=processes)
    ceilings = device.ceilings
    budgeted = device == DEVICES["h100"] and processes == 1 and BUDGETED.items() <= config.items()
    budget = step_budget(config) if budgeted else {}
    measured = stage_table(config, seconds or {}, ceilings, processes=processes)
    shown = COLUMNS[: len(COLUMNS) if seconds else 5 if budget else 4]
    lines = [heading(config, device, processes), "stage     " + "".join(f"{name:>{width}}" for name, _, width in shown)]
    for stage in [*costs, *(each for each in measured if each not in costs)]:
        cost, taken = costs.get(stage), measured.get(stage, {})
        work = [cost.flops / 1e12, cost.bytes / 1e9, cost.bound(ceilings), cost.floor(ceilings)] if cost else [None] * 4
        tflops = taken.get("tflops")
        share = None if tflops is None else tflops * 1e12 / ceilings.matmul
        lines.append(row(stage, *work, budget.get(stage), taken.get("seconds"), tflops, share, taken.get("share")))
    flops, moved = (sum(getattr(cost, name) for cost in costs.values()) for name in ("flops", "bytes"))
    floor = sum(cost.floor(ceilings) for cost in costs.values())
    total = [flops / 1e12, moved / 1e9, None, floor, budget.get("total")]
    if seconds:
        step = sum(seconds.values())
        total += [step, flops / step / 1e12, None, floor / step]
    lines.append(row("total", *total))
    if seconds:
        share = model_flop_utilisation(costs, step, ceilings)
        lines.append(f"model FLOP utilisation (transformer alone, over the whole step): {share:.1%}")
    if budget:
        lines.append("budget: DESIGN.md's, that of loss with sample")
    captions = generator_config(config["model"]).condition
    if isinstance(captions, Captions) and config.get("steps"):
        each = caption_cost(captions) * (1 / processes)
        encoding = each * (config["batch_size"] * config["steps"])
        lines.append(
            f"captions, encoded once before the steps, if all are {captions.tokens} tokens long: "
            f"{encoding.flops / 1e12:.0f} TFLOP, {encoding.floor(ceilings):.1f} s"
        )
    return "\n".join(lines)


def step_budget(config: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by stage, and in total."""
    added = SECOND_FORWARD if has_second_forward(config) else {}
    added = added | {"total": sum(added.values())}
    return {stage: seconds + added.get(stage, 0) for stage, seconds in BUDGET.items()}


def heading(config: Mapping[str, Any], device: Device, processes: int) -> str:
    share = f", of which a process has 1/{processes}" if processes > 1 else ""
    return (
        f"LlamaGen-{config['model']}, {config['method']}, {config['image_size']}², {config['batch_size']} images × "
        f"{config['group_size']} rollouts a step{share}, micro-batches of {config['micro_batch']}\n"
        f"{device.name}: copy {device.ceilings.copy / 1e12:.4g} TB/s ({device.copy}), "
        f"matrix product {device.ceilings.matmul / 1e12:.3g} TFLOP/s ({device.matmul})"
    )


def row(stage: str, *values: float | str | None) -> str:
    cells = ("" if value is None else format(value, form) for value, (_, form, _) in zip(values, COLUMNS, strict=False))
    widths = (width for _, _, width in COLUMNS)
    return f"{stage:<10}{''.join(f'{cell:>{width}}' for cell, width in zip(cells, widths, strict=False))}".rstrip()


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
    return Device(name, measure(device), MEASURED, MEASURED)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="run.json of an alignment, to hold against the floor")
    parser.add_argument("--gpu", choices=[*DEVICES, MEASURE], help="default h100; for a run its own device")
    parser.add_argument("--model", choices=LLAMAGEN_CONFIGS, default="xxl")
    recipes = [name for name, values in catalog.RECIPES.items() if values["rollouts"] != "free"]
    parser.add_argument("--recipe", choices=recipes, default=catalog.PAPER.recipe, help="a run has its own")
    for name in ("--image-size", "--batch-size", "--group-size", "--micro-batch"):
        parser.add_argument(name, type=int, help="default: the paper's; for a run its own")
    options = parser.parse_args(arguments)

    config = catalog.entry(options.model).preset("align", options.recipe)
    config |= {"model": options.model}
    seconds, processes, record = None, 1, None
    if options.run:
        record = json.loads(options.run.read_text())
        config, processes = record["config"], record.get("processes", 1)
        seconds = {stage: figures["seconds"] for stage, figures in record["stages"].items()}
    sizes = ("image_size", "batch_size", "group_size", "micro_batch")
    config |= {name: getattr(options, name) for name in sizes if getattr(options, name) is not None}
    if options.gpu == MEASURE:
        device = measured_device()
    else:
        device = DEVICES[options.gpu or "h100"] if options.gpu or record is None else device_of(record)
    print(table(config, device, seconds, processes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
