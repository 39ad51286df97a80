"""Implementations timed in turns, in one process and on the same inputs, and the ratios of their times."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from timing import hold, host_seconds, synchronize, timed

if TYPE_CHECKING:  # a GPU's rates are measured without it
    from pytest_benchmark.fixture import BenchmarkFixture

OURS, YARDSTICK = "vapi_fast", "yardstick"
WARM_UPS, LONG = 5, 2.0  # calls, of which all but two are left out once those before took so many seconds
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
AGAIN = 2  # times as many rounds where a ratio is measured again


class Contestant:
    """One implementation: `call` does all of the work on a set of inputs. What stops a rival is kept in `failure`."""

    def __init__(self, call: Callable[[Any], object]) -> None:
        self.call = call
        self.seconds: list[float] = []
        self.host_seconds = self.call_seconds = self.warm_up_seconds = self.peak_bytes = 0.0
        self.failure: str | None = None

    def warm_up(self, inputs: Any) -> None:
        start = time.monotonic()
        try:
            self.launch(inputs, start)
        finally:  # a compilation that fails takes its time too
            self.warm_up_seconds = time.monotonic() - start

    def launch(self, inputs: Any, start: float) -> None:
        launches: list[float] = []
        while len(launches) < 2 or (len(launches) < WARM_UPS and time.monotonic() - start < LONG):
            if torch.cuda.is_available():
                synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            called = time.monotonic()
            launches.append(host_seconds(lambda: self.call(inputs)))
            self.call_seconds = time.monotonic() - called
            if torch.cuda.is_available():
                self.peak_bytes = torch.cuda.max_memory_allocated() - before
        self.host_seconds = min(launches[1:])

    def time(self, inputs: Any) -> None:
        self.seconds.append(timed(lambda: self.call(inputs), 1.5 * self.host_seconds))

    def attempt(self, step: Callable[[Any], None], inputs: Any) -> None:
        """A step of a rival, which may fail where ours may not."""
        if self.failure is not None:
            return
        try:
            step(inputs)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if self.failure is not None:  # the exception is gone, and with it what it held in memory
            gc.collect()
            torch.cuda.empty_cache()


def yardstick(device: torch.device) -> Contestant:
    """Fixed work in plain PyTorch, nothing of ours: convolutions and matrix products, some 10 ms of them.

    What both sides of a comparison share may get slower without changing their ratio; it changes this one's.
    """
    gpu = device.type == "cuda"
    repeats, channels, side, width = (8, 256, 192, 8192) if gpu else (1, 64, 32, 768)
    options = {"device": device, "dtype": torch.bfloat16 if gpu else torch.float32}
    maps, kernel = torch.randn(16, channels, side, side, **options), torch.randn(channels, channels, 3, 3, **options)
    matrix = torch.randn(width, width, **options)

    @torch.no_grad()
    def work(_: Any) -> None:
        for _ in range(repeats):
            F.conv2d(maps, kernel, padding=1)
            torch.mm(matrix, matrix)

    return Contestant(work)


class Ratio(NamedTuple):
    """How many times as long as ours a rival takes: median and quartiles of the ratios of `rounds` rounds."""

    median: float
    low: float
    high: float
    rounds: int


class Race:
    """Ours against others, in turns: what slows the machine down for a while slows all of them down.

    Every round begins with another one. `inputs` gives each call its own, so that none finds them in the cache.
    """

    def __init__(self, ours: Callable[[Any], object], others: dict[str, Contestant], inputs: Iterator[Any]) -> None:
        self.ours = Contestant(ours)
        self.contestants = {OURS: self.ours, **others}
        self.inputs = inputs

    def warm_up(self) -> None:
        self.ours.warm_up(next(self.inputs))
        for name, each in self.contestants.items():
            if name != OURS:
                each.attempt(each.warm_up, next(self.inputs))

    def order(self, turn: int) -> list[str]:
        names = list(self.contestants)
        first = turn % len(names)
        return names[first:] + names[:first]

    def time(self, names: Sequence[str]) -> None:
        for name in names:
            each = self.contestants[name]
            if name == OURS:
                each.time(next(self.inputs))
            else:
                each.attempt(each.time, next(self.inputs))

    def run(self, benchmark: BenchmarkFixture, seconds: float, fewest: int = FEWEST_ROUNDS) -> None:
        """As many rounds as fit into `seconds`, but not fewer than `fewest`; pytest-benchmark times our own calls."""
        round_seconds = sum(each.call_seconds for each in self.contestants.values() if each.failure is None)
        rounds = max(fewest, min(int(seconds / round_seconds), MOST_ROUNDS))
        self.clear()
        turns = itertools.count()
        behind_us: list[str] = []  # in the round under way

        def others_before_us() -> tuple[tuple[Any], dict[str, Any]]:
            self.time(behind_us)
            order = self.order(next(turns))
            place = order.index(OURS)
            self.time(order[:place])
            behind_us[:] = order[place + 1 :]
            hold(1.5 * self.ours.host_seconds)
            return (next(self.inputs),), {}

        benchmark.pedantic(self.ours.call, setup=others_before_us, rounds=rounds)
        self.time(behind_us)
        if not benchmark.disabled:
            self.ours.seconds = list(benchmark.stats.stats.data)

    def again(self) -> None:
        """The same with more rounds, whose times replace those before."""
        rounds = AGAIN * len(self.ours.seconds)
        self.clear()
        for turn in range(rounds):
            self.time(self.order(turn))

    def clear(self) -> None:
        for each in self.contestants.values():
            each.seconds.clear()

    def seconds(self) -> dict[str, float]:
        """Medians of those that have not failed."""
        return {
            name: statistics.median(each.seconds) for name, each in self.contestants.items() if each.failure is None
        }

    def ratio(self, name: str) -> Ratio | None:
        """Of a rival's time to ours, from the times of the same round; None if it has failed or is not there."""
        rival = self.contestants.get(name)
        if rival is None or rival.failure is not None:
            return None
        ratios = [theirs / ours for theirs, ours in zip(rival.seconds, self.ours.seconds, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(median, low, high, len(ratios))
