"""One alignment run from start to finish: load, measure, align, measure again, write everything down."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vapi_fast import report
from vapi_fast.alignment import Models, NonFiniteError, align_step, load_models, make_optimizer
from vapi_fast.checkpoint import load_file_checked, save_generator, write_atomically
from vapi_fast.clock import StageClock
from vapi_fast.config import AlignConfig, ConfigError, flag
from vapi_fast.data import ImageBatch, ImageData
from vapi_fast.distributed import process_group, rank, world_size
from vapi_fast.measurement import Evaluator, Measurement

GRID_IMAGES = 24
COMPARED_STEPS = 3
# Fields that may differ when a run is resumed: they do not touch what the steps compute.
RESUMABLE = {"output_dir", "resume", "evaluate", "checkpoint_every", "steps", "micro_batch", "compare", "eval_batch"}

PublishedStep = Callable[[Models, AlignConfig, ImageBatch, int], float]


def align(config: AlignConfig, *, published_step: PublishedStep | None = None) -> dict[str, Any]:
    """Align a generator with VA-π (or a baseline) and write the results into `config.output_dir`.

    Args:
        published_step: the recipe to time our steps against, for `config.compare`: computes one step's gradients and
            returns its loss. `benchmarks/reference_step.py` has the published one.

    Returns:
        The record that `run.json` holds.

    Raises:
        ConfigError, CheckpointError, DataError: the input cannot be used; nothing was written.
        NonFiniteError: a reward, loss or gradient is not finite; `state.pt` holds the last good weights.
    """
    if config.compare and published_step is None:
        raise ConfigError("--compare needs the published recipe: run benchmarks/e2e_align.py --compare")
    with process_group() as device:
        return Run(config, device, published_step).execute()


class Run:
    """State of a run: models, optimizer, data, the measurements and curves so far."""

    def __init__(self, config: AlignConfig, device: torch.device, published_step: PublishedStep | None) -> None:
        self.started = time.perf_counter()
        if config.batch_size % world_size():
            raise ConfigError(f"--batch-size {config.batch_size} does not divide over {world_size()} processes")
        torch.set_float32_matmul_precision("high")  # TF32 where bf16 is not used, as in the published recipe
        self.config = config
        self.device = device
        self.published_step = published_step
        self.clock = StageClock()
        self.models = load_models(config, device)
        self.optimizer = make_optimizer(self.models.generator, config)
        classes = self.models.generator.config.num_classes
        self.data = ImageData(config.data, config.image_size, num_classes=classes)
        self.evaluator = Evaluator(config, self.models, device) if config.evaluate else None
        self.pictures: list[tuple[str, Tensor]] = []
        self.measured: dict[str, dict[str, Any]] = {}
        self.curves: dict[str, list[float]] = {}
        self.compared: list[tuple[float, float]] = []  # seconds of our step and of the published one
        self.seconds = {"startup": time.perf_counter() - self.started, "alignment": 0.0, "evaluation": 0.0}

    def execute(self) -> dict[str, Any]:
        start_step = 0
        if self.evaluator:
            self.picture("base sample", originals=True)
        if self.config.resume:
            start_step = self.load_state()
        elif self.evaluator:
            self.measure("base")
        self.config.output_dir.mkdir(parents=True, exist_ok=True)
        self.align(start_step)
        if self.evaluator:
            self.measure("aligned")
            self.picture("aligned sample")
        return self.write_results()

    def measure(self, name: str) -> None:
        started = time.perf_counter()
        measurement: Measurement = self.evaluator.measure(self.models.generator, name)
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
        samples = self.evaluator.sample(self.models.generator, torch.arange(len(images)))
        self.pictures.append((title, samples.cpu()))

    def align(self, start_step: int) -> None:
        """The optimizer steps, with progress, TensorBoard curves, and the state saved every `checkpoint_every`."""
        config = self.config
        batches = iter(
            self.data.batches(
                config.batch_size,
                config.steps,
                seed=config.seed,
                start_step=start_step,
                rank=rank(),
                world_size=world_size(),
            )
        )
        writer = SummaryWriter(str(config.output_dir / "tensorboard"), purge_step=start_step) if rank() == 0 else None
        with contextlib.closing(writer) if writer else contextlib.nullcontext():  # ends its thread
            self.align_steps(batches, writer, start_step)

    def align_steps(self, batches: Iterator[ImageBatch], writer: SummaryWriter | None, start_step: int) -> None:
        config = self.config
        steps = tqdm(
            range(start_step, config.steps),
            initial=start_step,
            total=config.steps,
            desc=f"aligning ({config.method})",
            unit="step",
            disable=rank() > 0,
        )
        for step in steps:
            started = time.perf_counter()
            with self.clock("data"):
                batch = ImageBatch(*(value.to(self.device) for value in next(batches)))
            try:
                metrics = align_step(self.models, self.optimizer, config, batch, step, self.clock)
            except NonFiniteError as error:
                self.save_state(step)
                raise NonFiniteError(
                    f"step {step + 1}: {error}; stopped before the optimizer step, the weights up to step {step} are "
                    f"in {config.output_dir / 'state.pt'}"
                ) from error
            seconds = time.perf_counter() - started
            self.seconds["alignment"] += seconds
            for name, value in metrics.items():
                self.curves.setdefault(name, []).append(value)
                if writer:
                    writer.add_scalar(name, value, step)
            steps.set_postfix(
                reward=f"{metrics['reward']:.4f}",
                loss=f"{metrics['loss']:.4f}",
                images_per_s=f"{config.batch_size / seconds:.1f}",
            )
            if self.published_step and 0 < step <= COMPARED_STEPS:  # not the first, which warms up
                self.compare(batch, step, seconds)
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                self.save_state(step + 1)

    def compare(self, batch: ImageBatch, step: int, seconds: float) -> None:
        """Time the published recipe on the batch that our step just had; its gradients are thrown away."""
        started = time.perf_counter()
        self.published_step(self.models, self.config, batch, step)
        self.compared.append((seconds, time.perf_counter() - started))
        self.optimizer.zero_grad(set_to_none=True)

    def save_state(self, step: int) -> None:
        """Everything that `--resume` needs after `step` steps, in `state.pt`."""
        if rank() > 0:
            return
        state = {
            "step": step,
            "config": {key: str(value) for key, value in dataclasses.asdict(self.config).items()},
            "generator": self.models.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curves": self.curves,
            "measured": self.measured,
        }
        write_atomically(self.config.output_dir / "state.pt", lambda temporary: torch.save(state, temporary))

    def load_state(self) -> int:
        """Go on from `state.pt`; returns the steps it has behind it. Raises ConfigError if the run was another one."""
        path = self.config.output_dir / "state.pt"
        state = load_file_checked(path)
        for key, value in dataclasses.asdict(self.config).items():
            if key not in RESUMABLE and state["config"][key] != str(value):
                raise ConfigError(
                    f"--resume: {path} was started with {flag(key)} {state['config'][key]}, now it is {value}"
                )
        self.models.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curves = state["curves"]
        self.measured = state["measured"]
        return state["step"]

    def write_results(self) -> dict[str, Any]:
        """The aligned checkpoint, the pictures, `run.json` and the table; the resumable state goes."""
        output: Path = self.config.output_dir
        if rank() == 0:
            save_generator(output / "aligned.pt", self.models.generator)
            report.write_pictures(self, output)
        self.seconds["total"] = time.perf_counter() - self.started
        record = report.run_record(self)
        if rank() == 0:
            report.write_record(record, output)
            (output / "state.pt").unlink(missing_ok=True)
        return record
