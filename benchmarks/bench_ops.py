"""Every operation against plain PyTorch, torch.compile and what others offer: time, share of the ceiling, memory.

    pytest benchmarks/ --benchmark-only [--benchmark-json FILE]

On a GPU at XXL sizes in bf16 on Triton; on a CPU at small sizes on the reference, to see that all of it works.
Times are medians on the device's own clock, the contestants in turns; `extra_info` has all the figures.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from operations import BOTH, OPERATIONS, XXL, Operation, Source, changed, differentiable, one_image, tensors
from peers import PEERS
from pytest_benchmark.fixture import BenchmarkFixture
from targets import verdicts
from timing import clock, hold, host_seconds, synchronize, timed
from torch import Tensor

from vapi_fast import ops, reference

if TYPE_CHECKING:
    from conftest import Bench

WARM_UPS = 3
MOST_ROUNDS, FEWEST_ROUNDS, SECONDS = 30, 5, 0.5  # rounds of one row, as many as fit into SECONDS
MOST_SETS = 16
ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative L2 against float64
DISAGREEMENT = 1e-2  # share of indices that may differ from float64's


class Inputs:
    """One set of arguments, plain for a forward, and as leaves with gradients to start from for a backward."""

    def __init__(self, operation: Operation, bench: Bench) -> None:
        self.arguments = operation.inputs(bench.sizes, Source(bench.device, bench.dtype))
        self.marked, self.leaves = differentiable(operation, self.arguments)
        self.directions: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in tensors(self.arguments))

    def direction(self, result: Tensor) -> Tensor:
        key = result.shape, result.dtype
        if key not in self.directions:
            self.directions[key] = torch.randn_like(result, requires_grad=False)
        return self.directions[key]


class Contestant:
    """One implementation of an operation; whatever stops a rival is kept in `failure`."""

    def __init__(self, call: Callable[..., Any], passes: str) -> None:
        self.call = call
        self.backward = passes == BOTH
        self.seconds: list[float] = []
        self.host_seconds = self.peak_bytes = 0.0
        self.failure: str | None = None

    def run(self, inputs: Inputs) -> Any:
        if not self.backward:
            with torch.no_grad():
                return self.call(*inputs.arguments)
        results = [each for each in tensors(self.call(*inputs.marked)) if each.requires_grad]
        return torch.autograd.grad(results, inputs.leaves, [inputs.direction(each) for each in results])

    def warm_up(self, inputs: Inputs) -> None:
        for _ in range(WARM_UPS):
            self.run(inputs)
        self.host_seconds = min(host_seconds(lambda: self.run(inputs)) for _ in range(2))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run(inputs)
            synchronize()
            self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def time(self, inputs: Inputs) -> None:
        self.seconds.append(timed(lambda: self.run(inputs), 1.5 * self.host_seconds))

    def attempt(self, step: Callable[[Inputs], None], inputs: Inputs) -> None:
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


def rivals_of(operation: Operation, passes: str, bench: Bench) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The other implementations, and why some are left out."""
    torch.compiler.reset()  # all are compiled from the one function below, and it allows so many versions only
    found, skipped = {}, {}

    def eager(*arguments: Any) -> Any:
        return operation.call(reference, *arguments)

    if bench.device.type == "cuda":
        found["eager"] = Contestant(eager, passes)
        if bench.compile_seconds > 0:
            found["compiled"] = Contestant(torch.compile(eager, dynamic=False), passes)
        else:
            skipped["compiled"] = "its time was up (--compile-seconds)"
    else:
        skipped["eager"] = "on a CPU it is what runs anyway"
        skipped["compiled"] = "not on a CPU, where it takes a C++ compiler and minutes"
    for name, call in PEERS.get(operation.peers, {}).items():
        found[name] = Contestant(call, passes)
    return found, skipped


