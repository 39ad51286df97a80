"""Where the time goes: seconds per named stage and per step, without making the host wait for the GPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

Clock = Callable[[str], AbstractContextManager[None]]  # times the stage it is given; `contextlib.nullcontext` does not

# In the order in which they follow one another; a run may lack some.
STAGES = (
    "startup",
    "data",
    "encode",
    "forward",
    "sample",
    "decode",
    "lpips",
    "reward",
    "loss",
    "backward",
    "optimizer",
)


class Timeline(Protocol):
    """Marks on the time line of a device; they may lie in its future."""

    def mark(self) -> Any: ...
    def reached(self, mark: Any) -> bool: ...
    def wait(self, mark: Any) -> None: ...
    def seconds(self, start: Any, end: Any) -> float: ...
    def release(self, mark: Any) -> None: ...


class HostTimeline:
    def mark(self) -> float:
        return time.perf_counter()

    def reached(self, mark: float) -> bool:
        return True

    def wait(self, mark: float) -> None: ...

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def release(self, mark: float) -> None: ...


class CUDATimeline:
    """Timing events on the device's current stream, used again once they have been read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self.free.pop() if self.free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def reached(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3

    def release(self, mark: torch.cuda.Event) -> None:
        self.free.append(mark)


def timeline(device: torch.device) -> Timeline:
    return CUDATimeline(device) if device.type == "cuda" else HostTimeline()


class StageClock:
    """Adds up seconds per stage and measures whole steps, on the time line of `device`.

    On a GPU a stage lasts from where its first to where its last kernel stands in the current stream: what the GPU
    waits for inside a stage counts, what the host does ahead of it does not. Nothing here waits for the GPU unless
    asked to. A stage that ends in an exception is not counted.

        with clock("decode"):
            …
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.timeline = timeline(torch.device(device))
        self.stage: str | None = None
        self.step_start: Any = None
        self.pending: deque[tuple[str | None, Any, Any]] = deque()  # stage, or None for a step; start; end
        self.totals: dict[str, float] = {}
        self.steps: list[float] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what runs inside. Raises RuntimeError inside another stage: a second would be counted twice."""
        if self.stage is not None:
            raise RuntimeError(f"stage {stage!r} was started inside stage {self.stage!r}: stages do not nest")
        self.stage = stage
        try:
            if self.step_start is None:
                self.step_start = self.timeline.mark()
            start = self.timeline.mark()
            yield
            self.pending.append((stage, start, self.timeline.mark()))
        finally:
            self.stage = None

    def add(self, stage: str, seconds: float) -> None:
        """Count host time that was measured elsewhere; it belongs to no step."""
        self.totals[stage] = self.totals.get(stage, 0.0) + seconds

    def end_step(self) -> None:
        """A step goes from its first stage to here: what lies between two steps (a snapshot, say) is in none."""
        if self.step_start is not None:
            self.pending.append((None, self.step_start, self.timeline.mark()))
            self.step_start = None
        self.collect(wait=False)

    def seconds(self, wait: bool = False) -> dict[str, float]:
        """Seconds per stage so far, in the order of STAGES; `wait`: with what the GPU still works on."""
        self.collect(wait)
        order = [*(stage for stage in STAGES if stage in self.totals), *self.totals]
        return {stage: self.totals[stage] for stage in order}

    def step_seconds(self, wait: bool = False) -> list[float]:
        """Seconds of each step that has ended; `wait`: with those that the GPU still works on."""
        self.collect(wait)
        return list(self.steps)

    def collect(self, wait: bool) -> None:
        """Read the marks that the device has reached, which bounds their number."""
        while self.pending:
            stage, start, end = self.pending[0]
            if wait:
                self.timeline.wait(end)
            elif not self.timeline.reached(end):
                return
            self.pending.popleft()
            seconds = self.timeline.seconds(start, end)
            if stage is None:
                self.steps.append(seconds)
            else:
                self.add(stage, seconds)
            self.timeline.release(start)
            self.timeline.release(end)
