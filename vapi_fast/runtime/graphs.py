"""A function called again and again at fixed shapes: on CUDA a captured graph, replayed chunk by chunk.

And one with gradients, of several stages, as a graph for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vapi_fast.ops.backends import backend_name
from vapi_fast.runtime.clock import Clock
from vapi_fast.runtime.errors import CaptureError
from vapi_fast.runtime.forms import form

Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Pool(NamedTuple):
    """Memory that graphs share. The allocator gives a block to its own stream alone, so all are recorded on one."""

    handle: tuple[int, int]
    stream: torch.cuda.Stream


class Replayed:
    """Calls a function of tensors on equal chunks of their rows and joins the results.

    On CUDA the function is recorded once for each shape and dtype of a chunk, and replayed: one launch instead of a few
    hundred. Elsewhere it is called, on the same chunks. It runs without gradient and outside autocast.

    function: of tensors whose rows (first dimension) belong together, to a tensor or a tuple of tensors with the same
        rows; a row's result depends on that row alone. To be recorded it must run the same kernels at every call: no
        result on the host (`.item()`, `if tensor`, `nonzero`), no copy from or to the host, no shape that depends on
        values, no other stream and no collective. What it reads besides its arguments, such as weights, is read
        where it was at the time of the recording: it must stay in place, and may change in value there.
    pool: memory of `graph_pool`, shared with other functions that never run at the same time as this one.
    """

    def __init__(self, function: Function, pool: Pool | None = None) -> None:
        self.function = function
        self.pool = pool
        self.recorded: dict[tuple, RecordedGraph] = {}

    def __call__(self, *inputs: Tensor, chunk: int) -> Tensor | tuple[Tensor, ...]:
        """Results for all rows of the inputs, at most `chunk` rows at a time; the caller's to keep.

        The chunks of a call have one size, the last one filled up with copies of its last row: so calls with the same
        number of rows share a recording.

        Raises:
            ValueError: inputs without a row, or with different numbers of rows.
            CaptureError: the function cannot be recorded.
        """
        counts = {len(each) for each in inputs}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"inputs must have the same number of rows, at least 1, got {[len(i) for i in inputs]}")
        count = counts.pop()
        size = -(-count // -(-count // chunk))
        parts = []
        for start in range(0, count, size):
            rows = min(size, count - start)
            results = self.run(*(filled(each[start : start + size], size) for each in inputs))
            parts.append([each[:rows] for each in (results if isinstance(results, tuple) else (results,))])
        joined = tuple(values[0] if len(values) == 1 else torch.cat(values) for values in zip(*parts, strict=True))
        return joined if isinstance(results, tuple) else joined[0]

    def run(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        device = inputs[0].device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if device.type != "cuda":
                return self.function(*inputs)
            key = backend_name(inputs[0]), *((each.shape, each.dtype, each.device) for each in inputs)
            if key not in self.recorded:
                self.recorded[key] = RecordedGraph(self.function, inputs, self.pool)
            return self.recorded[key].replay(inputs)


class RecordedGraph:
    """A function's kernels at one shape, with the buffers that they read and write."""

    def __init__(self, function: Function, examples: tuple[Tensor, ...], pool: Pool | None) -> None:
        self.inputs = [each.clone() for each in examples]
        self.graph = torch.cuda.CUDAGraph()
        name = getattr(function, "__qualname__", type(function).__qualname__)
        shapes = ", ".join(f"{list(each.shape)} {each.dtype}" for each in examples)
        device = examples[0].device
        with torch.cuda.device(device), convolutions_tried(form("cudnn-benchmark", device) == "on"):
            pool = pool or graph_pool(device)
            # The first call compiles kernels, chooses algorithms and creates handles: none of it can be recorded.
            with aside(pool):
                function(*self.inputs)
            with recorded(self.graph, pool, f"{name}({shapes})"):
                # Held from now on, so that no later graph of the same pool gets the results' memory.
                self.outputs = function(*self.inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Results for these inputs, in memory of their own: the graph's buffers are overwritten by the next replay."""
        for buffer, given in zip(self.inputs, inputs, strict=True):
            buffer.copy_(given)
        self.graph.replay()
        if isinstance(self.outputs, tuple):
            return tuple(each.clone() for each in self.outputs)
        return self.outputs.clone()


class RecordedStages:
    """The kernels of a function on tensors that stay where they are, a graph for each stage that it names.

    function: of a clock, under whose stages all of its kernels are launched. It has run before, in `aside` of the same
        pool, and keeps to what is said of `Replayed`'s; gradients may be computed, and added to tensors that are there.
    outputs: its results, which each replay overwrites.
    """

    def __init__(self, function: Callable[[Clock], Any], pool: Pool) -> None:
        self.pool = pool
        self.stages: list[tuple[str, torch.cuda.CUDAGraph]] = []
        self.outputs = function(self.record)

    @contextmanager
    def record(self, stage: str) -> Iterator[None]:
        graph = torch.cuda.CUDAGraph()
        with recorded(graph, self.pool, f"stage {stage!r}"):
            yield
        self.stages.append((stage, graph))

    def __call__(self, clock: Clock) -> Any:
        """`outputs`, computed again."""
        for stage, graph in self.stages:
            with clock(stage):
                graph.replay()
        return self.outputs


@contextmanager
def aside(pool: Pool | None) -> Iterator[None]:
    """Inside of the `with` block kernels are launched in the stream that a pool's graphs are recorded in."""
    if pool is None:  # without CUDA
        yield
        return
    pool.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(pool.stream):
        yield
    torch.cuda.current_stream().wait_stream(pool.stream)


@contextmanager
def recorded(graph: torch.cuda.CUDAGraph, pool: Pool, what: str) -> Iterator[None]:
    """Kernels launched inside of the `with` block become `graph`, and do not run. CaptureError says `what` cannot."""
    try:
        # Other threads (data loading, NCCL's watchdog) may call CUDA meanwhile: only this one is recorded.
        with torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local"):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CaptureError(f"{what} cannot be recorded as a CUDA graph: {error}") from error


@contextmanager
def convolutions_tried(tried: bool) -> Iterator[None]:
    """cuDNN's algorithms are chosen by trying them inside of the `with` block, if so or by whoever set it before.

    What was tried outside of a capture is found again inside of one, but only while this is on.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or tried
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def filled(rows: Tensor, size: int) -> Tensor:
    """`rows`, followed by copies of the last one up to `size` rows."""
    missing = size - len(rows)
    return rows if not missing else torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])


def graph_pool(device: torch.device) -> Pool | None:
    """Memory for the graphs of one pipeline, which then take as much as the largest needs; None without CUDA."""
    if device.type != "cuda":
        return None
    return Pool(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))


def idle_bytes(pool: Pool) -> int:
    """Memory of a pool in which graphs keep what they compute on the way: the allocator counts it as free."""
    segments = [each for each in torch.cuda.memory_snapshot() if each["segment_pool_id"] == pool.handle]
    return sum(each["total_size"] - each["allocated_size"] for each in segments)
