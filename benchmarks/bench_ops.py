"""Every operation against plain PyTorch, torch.compile and what others offer: time, share of the ceiling, memory.

    pytest benchmarks/ --benchmark-only [--benchmark-json FILE]

On a GPU at XXL sizes in bf16 on Triton, held against plain PyTorch; on a CPU, where our own path is plain PyTorch too,
at small sizes against the published G-fold form, where there is one. Times are medians on the device's own clock, the
contestants in turns; `extra_info` has all the figures.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from operations import BOTH, OPERATIONS, Operation, changed, differentiable, tensors
from peers import PEERS
from published import PUBLISHED
from race import OURS, Contestant, Race
from shapes import XXL, Source, one_image
from targets import verdicts
from timing import clock
from torch import Tensor

from vapi_fast import ops, reference

if TYPE_CHECKING:
    from conftest import Bench, Guard

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


def run(call: Callable[..., Any], passes: str) -> Callable[[Inputs], Any]:
    """A pass of `call` over a set of inputs."""
    if passes != BOTH:
        return torch.no_grad()(lambda inputs: call(*inputs.arguments))

    def both(inputs: Inputs) -> tuple[Tensor, ...]:
        results = [each for each in tensors(call(*inputs.marked)) if each.requires_grad]
        return torch.autograd.grad(results, inputs.leaves, [inputs.direction(each) for each in results])

    return both


def rivals_of(operation: Operation, passes: str, bench: Bench) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The other implementations, and why some are left out."""
    torch.compiler.reset()  # all are compiled from the one function below, and it allows so many versions only
    found, skipped = {}, {}

    def eager(*arguments: Any) -> Any:
        return operation.call(reference, *arguments)

    if bench.device.type == "cuda":
        found["eager"] = Contestant(run(eager, passes))
        if bench.compile_seconds > 0:
            found["compiled"] = Contestant(run(torch.compile(eager, dynamic=False), passes))
        else:
            skipped["compiled"] = "its time was up (--compile-seconds)"
    else:
        skipped["eager"] = "on a CPU it is what runs anyway"
        skipped["compiled"] = "not on a CPU, where it takes a C++ compiler and minutes"
        if operation.name in PUBLISHED:
            found["published"] = Contestant(run(PUBLISHED[operation.name], passes))
    for name, call in PEERS.get(operation.peers, {}).items():
        found[name] = Contestant(run(call, passes))
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
def test_operation(operation: Operation, passes: str, bench: Bench, guard: Guard) -> None:
    error, disagreement = accuracy(operation, passes, bench)
    assert disagreement < DISAGREEMENT, f"{disagreement:.2%} of the indices differ from those in float64"
    rivals, skipped = rivals_of(operation, passes, bench)
    race = Race(run(lambda *arguments: operation.call(ops, *arguments), passes), rivals, rotation(operation, bench))
    race.warm_up()
    if "compiled" in rivals:
        bench.compile_seconds -= rivals["compiled"].warm_up_seconds
    name = f"{operation.name} {passes}"
    reference_path = "eager" if bench.device.type == "cuda" else "published"
    row = guard.measure(
        name, race, reference=reference_path, error=error, bound=ERROR[bench.dtype], seconds=bench.seconds
    )

    skipped |= {f"{name}, {n}": rival.failure for n, rival in rivals.items() if rival.failure is not None}
    peaks = {n: each.peak_bytes for n, each in race.contestants.items() if each.failure is None}
    moved, flops = (sum(parts) if passes == BOTH else parts[0] for parts in amounts(operation, bench))
    floors = {"copy": moved / bench.ceilings.copy, "matmul": flops / bench.ceilings.matmul}
    bound = max(floors, key=floors.get)
    row |= {
        "operation": operation.name,
        "pass": passes,
        "device": bench.name,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "sizes": dataclasses.asdict(bench.sizes),
        "ceilings": dataclasses.asdict(bench.ceilings),
        "host_seconds": race.ours.host_seconds,
        "peak_bytes": peaks,
        "bytes_moved": moved,
        "flops": flops,
        "bounded_by": bound,
        "share": floors[bound] / row["seconds"][OURS],
        "disagreement": disagreement,
        "skipped": skipped,
    }
    row["targets"] = list(verdicts(row)) if bench.sizes == XXL else []
    guard.judge(row)


def amounts(operation: Operation, bench: Bench) -> tuple[tuple[int, int], tuple[int, int]]:
    return operation.bytes_moved(bench.sizes, bench.dtype.itemsize), operation.flops(bench.sizes)
