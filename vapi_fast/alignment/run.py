"""One alignment run from start to finish: load, measure, align, measure again, write everything down."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vapi_fast import tiny
from vapi_fast.alignment import memory, report
from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.control import SAID, sheet_label
from vapi_fast.alignment.data_sets import fetch_inputs, open_data
from vapi_fast.alignment.figures import METRICS
from vapi_fast.alignment.image_text import class_texts, load_networks
from vapi_fast.alignment.loop import GradientSource, Loop
from vapi_fast.alignment.measurement import Evaluator
from vapi_fast.alignment.models import load_models
from vapi_fast.alignment.outcome import Outcome
from vapi_fast.alignment.snapshots import Snapshots
from vapi_fast.alignment.step import make_trainer
from vapi_fast.alignment.understanding import text_check
from vapi_fast.data.dataset import ahead, described, difference, reader
from vapi_fast.data.synthetic import SyntheticData
from vapi_fast.models.families import generator_config
from vapi_fast.models.frozen import check_eight_bits
from vapi_fast.models.lora import merged
from vapi_fast.models.sizes import Classes, Prompts
from vapi_fast.runtime import packages
from vapi_fast.runtime.accelerators import attention_backend, nvml
from vapi_fast.runtime.ceilings import measure
from vapi_fast.runtime.checkpoint import identity
from vapi_fast.runtime.clock import StageClock
from vapi_fast.runtime.distributed import (
    gather_objects,
    process_group,
    rank,
    shard,
    whole_copy,
    whole_state,
    world_size,
)
from vapi_fast.runtime.energy import EnergyMeter
from vapi_fast.runtime.errors import CheckpointError, ConfigError, NonFiniteError
from vapi_fast.runtime.hub import on_hub
from vapi_fast.runtime.options import flag
from vapi_fast.runtime.ownership import not_written, owned

PICTURES_BYTES = 10_000_000  # and what else lies beside the weights
# Fields that may differ when a run is resumed: all but lr do not touch what the steps compute, and a smaller lr is what
# a run that met infinities needs.
RESUMABLE = {
    "lr",
    "output_dir",
    "resume",
    "evaluate",
    "eval_every",
    "checkpoint_every",
    "steps",
    "micro_batch",
    "eval_batch",
    "inception_weights",
    "caption_cache",
}


def align(
    config: AlignConfig,
    *,
    source: GradientSource | None = None,
    started: float | None = None,
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Align a generator with VA-π (or a baseline) and write the results into `config.output_dir`.

    Args:
        source: what computes the steps' gradients, if not our own; `benchmarks/comparison.py` has the published
            recipe's.
        started: `time.perf_counter()` when the run's start-up began, if that was before this call.
        base: the measurement of the generator as it is, as a `run.json` has it, where another run with the same
            weights, seed, rollouts and images has made it already.

    Returns:
        The record that `run.json` holds.

    Raises:
        ConfigError, CheckpointError, DataError: the input cannot be used; nothing was written.
        NonFiniteError: a reward, loss or gradient is not finite; the snapshots hold the last good weights.
        StoppedError: SIGTERM came; the snapshots hold the state to go on from.
    """
    started = time.perf_counter() if started is None else started
    source = source or GradientSource()
    source.check(config)
    # A reward's module may have switched gradients off when it was imported.
    with torch.enable_grad(), process_group() as device:
        # The default folder has the time in its name: that of rank 0.
        config = dataclasses.replace(config, output_dir=gather_objects(config.output_dir)[0])
        with owned(config.output_dir, "--output-dir"):
            config.check_folder()  # once more: what was there before may have ended meanwhile
            run = Run(config, device, source, started)
            if rank() == 0:
                print(run.introduction())
            try:
                run.steps(run.begin(base))
                run.end()
                return run.write_results(started)
            finally:
                run.snapshots.finish()


def memory_plan(
    config: AlignConfig, device: torch.device, source: GradientSource, prefix: int | None = None
) -> memory.MemoryPlan | None:
    """How to use the GPUs' free memory, alike on all ranks; None on a CPU. Raises ConfigError if it will not fit.

    prefix: positions of the longest condition, where it is known.
    """
    if device.type != "cuda":
        return None
    free = min(gather_objects(torch.cuda.mem_get_info(device)[0]))
    beside = source.memory(config, world_size())
    generator = generator_config(config.model)
    return memory.check(config, generator.fitted(prefix) if prefix else generator, free, world_size(), beside)


