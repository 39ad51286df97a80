"""Every operation against plain PyTorch, torch.compile and what others offer: time, share of the ceiling, memory.

    pytest benchmarks/ --benchmark-only [--benchmark-json FILE]

On a GPU at XXL sizes in bf16 on Triton, held to the fastest of plain PyTorch's forms; on a CPU, where our own path is
plain PyTorch too, at small sizes to the published G-fold form, and where there is none to what a user would write.
Times are medians on the device's own clock, the contestants in turns; `extra_info` has all the figures.

Exactness is that of one image of the batch that is timed. On a GPU batches of two to sixteen images at these widths are
held to float64 by the tests named `…production_size…`, which `gpu_check.sh` runs before; what treats each sequence,
group or token alone (`append_to_cache`, `group_advantages`, `noisy_prefix`) is tested at small sizes only.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from exact import DISAGREEMENT, ERROR, accuracy
from operations import BOTH, OPERATIONS, Operation, differentiable
from peers import LIGER
from published import PUBLISHED
from race import OURS, Contestant, Race
from shapes import XXL, Source, tensors
from targets import verdicts
from timing import clock
from torch import Tensor

from vapi_fast import ops, reference

if TYPE_CHECKING:
    from conftest import Bench, Guard

MOST_SETS = 16


class Inputs:
    """One set of arguments, plain for a forward, and as leaves with a gradient to start from for a backward."""

    def __init__(self, operation: Operation, passes: str, bench: Bench) -> None:
        self.arguments = operation.inputs(bench.sizes, Source(bench.device, bench.dtype))
        self.marked, self.leaves = differentiable(operation, self.arguments)
        if passes == BOTH:
            self.direction = torch.randn_like(differentiable_result(operation.call(ops, *self.marked)).detach())

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in tensors(self.arguments))


def differentiable_result(results: Any) -> Tensor:
    (result,) = [each for each in tensors(results) if each.requires_grad]
    return result


def run(call: Callable[..., Any], passes: str) -> Callable[[Inputs], Any]:
    """A pass of `call` over a set of inputs."""
    if passes != BOTH:
        return torch.no_grad()(lambda inputs: call(*inputs.arguments))

    def both(inputs: Inputs) -> tuple[Tensor, ...]:
        result = differentiable_result(call(*inputs.marked))
        return torch.autograd.grad(result, inputs.leaves, inputs.direction.to(result.dtype))

    return both


def rivals_of(
    operation: Operation, passes: str, bench: Bench
) -> tuple[dict[str, Contestant], list[str], dict[str, str]]:
    """The other implementations, those of them that ours is held to, and why some are left out."""
    torch.compiler.reset()  # all are compiled from the one function below, and it allows so many versions only
    plain, call = operation.plain
    found, skipped = {plain: Contestant(run(call, passes))}, {}

    def eager(*arguments: Any) -> Any:
        return operation.call(reference, *arguments)

    if bench.device.type == "cuda":
        found["eager"] = Contestant(run(eager, passes))
        references = [plain, "eager"]
        if bench.compile_seconds > 0:
            found["compiled"] = Contestant(run(torch.compile(eager, dynamic=False), passes))
        else:
            skipped["compiled"] = "its time was up (--compile-seconds)"
    else:
        skipped["eager"] = "on a CPU it is what runs anyway"
        skipped["compiled"] = "not on a CPU, where it takes a C++ compiler and minutes"
        if operation.name in PUBLISHED:
            found["published"] = Contestant(run(PUBLISHED[operation.name], passes))
        references = ["published" if operation.name in PUBLISHED else plain]
    if operation.name in LIGER:
        found["Liger"] = Contestant(run(LIGER[operation.name], passes))
    return found, references, skipped


def rotation(operation: Operation, passes: str, bench: Bench) -> Iterator[Inputs]:
    """Sets of inputs, turn by turn: together larger than the cache, so that each comes from memory."""
    first = Inputs(operation, passes, bench)
    wanted = math.ceil(4 * bench.cache_bytes / first.nbytes)
    sets = [first, *(Inputs(operation, passes, bench) for _ in range(min(wanted, MOST_SETS) - 1))]
    return itertools.cycle(sets)


CASES = [(operation, passes) for operation in OPERATIONS for passes in operation.passes]


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("operation", "passes"), CASES, ids=[f"{o.name} {p}" for o, p in CASES])
def test_operation(operation: Operation, passes: str, bench: Bench, guard: Guard) -> None:
    error, disagreement = accuracy(operation, passes, bench.sizes, Source(bench.device, bench.dtype))
    rivals, references, skipped = rivals_of(operation, passes, bench)
    inputs = rotation(operation, passes, bench)
    race = Race(run(lambda *arguments: operation.call(ops, *arguments), passes), rivals, inputs)
    race.warm_up()
    if "compiled" in rivals:
        bench.compile_seconds -= rivals["compiled"].warm_up_seconds
    name = f"{operation.name} {passes}"
    row = guard.measure(
        name,
        race,
        references=references,
        error=error,
        bound=ERROR[bench.dtype],
        disagreement=disagreement,
        disagreement_bound=DISAGREEMENT[bench.dtype],
        seconds=bench.seconds,
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
        "skipped": skipped,
    }
    row["targets"] = list(verdicts(row)) if bench.sizes == XXL else []
    guard.judge(row)


def amounts(operation: Operation, bench: Bench) -> tuple[tuple[int, int], tuple[int, int]]:
    return operation.bytes_moved(bench.sizes, bench.dtype.itemsize), operation.flops(bench.sizes)
