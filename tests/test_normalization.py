"""GroupNorm with SiLU and RMSNorm against the formulas written out, gradients by gradcheck."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate

from vapi_fast import ops


@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 5, 7), 3), ((1, 4, 1, 63), 4), ((3, 5, 3, 3), 1)])
def test_group_norm_silu(shape: tuple[int, int, int, int], groups: int) -> None:
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    weight, bias = (torch.randn(shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = ops.group_norm_silu(x, weight, bias, groups, 1e-2)
    for b in range(shape[0]):
        for c in range(shape[1]):
            size = shape[1] // groups
            group = x[b, c // size * size : (c // size + 1) * size]
            variance = (group - group.mean()).square().mean()
            normed = (x[b, c] - group.mean()) / (variance + 1e-2).sqrt() * weight[c] + bias[c]
            torch.testing.assert_close(out[b, c], normed / (1 + (-normed).exp()))
    assert torch.autograd.gradcheck(lambda *t: ops.group_norm_silu(*t, groups, 1e-2), (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_group_norm_silu_accuracy(dtype: torch.dtype) -> None:
    inputs = [1 + torch.randn(2, 32, 9, 9), 1 + 0.1 * torch.randn(32), torch.randn(32)]
    assert_accurate(lambda x, weight, bias: ops.group_norm_silu(x, weight, bias, 8, 1e-6), inputs, dtype)


def test_group_norm_silu_keeps_channels_last_and_dtype() -> None:
    x, affine = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last), torch.randn(8)
    out = ops.group_norm_silu(x, affine, affine, 4, 1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, ops.group_norm_silu(x.contiguous(), affine, affine, 4, 1e-6))
    assert ops.group_norm_silu(x.bfloat16(), affine, affine, 4, 1e-6).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(4,), (2, 63), (3, 1, 65), (0, 4)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
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


def test_zero_rows_and_nan() -> None:
    assert ops.rms_norm(torch.zeros(2, 8), torch.ones(8)).tolist() == [[0.0] * 8] * 2
    x = torch.randn(2, 8)
    x[1, 0] = torch.nan
    assert ops.rms_norm(x, torch.ones(8)).isnan().all(-1).tolist() == [False, True]


def test_bad_arguments() -> None:
    x, affine = torch.zeros(2, 6, 4, 4), torch.zeros(6)
    with pytest.raises(ValueError, match="group_norm_silu: groups must divide x's 6 channels, got 4"):
        ops.group_norm_silu(x, affine, affine, 4, 1e-6)
    with pytest.raises(ValueError, match=r"group_norm_silu: bias must be floating \[C\] with C=6, got float32 \[5\]"):
        ops.group_norm_silu(x, affine, affine[:5], 3, 1e-6)
    with pytest.raises(ValueError, match="eps must be positive and finite, got 0"):
        ops.group_norm_silu(x, affine, affine, 3, 0)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be floating \[D\] with D=4, got float32 \[6\]"):
        ops.rms_norm(x, affine)
