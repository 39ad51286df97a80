"""One fault of each kind that the rehearsal is there to find, planted: what is not found here would not be anywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vapi_fast import ops
from vapi_fast.kernels.launch import launch
from vapi_fast.kernels.rms_norm import rms_norm_forward_kernel
from vapi_fast.runtime.graphs import RecordedGraph

from .watch import Watch


def on_gpu(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def recorded(function: Callable[[Tensor], object]) -> None:
    def body(x: Tensor) -> Tensor:
        function(x)
        return x + 1

    RecordedGraph(body, (on_gpu(3),), None)


def escaping() -> list[Tensor]:
    """A tensor made in a capture that somebody keeps."""
    kept: list[Tensor] = []
    recorded(lambda x: kept.append(x * 2))
    return kept


def wrong_fake(watch: Watch) -> None:
    def planted(x: Tensor) -> Tensor:
        return x.new_empty(2, 3)

    def fake(x: Tensor) -> Tensor:
        return x.new_empty(3, 2)

    operator = torch.library.custom_op("vapi_fast::planted", planted, mutates_args=(), schema="(Tensor x) -> Tensor")
    operator.register_fake(fake)
    watch.operators[operator._qualname] = operator
    operator(on_gpu(3))


def launched(grid: tuple[int, ...], x: Tensor, rows: int = 1) -> None:
    launch(
        rms_norm_forward_kernel, grid, x, None, x, None, x, rows, 3, 3, 0, 1e-5, BLOCK_D=4, BLOCK_ROWS=1, num_warps=1
    )


def replayed_in_a_capture() -> None:
    inner = RecordedGraph(torch.neg, (on_gpu(3),), None)
    recorded(lambda x: inner.graph.replay())


# Kind of finding → what brings it about.
FAULTS: dict[str, Callable[[Watch], object]] = {
    "fails": lambda watch: ops.rms_norm(on_gpu(2, 3).double(), on_gpu(3).double()),
    "mixed devices": lambda watch: on_gpu(3) + torch.randn(3),
    "host sync": lambda watch: on_gpu(3).sum().item(),
    "host sync in a capture": lambda watch: recorded(lambda x: x.sum().item()),
    "blocking copy": lambda watch: torch.randn(3).to("cuda"),
    "blocking copy in a capture": lambda watch: recorded(lambda x: x.cpu()),
    "synchronisation": lambda watch: torch.cuda.synchronize(),
    "synchronisation in a capture": lambda watch: recorded(lambda x: torch.cuda.current_stream().synchronize()),
    "pinned memory in a capture": lambda watch: recorded(lambda x: torch.empty(3, pin_memory=True)),
    "event in a capture": lambda watch: recorded(lambda x: torch.cuda.Event().record()),
    "replay in a capture": lambda watch: replayed_in_a_capture(),
    "outlives its capture": lambda watch: escaping(),
    "layout": lambda watch: F.conv2d(on_gpu(1, 8, 9, 9), on_gpu(8, 8, 3, 3)),
    "fake differs": wrong_fake,
    "2³¹ elements or more": lambda watch: torch.empty(2**16, 2**15, device="cuda"),
    "grid": lambda watch: launched((1, 70_000), on_gpu(3)),
    "kernel argument off the device": lambda watch: launched((1,), torch.randn(3)),
}


def play(watch: Watch) -> list[str]:
    """The kinds of fault that were not found."""
    missed = []
    for kind, fault in FAULTS.items():
        kept = None
        with watch.during(kind), watch.steps():
            kept = fault(watch)
        del kept
        found = {finding.kind for finding in watch.findings if finding.scene == kind}
        print(f"planted: {kind}; found: {', '.join(sorted(found)) or 'nothing'}", flush=True)
        if kind not in found:
            missed.append(kind)
    watch.findings.clear()
    return missed