def accuracy(operation: Operation, passes: str, bench: Bench) -> tuple[float, float]:
    """Greatest relative L2 error of results and gradients against float64, and share of indices that differ.

    On one image. Where indices differ, so do the values that belong to them: those are left out.
    """
    small = operation.inputs(one_image(bench.sizes), Source(bench.device, bench.dtype))
    exact = changed(small, lambda x: x.double() if x.is_floating_point() else x)
    (low, low_leaves), (high, high_leaves) = differentiable(operation, small), differentiable(operation, exact)
    with torch.set_grad_enabled(passes == BOTH):
        found = list(tensors(operation.call(ops, *low)))
        with ops.use_backend("reference"):
            expected = list(tensors(operation.call(reference, *high)))
    pairs, disagreement = [], 0.0
    agree = torch.tensor(True, device=bench.device)
    for mine, right in zip(found, expected, strict=True):
        if not right.is_floating_point():
            agree = mine == right
            disagreement = 1 - agree.double().mean().item()
    for mine, right in zip(found, expected, strict=True):
        if right.is_floating_point():
            mask = agree[..., None] if agree.ndim == right.ndim - 1 > 0 else agree
            pairs.append((mine * mask, right * mask))
    if passes == BOTH:
        directions = [torch.randn_like(each, requires_grad=False) for each in found if each.requires_grad]
        gradients = torch.autograd.grad([x for x in found if x.requires_grad], low_leaves, directions)
        wide = [each.double() for each in directions]
        pairs += zip(
            gradients, torch.autograd.grad([x for x in expected if x.requires_grad], high_leaves, wide), strict=True
        )
    errors = [((mine.double() - right).norm() / right.norm()).item() for mine, right in pairs]
    return max(errors, key=lambda each: math.inf if math.isnan(each) else each, default=0.0), disagreement


def rotation(operation: Operation, bench: Bench) -> Iterator[Inputs]:
    """Sets of inputs, turn by turn: together larger than the cache, so that each comes from memory."""
    first = Inputs(operation, bench)
    wanted = math.ceil(4 * bench.cache_bytes / first.nbytes)
    sets = [first, *(Inputs(operation, bench) for _ in range(min(wanted, MOST_SETS) - 1))]
    return itertools.cycle(sets)


CASES = [(operation, passes) for operation in OPERATIONS for passes in operation.passes]


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("operation", "passes"), CASES, ids=[f"{o.name} {p}" for o, p in CASES])
def test_operation(operation: Operation, passes: str, bench: Bench, benchmark: BenchmarkFixture) -> None:
    error, disagreement = accuracy(operation, passes, bench)
    assert error < ERROR[bench.dtype], f"relative error {error:.2e} against float64"
    assert disagreement < DISAGREEMENT, f"{disagreement:.2%} of the indices differ from those in float64"

    sets = rotation(operation, bench)
    own = Contestant(lambda *arguments: operation.call(ops, *arguments), passes)
    own.warm_up(next(sets))
    rivals, skipped = rivals_of(operation, passes, bench)
    for name, rival in rivals.items():
        start = time.monotonic()
        rival.attempt(rival.warm_up, next(sets))
        if name == "compiled":
            bench.compile_seconds -= time.monotonic() - start

    def others_first() -> tuple[tuple[Inputs], dict[str, Any]]:
        for rival in rivals.values():
            rival.attempt(rival.time, next(sets))
        hold(1.5 * own.host_seconds)
        return (next(sets),), {}

    start = time.monotonic()
    others_first()
    own.time(next(sets))
    rounds = int(SECONDS / (time.monotonic() - start))
    benchmark.pedantic(own.run, setup=others_first, rounds=max(FEWEST_ROUNDS, min(rounds, MOST_ROUNDS)))
    if benchmark.disabled:
        return

    running = {name: rival for name, rival in rivals.items() if rival.failure is None}
    times = {"vapi_fast": benchmark.stats.stats.median}
    times |= {name: statistics.median(rival.seconds) for name, rival in running.items()}
    skipped |= {f"{operation.name} {passes}, {n}": r.failure for n, r in rivals.items() if r.failure is not None}
    peaks = {name: each.peak_bytes for name, each in {"vapi_fast": own, **running}.items()}
    moved, flops = (sum(parts) if passes == BOTH else parts[0] for parts in amounts(operation, bench))
    floors = {"copy": moved / bench.ceilings.copy, "matmul": flops / bench.ceilings.matmul}
    bound = max(floors, key=floors.get)
    row: dict[str, Any] = {
        "operation": operation.name,
        "pass": passes,
        "device": bench.name,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "sizes": dataclasses.asdict(bench.sizes),
        "ceilings": dataclasses.asdict(bench.ceilings),
        "seconds": times,
        "host_seconds": own.host_seconds,
        "peak_bytes": peaks,
        "bytes_moved": moved,
        "flops": flops,
        "bound": bound,
        "share": floors[bound] / times["vapi_fast"],
        "error": error,
        "disagreement": disagreement,
        "skipped": skipped,
    }
    row["targets"] = list(verdicts(row)) if bench.sizes == XXL else []
    benchmark.extra_info |= row
    bench.rows.append(row)


def amounts(operation: Operation, bench: Bench) -> tuple[tuple[int, int], tuple[int, int]]:
    return operation.bytes_moved(bench.sizes, bench.dtype.itemsize), operation.flops(bench.sizes)
