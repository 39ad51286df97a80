"""Dropout against a loop, exactly; its share, its independence of batch and backend, and its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused import DEVICE, DTYPES, assert_fused_accurate, misaligned, strided

from vapi_fast import ops
from vapi_fast.reference import philox
from vapi_fast.reference.philox import DROPOUT, seed_key


def naive_mask(shape: tuple[int, int, int], p: float, seed: int, site: int, ids: list[int]) -> torch.Tensor:
    batch, length, width = shape
    columns = -(-width // 8)
    dropped = torch.zeros(shape, dtype=torch.bool)
    for b in range(batch):
        for t in range(length):
            for d in range(width):
                words = philox(((length - 1 - t) * columns + d % columns, site, ids[b], DROPOUT), seed_key(seed))
                half = d // columns
                dropped[b, t, d] = (words[half // 2] >> 16 * (half % 2)) % 2**16 / 2**16 < p
    return dropped


@pytest.mark.parametrize("width", [1, 7, 8, 9, 24])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_dropout_against_a_loop(width: int, p: float, backend: str) -> None:
    x, ids = torch.randn(3, 5, width, device=DEVICE), torch.tensor([2, 2**33 + 1, 0], device=DEVICE)
    y = ops.dropout(x, p, seed=-9, site=4, sample_ids=ids)
    dropped = naive_mask((3, 5, width), p, -9, 4, [2, 1, 0]).to(DEVICE)
    torch.testing.assert_close(y, torch.where(dropped, 0.0, x / (1 - p)))
    assert (y[dropped] == 0).all()


def test_the_share_that_is_dropped_and_independent_halves() -> None:
    """Of 64 columns, among them the eight that share a counter, no two go together; nor do sites, samples or seeds."""
    masks = [ops.dropout(torch.ones(8, 512, 64), 0.1, seed=seed, site=site).eq(0) for seed in (0, 1) for site in (0, 1)]
    count = masks[0].numel()
    for mask in masks:
        assert mask.double().mean().item() == pytest.approx(0.1, abs=4 * (0.09 / count) ** 0.5)
    correlations = torch.corrcoef(masks[0].flatten(0, 1).T.double()) - torch.eye(64)
    assert correlations.abs().max() < 5 / 4096**0.5
    streams = torch.stack([mask.flatten() for mask in masks] + [masks[0].roll(1, 0).flatten()]).double()
    assert (torch.corrcoef(streams) - torch.eye(5)).abs().max() < 5 / count**0.5


def test_an_element_s_fate_depends_on_neither_batch_nor_backend() -> None:
    x, ids = torch.randn(4, 9, 40, device=DEVICE), torch.tensor([9, 2, 30, 5], device=DEVICE)
    with ops.use_backend("reference"):
        whole = ops.dropout(x, 0.3, seed=1, site=2, sample_ids=ids)
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            one = ops.dropout(x[2:3], 0.3, seed=torch.tensor(1, device=DEVICE), site=2, sample_ids=ids[2:3])
            later = ops.dropout(x[:, 4:], 0.3, seed=1, site=2, sample_ids=ids)
        assert torch.equal(one == 0, whole[2:3] == 0)
        assert torch.equal(later == 0, whole[:, 4:] == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 63, 100), (3, 65, 192), (5, 2, 1001)])
def test_value_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_fused_accurate(lambda x: ops.dropout(x, 0.1, seed=3, site=7), [torch.randn(shape)], dtype)


@pytest.mark.parametrize("change", [misaligned, strided, lambda x: x.transpose(0, 1), lambda x: x[:, 1:, 3:]])
def test_any_strides(change: Any) -> None:
    assert_fused_accurate(lambda x: ops.dropout(x, 0.5, seed=0), [change(torch.randn(5, 7, 96))], torch.float32)


def test_gradients_by_differences() -> None:
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.dropout(x, 0.4, seed=1), (x,))


def test_opcheck() -> None:
    x, seed = torch.randn(2, 5, 12, device=DEVICE, requires_grad=True), torch.tensor(1, device=DEVICE)
    for ids in (None, torch.arange(2, device=DEVICE)):
        torch.library.opcheck(torch.ops.vapi_fast.dropout.default, (x, 0.3, 2, seed, ids))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"p must be in \[0, 1\), got 1", lambda x: ops.dropout(x, 1, seed=0)),
        (TypeError, r"x must be floating \[B, T, D\]", lambda x: ops.dropout(x.long(), 0.1, seed=0)),
        (ValueError, r"site must be an int >= 0, got -1", lambda x: ops.dropout(x, 0.1, seed=0, site=-1)),
        (
            ValueError,
            r"sample_ids must be int64 \[B\]",
            lambda x: ops.dropout(x, 0.1, seed=0, sample_ids=torch.arange(3)),
        ),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=f"^dropout: {message}"):
        call(torch.zeros(2, 3, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_production_sizes(dtype: torch.dtype) -> None:
    assert_fused_accurate(lambda x: ops.dropout(x, 0.1, seed=3, site=7), [torch.randn(16, 577, 1536)], dtype)
