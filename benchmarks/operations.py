"""An operation against plain PyTorch, torch.compile and what others offer: time, share of the ceiling, memory, error.

`bench_<stem>.py` has the operations of a stem, their rivals and bounds. On a GPU at XXL sizes in bf16 on Triton, held
to the fastest of plain PyTorch's forms; on a CPU, where our own path is plain PyTorch too, at small sizes to the
published G-fold form, and where there is none to what a user would write. Times are medians on the device's own clock,
the contestants in turns; `extra_info` has all the figures.

Exactness is that of one image of the batch that is timed, beside the plain form in float64 or, where the operation
draws, a form with the same random words. These come from our generator, which the tests hold to its published answers.
On a GPU batches of two to sixteen images at these widths are held to float64 by the tests named `…production_size…`,
which `gpu_check.sh` runs before; what treats each sequence, group or token alone (`append_to_cache`,
`group_advantages`, `noisy_prefix`) is tested at small sizes only.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from baseline import EQUAL
from cases import BY_NAME, SEED, XXL, Case, Sizes, Source, changed, tensors
from race import OURS, Contestant, Race
from torch import Tensor

from vapi_fast import ops, reference
from vapi_fast.reference.philox import philox

if TYPE_CHECKING:
    from conftest import Bench, Guard

STEMS = (
    "group_sample",
    "losses",
    "noisy_prefix",
    "codebook",
    "straight_through",
    "perceptual",
    "bias_add",
    "group_norm",
    "convolution",
    "rms_norm",
    "dropout",
    "rotary_swiglu",
    "attention",
)
FORWARD, BOTH = "forward", "forward+backward"
ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative L2 against float64
DISAGREEMENT = {torch.float32: 0.0, torch.bfloat16: 1e-2}  # share of indices that may differ from float64's
MOST_SETS = 16


@dataclass(frozen=True)
class Operation:
    """name: of its case. plain: name and call of what a user would write, which shares nothing with `vapi_fast`.

    bytes_moved, flops: `(sizes, bytes of an element)` → those of the forward and those that the backward adds. Bytes
    are the least that device memory must see: each input read once, each output written once; GroupNorm's map and
    the inputs of its backward twice, as the statistics of a group come first and do not fit on the chip.
    drawn: the plain form with our random words. liger: Liger-Kernel's form. All forms take the case's inputs by
    position; their results are ours, or the first of them. forward: measure that pass alone, too.
    targets: what it should reach on an H100 at XXL sizes, by pass, each a kind and a limit: "ms" at most; "share" of
    the governing ceiling (copy or matrix product) at least; "gemms": time at most that multiple of four products of the
    head's size; "memory" beyond the inputs at most that part of eager's.
    """

    name: str
    plain: tuple[str, Callable[..., Any]]
    bytes_moved: Callable[[Sizes, int], tuple[int, int]]
    flops: Callable[[Sizes], tuple[int, int]] = lambda s: (0, 0)
    drawn: Callable[..., Any] | None = None
    liger: Callable[..., Any] | None = None
    forward: bool = True
    targets: dict[str, list[tuple[str, float]]] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        return BY_NAME[self.name]

    @property
    def passes(self) -> list[str]:
        return [FORWARD] * self.forward + [BOTH] * bool(self.case.gradients)


def share(limit: float, *passes: str) -> dict[str, list[tuple[str, float]]]:
    return {each: [("share", limit)] for each in passes or (FORWARD,)}


def every_operation() -> list[Operation]:
    return [each for stem in STEMS for each in importlib.import_module(f"bench_{stem}").OPERATIONS]


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- exactness


def words(images: int, length: int, third: Tensor | int, operation: int, device: torch.device) -> tuple[Tensor, ...]:
    """Four random words for each image, position and `third` counter."""
    image, t = torch.arange(images, device=device), torch.arange(length, device=device)
    return philox((t[:, None], third, image[:, None, None], operation), (SEED, 0))


def relative(mine: Tensor, right: Tensor) -> float:
    """Relative L2 error; NaN where anything is, infinite where it ought to be zero and is not."""
    if mine.shape != right.shape:
        return math.inf
    return 0.0 if torch.equal(mine.double(), right) else ((mine.double() - right).norm() / right.norm()).item()


def accuracy(operation: Operation, passes: str, sizes: Sizes, source: Source, images: int = 1) -> tuple[float, float]:
    """Greatest relative L2 error of results and gradients, and share of indices that differ, for `images` of a batch.

    Where indices differ, so do the values that belong to them: those are left out.
    """
    case = operation.case
    inputs = case.inputs(sizes.of(images), source)
    exact = changed(inputs, lambda x: x.double() if x.is_floating_point() else x.clone())
    (low, low_leaves), (high, high_leaves) = case.differentiable(inputs), case.differentiable(exact)
    form = operation.drawn or operation.plain[1]
    with torch.set_grad_enabled(passes == BOTH):
        found, expected = list(tensors(case.call(ops, low))), list(tensors(form(*high.values())))
    pairs = list(zip(found, expected, strict=True))
    agree = [mine == right for mine, right in pairs if not right.is_floating_point()]
    errors = []
    for mine, right in pairs:
        if right.is_floating_point():
            for mask in agree:
                mask = mask[..., None] if mask.ndim == right.ndim - 1 > 0 else mask
                mine, right = mine * mask, right * mask
            errors.append(relative(mine, right))
    if passes == BOTH:
        mine, right = map(differentiable_result, (found, expected))
        direction = torch.randn_like(mine, requires_grad=False)
        gradients = torch.autograd.grad(mine, low_leaves, direction)
        wanted = torch.autograd.grad(right, high_leaves, direction.double())
        errors += map(relative, gradients, wanted)
    worst = max(errors, key=lambda each: math.inf if math.isnan(each) else each, default=0.0)
    return worst, max((1 - each.double().mean().item() for each in agree), default=0.0)


def differentiable_result(results: Any) -> Tensor:
    (result,) = [each for each in tensors(results) if each.requires_grad]
    return result


# ---- speed


class Inputs:
    """One set of arguments, plain for a forward, and as leaves with a gradient to start from for a backward."""

    def __init__(self, case: Case, passes: str, bench: Bench) -> None:
        self.plain = case.inputs(bench.sizes, Source(bench.device, bench.dtype))
        self.marked, self.leaves = case.differentiable(self.plain)
        if passes == BOTH:
            self.direction = torch.randn_like(differentiable_result(case.call(ops, self.marked)).detach())


def run(call: Callable[[dict[str, Any]], Any], passes: str) -> Callable[[Inputs], Any]:
    """A pass of `call` over a set of inputs."""
    if passes != BOTH:
        return torch.no_grad()(lambda inputs: call(inputs.plain))

    def both(inputs: Inputs) -> tuple[Tensor, ...]:
        result = differentiable_result(call(inputs.marked))
        return torch.autograd.grad(result, inputs.leaves, inputs.direction.to(result.dtype))

    return both


def rivals_of(
    operation: Operation, passes: str, bench: Bench
) -> tuple[dict[str, Contestant], list[str], dict[str, str]]:
    """The other implementations, those of them that ours is held to, and why some are left out."""
    from published import PUBLISHED  # it builds on plain forms of bench_<stem>.py

    torch.compiler.reset()  # all are compiled from the one function below, and it allows so many versions only

    def contestant(form: Callable[..., Any]) -> Contestant:
        return Contestant(run(lambda inputs: form(*inputs.values()), passes))

    def eager(inputs: dict[str, Any]) -> Any:
        return operation.case.call(reference, inputs)

    (plain, form), published = operation.plain, PUBLISHED.get(operation.name)
    found, references, skipped = {plain: contestant(form)}, [plain], {}
    if bench.device.type == "cuda":
        found["eager"] = Contestant(run(eager, passes))
        references.append("eager")
        if bench.compile_seconds > 0:
            found["compiled"] = Contestant(run(torch.compile(eager, dynamic=False), passes))
        else:
            skipped["compiled"] = "its time was up (--compile-seconds)"
    else:
        skipped["eager"] = "on a CPU it is what runs anyway"
        skipped["compiled"] = "not on a CPU, where it takes a C++ compiler and minutes"
        if published:
            found["published"], references = contestant(published), ["published"]
    if operation.liger and importlib.util.find_spec("liger_kernel"):  # a version that does not fit loses its turn
        found["Liger"] = contestant(operation.liger)
    return found, references, skipped


def rotation(inputs: Callable[[], Any], held: Callable[[Any], Any], cache_bytes: int, most: int) -> Iterator[Any]:
    """Sets of inputs, turn by turn: together they hold more than the cache does, so that each comes from memory."""
    first = inputs()
    wanted = math.ceil(4 * cache_bytes / sum(each.nbytes for each in tensors(held(first))))
    return itertools.cycle([first, *(inputs() for _ in range(min(wanted, most) - 1))])


def test_operation(operation: Operation, passes: str, bench: Bench, guard: Guard) -> None:
    """Each `bench_<stem>.py` has it; conftest.py gives it the operations of that file."""
    case, name = operation.case, f"{operation.name} {passes}"
    error, disagreement = accuracy(operation, passes, bench.sizes, Source(bench.device, bench.dtype))
    rivals, references, skipped = rivals_of(operation, passes, bench)
    inputs = rotation(lambda: Inputs(case, passes, bench), lambda each: each.plain, bench.cache_bytes, MOST_SETS)
    race = Race(run(lambda inputs: case.call(ops, inputs), passes), rivals, inputs)
    race.warm_up()
    if "compiled" in rivals:
        bench.compile_seconds -= rivals["compiled"].warm_up_seconds
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
    amounts = operation.bytes_moved(bench.sizes, bench.dtype.itemsize), operation.flops(bench.sizes)
    moved, flops = (sum(parts) if passes == BOTH else parts[0] for parts in amounts)
    floors = {"copy": moved / bench.ceilings.copy, "matmul": flops / bench.ceilings.matmul}
    bound = max(floors, key=floors.get)
    failed = {f"{name}, {n}": rival.failure for n, rival in rivals.items() if rival.failure is not None}
    row |= {
        "operation": operation.name,
        "pass": passes,
        "device": bench.name,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "sizes": dataclasses.asdict(bench.sizes),
        "ceilings": dataclasses.asdict(bench.ceilings),
        "host_seconds": race.ours.host_seconds,
        "peak_bytes": {n: each.peak_bytes for n, each in race.contestants.items() if each.failure is None},
        "bytes_moved": moved,
        "flops": flops,
        "bounded_by": bound,
        "share": floors[bound] / row["seconds"][OURS],
        "skipped": skipped | failed,
    }
    row["targets"] = list(verdicts(row, operation.targets.get(passes, []))) if bench.sizes == XXL else []
    guard.judge(row)


def verdicts(row: dict[str, Any], targets: list[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    """`{"target": text, "met": bool}` for a measured row; every row should beat its rivals."""
    own, peak = row["seconds"][OURS], row["peak_bytes"]
    for kind, limit in targets:
        if kind == "ms":
            yield {"target": f"{limit} ms", "met": 1e3 * own <= limit}
        elif kind == "share":
            yield {"target": f"{limit:.0%} of {row['bounded_by']}", "met": row["share"] >= limit}
        elif kind == "gemms":
            yield {"target": f"{limit} × 4 GEMMs", "met": own <= limit * 4 * XXL.gemm / row["ceilings"]["matmul"]}
        elif "eager" in peak:
            yield {"target": f"{limit:.0%} of eager's memory", "met": peak[OURS] <= limit * peak["eager"]}
    for name, seconds in row["seconds"].items():
        if name != OURS:
            yield {"target": f"not slower than {name}", "met": EQUAL * own <= seconds}
