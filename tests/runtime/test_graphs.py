"""Chunks of fixed size: what the function is given, what comes back, and (on a GPU) that replays see new inputs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from vapi_fast.runtime.graphs import Replayed, convolutions_tried, graph_pool


class Recorder:
    """x, y → (2·x, sums of y's rows), noting the shapes it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        assert len(x) == len(y)
        self.shapes.append(tuple(x.shape))
        return 2 * x, y.sum(1)


@pytest.mark.parametrize(
    ("rows", "chunk", "chunks", "size"), [(8, 4, 2, 4), (10, 4, 3, 4), (9, 4, 3, 3), (3, 64, 1, 3), (5, 1, 5, 1)]
)
def test_chunks_have_one_size_and_lose_nothing(rows: int, chunk: int, chunks: int, size: int) -> None:
    recorder = Recorder()
    x, y = torch.randn(rows, 3, 2), torch.randn(rows, 5)
    doubled, sums = Replayed(recorder)(x, y, chunk=chunk)
    assert recorder.shapes == [(size, 3, 2)] * chunks
    assert torch.equal(doubled, 2 * x)
    assert torch.equal(sums, y.sum(1))


def test_one_result_and_memory_format() -> None:
    x = torch.randn(5, 4, 6, 6).to(memory_format=torch.channels_last)
    out = Replayed(lambda rows: rows + 1)(x, chunk=2)
    assert torch.equal(out, x + 1)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_filling_rows_are_real_ones() -> None:
    """A row of zeros could make a NaN, or slow a kernel down; the last row is as good as any."""
    given: list[Tensor] = []
    x = torch.rand(5, 2) + 1
    Replayed(lambda rows: given.append(rows) or rows)(x, chunk=3)
    assert torch.equal(given[1], torch.stack([x[3], x[4], x[4]]))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("tried", [False, True])
def test_algorithms_are_tried_for_a_recording_alone(before: bool, tried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    with convolutions_tried(tried):
        assert torch.backends.cudnn.benchmark == (before or tried)
    assert torch.backends.cudnn.benchmark == before


def test_no_gradient_and_no_autocast() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = Replayed(lambda rows: rows @ weight)(x, chunk=4)
    assert out.dtype == torch.float32
    assert not out.requires_grad
    torch.testing.assert_close(out, x @ weight.detach())


def test_wrong_rows() -> None:
    function = Replayed(Recorder())
    with pytest.raises(ValueError, match=r"the same number of rows, at least 1, got \[3, 4\]"):
        function(torch.zeros(3, 1), torch.zeros(4, 1), chunk=2)
    with pytest.raises(ValueError, match=r"at least 1, got \[0, 0\]"):
        function(torch.zeros(0, 1), torch.zeros(0, 1), chunk=2)


def test_pool_on_a_cpu() -> None:
    assert graph_pool(torch.device("cpu")) is None


# ---- on a GPU


@pytest.mark.gpu
def test_replays_see_new_inputs_and_share_a_pool() -> None:
    pool = graph_pool(torch.device("cuda"))
    recorder = Recorder()
    doubling, rooting = Replayed(recorder, pool), Replayed(lambda x: (x.square() + 1).sqrt(), pool)
    earlier = []
    for seed in range(4):
        torch.manual_seed(seed)
        x, y = torch.randn(10, 3, 2, device="cuda"), torch.randn(10, 5, device="cuda")
        (doubled, sums), roots = doubling(x, y, chunk=4), rooting(x, chunk=5)
        earlier.append((x, y, doubled, sums, roots))
    assert recorder.shapes == [(4, 3, 2)] * 2  # one warm-up, one recording
    for x, y, doubled, sums, roots in earlier:  # results stay as they were through later replays
        assert torch.equal(doubled, 2 * x)
        torch.testing.assert_close(sums, y.sum(1))
        torch.testing.assert_close(roots, (x.square() + 1).sqrt())


@pytest.mark.gpu
def test_another_shape_is_another_recording() -> None:
    recorder = Recorder()
    doubling = Replayed(recorder)
    for rows in (10, 3, 10, 3):
        x = torch.randn(rows, 3, 2, device="cuda")
        assert torch.equal(doubling(x, x[:, :, 0], chunk=4)[0], 2 * x)
    assert recorder.shapes == [(4, 3, 2)] * 2 + [(3, 3, 2)] * 2


WAITS = """
import torch
from vapi_fast.runtime.graphs import Replayed

def waits(x):
    return x * float(x.sum().item())

Replayed(waits)(torch.ones(4, 2, device="cuda"), chunk=4)
"""


@pytest.mark.gpu
def test_a_function_that_waits_cannot_be_recorded() -> None:
    """In a process of its own: a recording that failed may leave the device unusable."""
    ended = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "CaptureError: waits([4, 2] torch.float32) cannot be recorded as a CUDA graph" in ended.stderr
