"""The optimizer steps of a run: batches in, weights changed, figures written down, states saved."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from vapi_fast.alignment.config import PROGRESS, AlignConfig
from vapi_fast.alignment.figures import StepResult
from vapi_fast.alignment.free_running import accumulate_free_gradients
from vapi_fast.alignment.memory import ALONE, Beside
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.outcome import Outcome
from vapi_fast.alignment.report import curve_writer, peak_memory, write_scores
from vapi_fast.alignment.step import Trainer, accumulate_gradients, align_step
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.runtime.distributed import rank
from vapi_fast.runtime.errors import NonFiniteError, StoppedError
from vapi_fast.runtime.progress import progress_bar


class GradientSource:
    """What computes a run's gradients: ours. A benchmark puts another recipe in their place, or beside them."""

    seconds: float = 0.0  # that steps took beside ours, so far
    compared: int = 0  # steps that something else ran beside
    waits = False  # for a step's figures before it starts the next

    def check(self, config: AlignConfig) -> None:
        """Raise ConfigError where it cannot compute what `config` asks for."""

    def memory(self, config: AlignConfig, world_size: int) -> Beside:
        return ALONE

    def prepare(self, models: Models, config: AlignConfig, device: torch.device) -> None:
        """Before the first step, with the weights that it starts from."""

    def of_step(self, step: int, start_step: int, config: AlignConfig) -> Callable[..., Any]:
        """What `align_step` calls in that step."""
        return accumulate_free_gradients if config.rollouts == "free" else accumulate_gradients

    def record(self) -> dict[str, Any]:
        """What it has found, for `run.json`."""
        return {}

    def write(self, record: dict[str, Any], output: Path) -> None:
        """What else is to be printed or drawn at the end, on rank 0."""


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


