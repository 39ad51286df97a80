"""One alignment run from start to finish: load, measure, align, measure again, write everything down."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vapi_fast.alignment import memory, report
from vapi_fast.alignment.comparison import Comparison, PublishedStep, published_gradients
from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.free_running import accumulate_free_gradients
from vapi_fast.alignment.measurement import Evaluator, Measurement
from vapi_fast.alignment.snapshots import Snapshots
from vapi_fast.alignment.step import StepResult, accumulate_gradients, align_step, load_models, make_trainer
from vapi_fast.data.dataset import ImageBatch, ImageData, ahead, reader
from vapi_fast.data.synthetic import SyntheticData
from vapi_fast.models.llamagen import llamagen_config
from vapi_fast.runtime import packages
from vapi_fast.runtime.accelerators import attention_backend, nvml
from vapi_fast.runtime.ceilings import measure
from vapi_fast.runtime.checkpoint import save_generator
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
from vapi_fast.runtime.errors import ConfigError, NonFiniteError, StoppedError
from vapi_fast.runtime.flags import flag
from vapi_fast.runtime.progress import progress_bar

GRID_IMAGES = 24
PROGRESS = "progress.jsonl"  # in the run's folder, a line a step
COMPARED_STEPS = 2  # of --path both, the last ones: ours alone are known before
# Fields that may differ when a run is resumed: all but lr do not touch what the steps compute, and a smaller lr is what
# a run that met infinities needs.
RESUMABLE = {
    "lr",
    "output_dir",
    "resume",
    "evaluate",
    "checkpoint_every",
    "steps",
    "micro_batch",
    "path",
    "eval_batch",
    "inception_weights",
}


def align(
    config: AlignConfig, *, published_step: PublishedStep | None = None, started: float | None = None
) -> dict[str, Any]:
    """Align a generator with VA-π (or a baseline) and write the results into `config.output_dir`.

    Args:
        published_step: the recipe to hold our steps against, for `config.path` "reference" and "both"; see
            `vapi_fast.alignment.comparison.PublishedStep`. `benchmarks/reference_step.py` has the published one.
        started: `time.perf_counter()` when the run's start-up began, if that was before this call.

    Returns:
        The record that `run.json` holds.

    Raises:
        ConfigError, CheckpointError, DataError: the input cannot be used; nothing was written.
        NonFiniteError: a reward, loss or gradient is not finite; the snapshots hold the last good weights.
        StoppedError: SIGTERM came; the snapshots hold the state to go on from.
    """
    if config.path != "fast" and published_step is None:
        raise ConfigError(f"--path {config.path} needs the published recipe: run benchmarks/e2e_align.py")
    started = time.perf_counter() if started is None else started
    with process_group() as device:
        if config.path != "fast" and world_size() > 1:
            raise ConfigError(f"--path {config.path} needs one process, this is one of {world_size()}")
        # The default folder has the time in its name: that of rank 0.
        config = dataclasses.replace(config, output_dir=gather_objects(config.output_dir)[0])
        return Run(config, device, published_step, started).execute()


@contextlib.contextmanager
def termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process, inside the `with` block."""
    terminated = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield terminated
        return
    before = signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)


def memory_plan(config: AlignConfig, device: torch.device) -> memory.MemoryPlan | None:
    """How to use the GPUs' free memory, alike on all ranks; None on a CPU. Raises ConfigError if it will not fit."""
    if device.type != "cuda":
        return None
    free = min(gather_objects(torch.cuda.mem_get_info(device)[0]))
    return memory.check(config, llamagen_config(config.model), free, world_size())


