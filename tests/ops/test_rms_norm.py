"""RMSNorm against its formula, gradients by gradcheck, Triton against float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from fused import DEVICE, DTYPES, assert_fused_accurate, misaligned, strided

from vapi_fast import ops


@pytest.mark.parametrize("shape", [(4,), (2, 63), (3, 1, 65), (0, 4)])
def test_rms_norm_is_its_formula(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    expected = x / ((x * x).sum(-1, keepdim=True) / shape[-1] + 1e-3).sqrt() * weight
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-3), expected)
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-3), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_accuracy(dtype: torch.dtype) -> None:
    assert_accurate(ops.rms_norm, [torch.randn(3, 5, 63), 1 + 0.1 * torch.randn(63)], dtype)


def test_rms_norm_multiplies_the_weight_after_the_cast_back() -> None:
    x, weight = torch.randn(9, 65).bfloat16(), torch.randn(65)
    normed = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert torch.equal(ops.rms_norm(x, weight), normed.bfloat16() * weight)
    assert torch.equal(ops.rms_norm(x, weight.bfloat16()), normed.bfloat16() * weight.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (63, 100), (3, 65, 192), (2, 2, 2, 1000), (4, 2), (577, 64)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_fused_accurate(ops.rms_norm, [torch.randn(shape), 1 + 0.1 * torch.randn(shape[-1])], dtype)


@pytest.mark.parametrize("change", [misaligned, strided, lambda x: x.transpose(0, 1), lambda x: x[:, 1:, 3:]])
def test_rms_norm_of_any_strides(change: object) -> None:
    x = change(torch.randn(5, 7, 96))
    assert_fused_accurate(ops.rms_norm, [x, torch.randn(x.shape[-1])], torch.float32)


def test_rms_norm_promotes(backend: str) -> None:
    x, weight = torch.randn(9, 65, device=DEVICE).bfloat16(), torch.randn(65, device=DEVICE)
    assert ops.rms_norm(x, weight).dtype == torch.float32
    assert ops.rms_norm(x, weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.gpu  # the interpreter truncates where hardware rounds to bfloat16
def test_rms_norm_rounds_before_the_weight() -> None:
    x, weight = torch.randn(9, 65, device=DEVICE).bfloat16(), torch.randn(65, device=DEVICE)
    fused = ops.rms_norm(x, weight)
    with ops.use_backend("reference"):
        expected = ops.rms_norm(x, weight)
    assert (fused == expected).float().mean() > 0.99


def test_empty_batch_zero_rows_and_nan(backend: str) -> None:
    one = torch.ones(8, device=DEVICE, requires_grad=True)
    out = ops.rms_norm(torch.empty(0, 8, device=DEVICE), one)
    out.sum().backward()
    assert out.shape == (0, 8)
    assert one.grad.tolist() == [0.0] * 8
    assert ops.rms_norm(torch.zeros(2, 8, device=DEVICE), one).tolist() == [[0.0] * 8] * 2
    x = torch.randn(2, 8, device=DEVICE)
    x[1, 0] = torch.nan
    assert ops.rms_norm(x, one).isnan().all(-1).tolist() == [False, True]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"rms_norm: weight must be floating \[D\] with D=4, got float32 \[6\]"):
        ops.rms_norm(torch.zeros(2, 6, 4, 4), torch.zeros(6))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_production_sizes(dtype: torch.dtype) -> None:
    assert_fused_accurate(ops.rms_norm, [torch.randn(16, 577, 1536), torch.randn(1536)], dtype)