class Loop:
    """Steps from `start_step` on, with progress, TensorBoard curves, the state saved every `checkpoint_every`, and the
    generator measured every `eval_every`."""

    def __init__(
        self,
        trainer: Trainer,
        source: GradientSource,
        outcome: Outcome,
        start_step: int,
        save: Callable[[int], None],
        measure: Callable[[int], None],
    ) -> None:
        """save: writes the state after so many steps. measure: adds to `outcome.evaluations`. All ranks call them."""
        self.trainer, self.source, self.outcome = trainer, source, outcome
        self.save, self.measure = save, measure
        self.start_step = start_step
        self.steps_read = 0
        self.stopping = False

    def run(self, batches: Iterator[ImageBatch]) -> None:
        """Raises NonFiniteError and StoppedError; the state that they leave behind is saved."""
        config = self.outcome.config
        with contextlib.ExitStack() as stack:
            self.terminated = stack.enter_context(termination())
            self.writer = None
            if rank() == 0:
                self.lines = stack.enter_context((config.output_dir / PROGRESS).open("a", encoding="utf-8"))
                if writer := curve_writer():
                    folder = str(config.output_dir / "tensorboard")
                    self.writer = stack.enter_context(writer(folder, purge_step=self.start_step))
            what = f"{config.method}, control {config.control}" if config.control else config.method
            bar = {"desc": f"aligning ({what})", "unit": "step", "disable": rank() > 0}
            self.progress = stack.enter_context(progress_bar(config.steps, initial=self.start_step, **bar))
            try:
                self.steps(batches)
            except NonFiniteError as error:
                steps = len(self.outcome.curves.get("loss", []))
                self.save(steps)
                raise NonFiniteError(
                    f"step {steps + 1}: {error}; stopped before the optimizer step, the weights up to step {steps} "
                    f"are in {config.snapshots}"
                ) from error

    def steps(self, batches: Iterator[ImageBatch]) -> None:
        """The figures of one step are read once the next is launched, so that a GPU never waits for the host."""
        config, clock = self.outcome.config, self.trainer.clock
        pending: StepResult | None = None
        self.started = time.perf_counter()
        base = self.outcome.measured.get("base")
        if config.eval_every and self.start_step == 0 and base and self.writer:
            write_scores(self.writer, base, 0)
        if config.measures_after(self.start_step) and str(self.start_step) not in self.outcome.evaluations:
            self.evaluate(self.start_step)  # it was stopped before it came to that
        for step in range(self.start_step, config.steps):
            with clock("data"):
                batch = next(batches).to(self.outcome.device)
            gradients = self.source.of_step(step, self.start_step, config)
            result = align_step(self.trainer, batch, step, gradients=gradients, stop=self.terminated.is_set())
            clock.end_step()
            if pending:
                self.read(pending)
            pending = result
            first, last = step == self.start_step, step + 1 == config.steps
            due = (step + 1) % config.checkpoint_every == 0
            measured = config.measures_after(step + 1)
            if due or last or self.stopping or first or measured or self.source.waits:
                self.read(pending)  # may learn that a rank wants to stop
                pending = None
            if first:
                self.outcome.first_step = clock.seconds(wait=True)
            if (due or measured or self.stopping) and not last:
                self.save(step + 1)  # before a measurement, which can take longer than the steps so far
            if measured and not self.stopping:
                self.evaluate(step + 1)
            if self.stopping and not last:
                again = f"--resume --output-dir {config.output_dir}"
                raise StoppedError(f"stopped by SIGTERM after step {step + 1}; go on with {again}")

    def evaluate(self, step: int) -> None:
        """Measure the generator after so many steps, which is no part of the alignment, and save what was found."""
        outcome, started = self.outcome, time.perf_counter()
        self.measure(step)
        self.started += time.perf_counter() - started
        figures = outcome.evaluations[str(step)]
        if self.writer:
            write_scores(self.writer, figures, step)
        if rank() == 0:
            self.write_line(step, {"evaluation": figures})
        self.save(step)

    def read(self, result: StepResult) -> None:
        """Wait for a step's figures and write them down. Raises NonFiniteError."""
        metrics, stop = result.read()
        outcome = self.outcome
        self.stopping |= stop
        self.steps_read += 1
        outcome.compared, outcome.comparison = self.source.compared, self.source.record()
        outcome.seconds["alignment"] = time.perf_counter() - self.started - self.source.seconds
        for name, value in metrics.items():
            outcome.curves.setdefault(name, []).append(value)
            if self.writer:
                self.writer.add_scalar(name, value, result.step)
        self.progress.set_postfix(self.shown(metrics))
        self.progress.update()
        if rank() == 0:
            self.write_progress(result.step, metrics)

    def shown(self, metrics: dict[str, float]) -> dict[str, str]:
        """What the progress bar says beside the steps."""
        outcome = self.outcome
        stages = {stage: seconds for stage, seconds in outcome.clock.seconds().items() if stage != "startup"}
        longest = max(stages, key=stages.get)
        shown = {"reward": f"{metrics['reward']:.4f}", "loss": f"{metrics['loss']:.4f}"}
        shown["images_per_s"] = f"{self.steps_read * outcome.config.batch_size / outcome.seconds['alignment']:.1f}"
        shown[longest] = f"{stages[longest] / sum(stages.values()):.0%}"
        shown["memory"] = f"{peak_memory(outcome.device) / 1e9:.1f}GB"
        if (joules := outcome.energy.joules()) is not None:
            shown["energy"] = f"{joules / 1e3:.1f}kJ"
        if outcome.evaluations:
            shown["fid"] = f"{list(outcome.evaluations.values())[-1]['fid']:.2f}"
        return shown

    def write_progress(self, step: int, metrics: dict[str, float]) -> None:
        """The figures of a step."""
        outcome, figures = self.outcome, dict(metrics)
        if self.source.waits:  # no other step is under way meanwhile
            figures |= {"stages": outcome.stage_seconds()} | outcome.comparison
        if seconds := outcome.step_seconds(wait=False):
            figures |= {"step_seconds": seconds, "images_per_second": outcome.config.batch_size / seconds}
        self.write_line(step + 1, figures)

    def write_line(self, steps: int, figures: dict[str, Any]) -> None:
        """A line of JSON with the figures so far, for whoever watches the run or has to do with one that was ended."""
        outcome = self.outcome
        line = {"step": steps, **figures, "seconds": outcome.seconds, "peak_memory": peak_memory(outcome.device)}
        print(json.dumps(line), file=self.lines, flush=True)