def kernels_compiled(config: AlignConfig, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """On a GPU other processes compile what the steps will launch, during the `with` block and at most once a machine.

    The first of a machine's ranks sees to it. The tiny preset has other shapes than those that are known.
    """
    if device.type != "cuda" or config.model == "tiny" or os.environ.get("LOCAL_RANK", "0") != "0":
        return contextlib.nullcontext()
    from vapi_fast.kernels import compile, library
    from vapi_fast.kernels.launch import device_architecture

    try:
        library.served()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return compile.in_background(device_architecture(device.index))


class Run:
    """State of a run: models, optimizer, data, the measurements and curves so far."""

    def __init__(
        self,
        config: AlignConfig,
        device: torch.device,
        published_step: PublishedStep | None,
        started: float,
    ) -> None:
        self.started = started
        if config.batch_size % world_size():
            raise ConfigError(f"--batch-size {config.batch_size} does not divide over {world_size()} processes")
        if not config.synthetic_data:
            reader()  # what it lacks is told before minutes go into measuring and loading
        torch.set_float32_matmul_precision("high")  # TF32 where bf16 is not used, as in the published recipe
        self.config = config
        self.device = device
        self.clock = StageClock(device)
        self.ceilings = measure(device)
        if device.type == "cuda":  # the measurement's own memory
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self.energy = EnergyMeter(device, nvml())
        self.plan = memory_plan(config, device)
        with kernels_compiled(config, device):
            models = load_models(config, device, self.plan.reward_chunk if self.plan else None)
            loaded = time.perf_counter()
        compiling = time.perf_counter() - loaded
        self.models = models
        classes = models.generator.config.num_classes
        if config.synthetic_data:
            self.data = SyntheticData(config.image_size, classes)
        else:
            self.data = ImageData(config.data, config.image_size, num_classes=classes)
        self.evaluator = Evaluator(config, models, device) if config.evaluate else None
        shard(models.generator, reshard_after_forward=self.plan is None or self.plan.reshard_after_forward)
        self.trainer = make_trainer(models, config, self.clock)
        self.snapshots = Snapshots(config.snapshots)
        self.published_step = published_step
        self.comparison = Comparison(published_step, models, device) if config.path == "both" else None
        self.pictures: list[tuple[str, Tensor]] = []
        self.measured: dict[str, dict[str, Any]] = {}
        self.curves: dict[str, list[float]] = {}
        self.curve_writer = report.curve_writer() if rank() == 0 else None
        startup = time.perf_counter() - started
        self.seconds = {"startup": startup, "kernels": compiling, "alignment": 0.0, "evaluation": 0.0}
        self.first_step: dict[str, float] = {}  # its seconds by stage
        self.clock.add("startup", self.seconds["startup"])
        if rank() == 0:
            print(self.introduction())

    def introduction(self) -> str:
        """What runs where, and without what, in a line each."""
        config, where = self.config, report.device_name(self.device)
        processes = f"{world_size()} × " if world_size() > 1 else ""
        optimizer = type(self.trainer.optimizer)
        text = f"aligning {config.model} on {processes}{where}: attention by {attention_backend(self.device)}, "
        text += f"{optimizer.__module__.partition('.')[0]}'s {optimizer.__name__}"
        text += f"; results in {config.output_dir}"
        text += f"\nstart-up {self.seconds['startup']:.1f} s, {self.seconds['kernels']:.1f} of it waiting for kernels"
        plan = f"memory per GPU, as planned: {self.plan}" if self.plan else ""
        return "\n".join(filter(None, (text, plan, packages.left_out())))

    def execute(self) -> dict[str, Any]:
        try:
            return self.run()
        finally:
            self.snapshots.finish()

    def run(self) -> dict[str, Any]:
        start_step = 0
        if self.evaluator:
            self.picture("base sample", originals=True)
        if self.config.resume:
            start_step = self.load_state()
        elif self.evaluator:
            self.measure("base")
            self.save_state(0)  # the measurement can take longer than the alignment
        self.config.output_dir.mkdir(parents=True, exist_ok=True)
        self.align(start_step)
        if self.evaluator:
            self.save_state(self.config.steps)
            self.measure("aligned")
            self.picture("aligned sample")
        return self.write_results()

    def measure(self, name: str) -> None:
        started = time.perf_counter()
        measurement: Measurement = self.evaluator.measure(whole_copy(self.models.generator), name)
        self.measured[name] = measurement.as_record()
        self.seconds["evaluation"] += time.perf_counter() - started

    def picture(self, title: str, originals: bool = False) -> None:
        """Add a column to the picture grid: samples at fixed seeds, after the held-out images of the same classes."""
        images = torch.cat([batch.images for batch in self.evaluator.rewarded])[:GRID_IMAGES].to(self.device)
        if originals:
            tokenizer = self.models.tokenizer
            with torch.no_grad():
                reconstructions = tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)
            self.pictures += [("original", images.cpu()), ("reconstruction", reconstructions.cpu())]
        samples = self.evaluator.sample(whole_copy(self.models.generator), torch.arange(len(images)))
        self.pictures.append((title, samples.cpu()))

    def align(self, start_step: int) -> None:
        """The optimizer steps, with progress, TensorBoard curves, and the state saved every `checkpoint_every`."""
        config = self.config
        shares = {"rank": rank(), "world_size": world_size()}
        batches = iter(
            self.data.batches(config.batch_size, config.steps, seed=config.seed, start_step=start_step, **shares)
        )
        batches = ahead(batches, self.device)
        with contextlib.ExitStack() as stack:
            self.terminated = stack.enter_context(termination())
            stack.callback(batches.close)
            self.writer = None
            if self.curve_writer:
                folder = str(config.output_dir / "tensorboard")
                self.writer = stack.enter_context(self.curve_writer(folder, purge_step=start_step))
            if rank() == 0:
                self.lines = stack.enter_context((config.output_dir / PROGRESS).open("a", encoding="utf-8"))
            bar = {"desc": f"aligning ({config.method})", "unit": "step", "disable": rank() > 0}
            self.progress = stack.enter_context(progress_bar(config.steps, initial=start_step, **bar))
            try:
                self.align_steps(batches, start_step)
            except NonFiniteError as error:
                steps = len(self.curves.get("loss", []))
                self.save_state(steps)
                raise NonFiniteError(
                    f"step {steps + 1}: {error}; stopped before the optimizer step, the weights up to step {steps} "
                    f"are in {config.snapshots}"
                ) from error

    def align_steps(self, batches: Iterator[ImageBatch], start_step: int) -> None:
        """The steps; the figures of one are read once the next is launched, so that a GPU never waits for the host."""
        pending: StepResult | None = None
        self.stopping = False
        self.steps_read = 0
        self.start_step = start_step
        self.align_started = time.perf_counter()
        for step in range(start_step, self.config.steps):
            with self.clock("data"):
                batch = next(batches).to(self.device)
            stop = self.terminated.is_set()
            result = align_step(self.trainer, batch, step, gradients=self.gradients_of(step), stop=stop)
            self.clock.end_step()
            if pending:
                self.read(pending)
            pending = result
            due, last = (step + 1) % self.config.checkpoint_every == 0, step + 1 == self.config.steps
            if due or last or self.stopping or step == start_step or self.comparison:  # a published step is long
                self.read(pending)  # may learn that a rank wants to stop
                pending = None
            if step == start_step:
                self.first_step = self.clock.seconds(wait=True)
            if (due or self.stopping) and not last:
                self.save_state(step + 1)
            if self.stopping and not last:
                again = f"--resume --output-dir {self.config.output_dir}"
                raise StoppedError(f"stopped by SIGTERM after step {step + 1}; go on with {again}")

    def gradients_of(self, step: int) -> Any:
        """What computes a step's gradients: ours, the published recipe, or ours beside it."""
        if self.config.path == "reference":
            return published_gradients(self.published_step)
        first = max(self.start_step + 1, self.config.steps - COMPARED_STEPS)  # the one before it warms up
        if self.comparison and step >= first:
            return self.comparison.gradients
        return accumulate_free_gradients if self.config.rollouts == "free" else accumulate_gradients

    def read(self, result: StepResult) -> None:
        """Wait for a step's figures and write them down. Raises NonFiniteError."""
        metrics, stop = result.read()
        self.stopping |= stop
        self.steps_read += 1
        compared = self.comparison.seconds() if self.comparison else 0.0
        self.seconds["alignment"] = time.perf_counter() - self.align_started - compared
        for name, value in metrics.items():
            self.curves.setdefault(name, []).append(value)
            if self.writer:
                self.writer.add_scalar(name, value, result.step)
        stages = {stage: seconds for stage, seconds in self.clock.seconds().items() if stage != "startup"}
        longest = max(stages, key=stages.get)
        shown = {"reward": f"{metrics['reward']:.4f}", "loss": f"{metrics['loss']:.4f}"}
        shown["images_per_s"] = f"{self.steps_read * self.config.batch_size / self.seconds['alignment']:.1f}"
        shown[longest] = f"{stages[longest] / sum(stages.values()):.0%}"
        shown["memory"] = f"{report.peak_memory(self.device) / 1e9:.1f}GB"
        if (joules := self.energy.joules()) is not None:
            shown["energy"] = f"{joules / 1e3:.1f}kJ"
        self.progress.set_postfix(shown)
        self.progress.update()
        if rank() == 0:
            self.write_progress(result.step, metrics)

    def write_progress(self, step: int, metrics: dict[str, float]) -> None:
        """A line of JSON with the figures so far, for whoever watches the run or has to do with one that was ended."""
        line = {"step": step + 1, **metrics, "seconds": self.seconds, "peak_memory": report.peak_memory(self.device)}
        if self.comparison:  # no other step is under way meanwhile
            line |= {"stages": self.stage_seconds()} | (self.comparison.record() if self.comparison.errors else {})
        if seconds := self.step_seconds(wait=False):
            line |= {"step_seconds": seconds, "images_per_second": self.config.batch_size / seconds}
        print(json.dumps(line), file=self.lines, flush=True)

    def step_seconds(self, wait: bool = True) -> float | None:
        """Median of the steps after the first, which compiles and warms up, and without those that were compared."""
        seconds = self.clock.step_seconds(wait)
        compared = len(self.comparison.errors) if self.comparison else 0
        alone = seconds[1 : len(seconds) - compared]
        return statistics.median(alone or seconds) if seconds else None

    def stage_seconds(self) -> dict[str, float]:
        """Mean seconds a step by stage, of the steps after the first where there are more."""
        count, first = len(self.clock.step_seconds(wait=True)), self.first_step
        seconds = {stage: each for stage, each in self.clock.seconds(wait=True).items() if stage != "startup"}
        if count < 2:
            return seconds if count else {}
        return {stage: (each - first.get(stage, 0.0)) / (count - 1) for stage, each in seconds.items()}

    def save_state(self, step: int) -> None:
        """Everything that `--resume` needs after `step` steps; all ranks call it."""
        extra = {
            "config": {key: str(value) for key, value in dataclasses.asdict(self.config).items()},
            "curves": self.curves,
            "measured": self.measured,
        }
        self.snapshots.save(step, self.models.generator, self.trainer.optimizer, extra)

    def load_state(self) -> int:
        """Go on from the newest snapshot; returns the steps behind it. Raises ConfigError if the run was another."""
        step, extra = self.snapshots.restore(self.models.generator, self.trainer.optimizer)
        for key, value in dataclasses.asdict(self.config).items():
            if key not in RESUMABLE and extra["config"].get(key) != str(value):
                before = extra["config"].get(key)
                raise ConfigError(
                    f"--resume: {self.config.snapshots} was started with {flag(key)} {before}, now it is {value}"
                )
        if step > self.config.steps:
            raise ConfigError(f"--resume: {step} steps are done already; pass --steps {step} or more")
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = self.config.lr
        self.curves = extra["curves"]
        self.measured = extra["measured"]
        return step

    def write_results(self) -> dict[str, Any]:
        """The aligned checkpoint, the pictures, `run.json` and the table; the snapshots go."""
        output: Path = self.config.output_dir
        weights = whole_state(self.models.generator)
        if rank() == 0:
            save_generator(output / "aligned.pt", weights)
            report.write_pictures(self, output)
        self.seconds["total"] = time.perf_counter() - self.started
        record = report.run_record(self)
        if rank() == 0:
            report.write_record(record, output)
        self.snapshots.clear()
        return record