def kernels_compiled(config: AlignConfig, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """On a GPU other processes compile what the steps will launch, during the `with` block and at most once a machine.

    The first of a machine's ranks sees to it. The presets have other shapes than those that are known.
    """
    if device.type != "cuda" or config.lpips in tiny.NETWORKS or os.environ.get("LOCAL_RANK", "0") != "0":
        return contextlib.nullcontext()
    from vapi_fast.kernels import compile, library
    from vapi_fast.kernels.launch import device_architecture

    try:
        library.served()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return compile.in_background(device_architecture(device.index))


def comparable(config: AlignConfig) -> dict[str, str]:
    """A configuration's values as text that tells two of them apart: a path as it is from anywhere, and of a data set
    on the hub how many rows the steps have it read."""
    rows = {"hub_rows": config.rows(held_out=False)} if on_hub(config.data or "") else {}
    return {key: str(anywhere(value)) for key, value in (dataclasses.asdict(config) | rows).items()}


def anywhere(value: Any) -> Any:
    """A path as it is from any folder; a name of the hub, or anything else, as it is."""
    return value.resolve() if isinstance(value, Path) and not on_hub(value) else value


@torch.no_grad()
def all_finite(generator: nn.Module) -> bool:
    """Whether all weights are, on every rank."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in generator.parameters())
    return all(gather_objects(bool(torch.stack([p.isfinite().all() for p in local]).all())))


def is_record(extra: dict[str, Any], step: int) -> bool:
    """Whether a state's `extra` is what `Run.save_state` gave it."""
    try:
        classes = extra["data"]["classes"].items()
        return (
            all(isinstance(value, str) for value in extra["config"].values())
            and all(len(curve) == step for curve in extra["curves"].values())
            and all(isinstance(value, int | float) for curve in extra["curves"].values() for value in curve)
            and all(label.isdecimal() and {"name", "images"} <= each.keys() for label, each in classes)
            and all(isinstance(extra.get(name, {}), dict) for name in ("measured", "evaluations", "files"))
            and "split" in extra["data"]
        )
    except (KeyError, TypeError, AttributeError):
        return False


class Run:
    """The parts of a run: models, optimizer, data, evaluator, states, and what it has found so far."""

    def __init__(self, config: AlignConfig, device: torch.device, source: GradientSource, started: float) -> None:
        if config.train != "all" and world_size() > 1:
            raise ConfigError(f"--train {config.train} needs one process: several share all weights, pass --train all")
        if config.batch_size % world_size():
            raise ConfigError(f"--batch-size {config.batch_size} does not divide over {world_size()} processes")
        if config.reward_dtype == "fp8":
            check_eight_bits(device)
        if not config.synthetic_data:
            reader()  # what it lacks is told before minutes go into measuring and loading
        torch.set_float32_matmul_precision("high")  # TF32 where bf16 is not used, as in the published recipe
        self.config = config
        self.device = device
        self.source = source
        ceilings = measure(device)
        if device.type == "cuda":  # the measurement's own memory
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        condition, prefix = generator_config(config.model).condition, None
        captions, prompts = not isinstance(condition, Classes), isinstance(condition, Prompts)
        if prompts and not config.synthetic_data:
            memory_plan(config, device, source, prefix=1)  # what no prompt makes fit needs no download
            fetch_inputs(config)
            self.data = open_data(config, condition, device)  # its longest prompt decides how much fits
            prefix = self.data.features.tokens
        plan = memory_plan(config, device, source, prefix)
        fetch_inputs(config)
        self.outcome = Outcome(config, device, StageClock(device), ceilings, EnergyMeter(device, nvml()), plan)
        if captions and not prompts and not config.synthetic_data:
            self.data = open_data(config, condition, device)  # their encoder needs the room of what is loaded next
        with kernels_compiled(config, device):
            self.models = load_models(config, device, plan.reward_chunk if plan else None, prefix)
            loaded = time.perf_counter()
        compiling = time.perf_counter() - loaded
        generator = self.models.generator
        condition = generator.config.condition
        if config.synthetic_data:
            kind: dict[str, Any] = {"num_classes": condition.count} if isinstance(condition, Classes) else {}
            if captions:
                kind = {"prompt" if prompts else "caption": condition}
            self.data = SyntheticData(config.image_size, **kind)
        elif not captions:
            self.data = open_data(config, condition, device)
        self.outcome.data = self.data.summary()
        if captions:
            self.models = dataclasses.replace(self.models, caption_of=self.data.caption)
        if config.networks:
            if captions:
                text_of = self.data.caption
            else:
                classes = range(condition.count) if config.synthetic_data else map(int, self.outcome.data["classes"])
                text_of = class_texts(config.class_names, self.data.class_names, list(classes))
            networks = load_networks(config.networks, config.reward_networks, text_of, device)
            self.models = dataclasses.replace(self.models, networks=networks)
        used = {} if config.random_init else {"gpt_ckpt": config.gpt_ckpt, "vq_ckpt": config.vq_ckpt}
        self.files = {name: identity(path) for name, path in used.items()}
        self.evaluator = Evaluator(config, self.models, device, self.data.features) if config.evaluate else None
        self.text = None
        if config.evaluate and prompts:  # needs a checkpoint and data
            self.text = text_check(generator, config.gpt_ckpt, self.data.features.text_ids)
        shard(generator, reshard_after_forward=plan is None or plan.reshard_after_forward)
        self.trainer = make_trainer(self.models, config, self.outcome.clock)
        self.snapshots = Snapshots(config.snapshots)
        source.prepare(self.models, config, device)
        startup = time.perf_counter() - started
        self.outcome.seconds = {"startup": startup, "kernels": compiling, "alignment": 0.0, "evaluation": 0.0}
        self.outcome.clock.add("startup", startup)

    def introduction(self) -> str:
        """What runs where, and without what, in a line each."""
        config, where, seconds = self.config, report.device_name(self.device), self.outcome.seconds
        processes = f"{world_size()} × " if world_size() > 1 else ""
        optimizer = type(self.trainer.optimizer)
        text = f"aligning {config.model} on {processes}{where}: attention by {attention_backend(self.device)}, "
        text += f"{optimizer.__module__.partition('.')[0]}'s {optimizer.__name__}"
        text += f"; results in {config.output_dir}"
        text += f"\nstart-up {seconds['startup']:.1f} s, {seconds['kernels']:.1f} of it waiting for kernels"
        plan = f"memory per GPU, as planned: {self.outcome.plan}" if self.outcome.plan else ""
        images = ""
        if not config.synthetic_data:
            condition = self.models.generator.config.condition
            images = described(self.outcome.data, condition.count if isinstance(condition, Classes) else 0)
        control = SAID[config.control] if config.control else ""
        return "\n".join(filter(None, (text, control, images, plan, packages.left_out())))

    def begin(self, base: dict[str, Any] | None) -> int:
        """Measure the generator, if that is not done, or go on from the newest state; returns the steps behind it."""
        if self.evaluator:
            self.outcome.sheet_columns, self.outcome.sheet_captions = self.evaluator.columns, self.evaluator.captions
            self.outcome.sheets["originals.png"] = self.evaluator.originals()
            self.add_samples("base")
        if self.config.resume:
            return self.load_state()
        if self.evaluator:
            self.outcome.measured["base"] = base or self.measured("base")
            self.save_state(0)  # the measurement can take longer than the alignment
        return 0

    def steps(self, start_step: int) -> None:
        """The optimizer steps."""
        config, shares = self.config, {"rank": rank(), "world_size": world_size()}
        batches = self.data.batches(config.batch_size, config.steps, seed=config.seed, start_step=start_step, **shares)
        with contextlib.closing(ahead(iter(batches), self.device)) as moved:
            loop = Loop(self.trainer, self.source, self.outcome, start_step, self.save_state, self.measure_step)
            loop.run(moved)

    def end(self) -> None:
        self.save_state(self.config.steps)  # what follows can fail, and take longer than the alignment
        if self.evaluator:
            self.outcome.measured["aligned"] = self.measured("aligned")
            if self.text:
                moved = self.text.divergence(whole_copy(self.models.generator))
                self.outcome.text = {"kl": moved, "tokens": self.text.tokens}
                if rank() == 0:
                    print(f"text: {moved:.2g} nats a token from what it was, over {self.text.tokens} tokens")
            if self.config.eval_every and rank() == 0 and (writer := report.curve_writer()):
                with writer(str(self.config.output_dir / "tensorboard")) as curves:
                    report.write_scores(curves, self.outcome.measured["aligned"], self.config.steps)
            self.add_samples(sheet_label(self.config))

    def measure_step(self, step: int) -> None:
        self.outcome.evaluations[str(step)] = self.measured(f"step {step}")

    def measured(self, name: str) -> dict[str, Any]:
        """What `run.json` says of the generator as it is now."""
        started = time.perf_counter()
        self.models.recordings.release()  # their memory is what a measurement needs
        measurement = self.evaluator.measure(whole_copy(self.models.generator), name)
        self.outcome.seconds["evaluation"] += time.perf_counter() - started
        return measurement.as_record()

    def add_samples(self, label: str) -> None:
        """A sheet of `samples.png`: of the generator as it is now, at seeds and of classes that are the same always."""
        samples = self.evaluator.sample(whole_copy(self.models.generator), self.evaluator.shown)
        self.outcome.sheets.setdefault("samples.png", []).append((label, samples.cpu()))

    def save_state(self, step: int) -> None:
        """Everything that `--resume` needs after `step` steps; all ranks call it.

        Raises NonFiniteError, and saves nothing, where the last update has left weights that are not finite.
        """
        if not all_finite(self.models.generator):
            raise NonFiniteError(
                f"the weights after step {step} are not finite though the step's gradient is: lower --lr; earlier "
                f"states stay in {self.config.snapshots}"
            )
        extra = {
            "config": comparable(self.config),
            "curves": self.outcome.curves,
            "measured": self.outcome.measured,
            "evaluations": self.outcome.evaluations,
            "data": self.outcome.data,
            "files": self.files,
        }
        self.snapshots.save(step, self.models.generator, self.trainer.optimizer, extra)

    def load_state(self) -> int:
        """Go on from the newest snapshot; returns the steps behind it. Raises ConfigError if the run was another."""
        step, extra = self.snapshots.restore(self.models.generator, self.trainer.optimizer)
        if not is_record(extra, step):
            raise CheckpointError(
                f"{self.config.snapshots}: the newest state is no run's: start again in another folder"
            )
        for key, value in comparable(self.config).items():
            before = extra["config"].get(key, value)  # a field that came later
            if isinstance(getattr(self.config, key), Path):
                before = str(anywhere(Path(before)))
            if key not in RESUMABLE and before != value:
                raise ConfigError(
                    f"--resume: {self.config.snapshots} was started with {flag(key)} {before}, now it is {value}"
                )
        for name, found in extra.get("files", {}).items():
            if found != self.files.get(name):
                raise ConfigError(
                    f"--resume: {self.config.snapshots} was started with another {flag(name)} than it is now"
                )
        if changed := difference(extra["data"], self.outcome.data):
            raise ConfigError(f"--resume: {self.config.snapshots} was started on other images: {changed}")
        if step > self.config.steps:
            raise ConfigError(f"--resume: {step} steps are done already; pass --steps {step} or more")
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = self.config.lr
        self.outcome.curves = {name: [0.0] * step for name in METRICS} | extra["curves"]  # one that came later
        self.outcome.measured = extra["measured"]
        self.outcome.evaluations = extra.get("evaluations", {})
        return step

    def write_results(self, started: float) -> dict[str, Any]:
        """The aligned checkpoint, the pictures, `run.json` and the table; the snapshots go."""
        output = self.config.output_dir
        self.snapshots.finish()  # a state is whole, or has given up its room, before the rest needs some
        weights = merged(whole_state(self.models.generator))
        try:
            if rank() == 0:
                self.models.generator.save(output, weights, None if self.config.random_init else self.config.gpt_ckpt)
                report.write_pictures(self.outcome, output)
            self.outcome.skipped_images = self.data.skipped
            self.outcome.seconds["total"] = time.perf_counter() - started
            record = report.run_record(self.outcome)
            if rank() == 0:
                report.write_record(record, output)
                self.source.write(record, output)
                report.print_results(output)
        except OSError as error:
            needed = sum(value.nbytes for value in weights.values()) + PICTURES_BYTES
            raise not_written(error, output, f"go on with --resume --output-dir {output}", needed) from error
        self.snapshots.clear()
        return record
