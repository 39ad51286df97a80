"""GroupNorm with SiLU, also of a residual stream, and RMSNorm against the formulas; gradients by gradcheck."""

from __future__ import annotations

import pytest
import torch
from accuracy import RELATIVE_L2, assert_accurate, relative_l2
from torch.nn import functional as F

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


@pytest.mark.parametrize("silu", [True, False])
def test_add_group_norm_silu(silu: bool) -> None:
    h, residual = torch.randn(2, 2, 6, 5, 7, dtype=torch.float64)
    weight, bias, channel_bias = torch.randn(3, 6, dtype=torch.float64)
    added, normed = ops.add_group_norm_silu(
        h, weight, bias, 3, 1e-2, residual=residual, channel_bias=channel_bias, silu=silu
    )
    expected = h + residual + channel_bias.view(1, 6, 1, 1)
    torch.testing.assert_close(added, expected)
    groups = expected.view(2, 3, -1)
    scaled = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-2).sqrt()
    affine = scaled.view(h.shape) * weight.view(1, 6, 1, 1) + bias.view(1, 6, 1, 1)
    torch.testing.assert_close(normed, affine / (1 + (-affine).exp()) if silu else affine)
    alone = ops.bias_group_norm_silu(h, channel_bias, weight, bias, 3, 1e-2)
    torch.testing.assert_close(
        alone, ops.add_group_norm_silu(h + channel_bias.view(1, 6, 1, 1), weight, bias, 3, 1e-2)[1]
    )


def test_phases_are_interleaved() -> None:
    channels, height, width = 3, 4, 5
    h, residual = torch.randn(2, 4 * channels, height + 1, width + 1), torch.randn(2, channels, 2 * height, 2 * width)
    one = torch.ones(channels)
    added, normed = ops.add_group_norm_silu(h, one, one, 3, 1e-6, residual=residual, phases=True)
    for y in range(2 * height):
        for x in range(2 * width):
            phase, i, j = 2 * (y % 2) + x % 2, y // 2, x // 2
            part = h[:, phase * channels : (phase + 1) * channels, i + y % 2, j + x % 2]
            assert torch.equal(added[:, :, y, x], part + residual[:, :, y, x])
    torch.testing.assert_close(normed, ops.group_norm_silu(added, one, one, 3, 1e-6))


def test_phases_are_those_of_an_upsampling_convolution() -> None:
    """Row by row: tap t of a 3×3 kernel on the doubled map falls on one of two rows, which phase a decides."""
    x, kernel = torch.randn(2, 5, 6, 7, dtype=torch.float64), torch.randn(4, 5, 3, 3, dtype=torch.float64)
    taps = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)  # [a, row, t]
    four = torch.einsum("ocst,ahs,bwt->abochw", kernel, taps, taps).flatten(0, 2)
    h, one = F.conv2d(x, four, padding=1), torch.ones(4, dtype=torch.float64)
    added, _ = ops.add_group_norm_silu(h, one, one, 4, 1e-6, phases=True)
    torch.testing.assert_close(added, F.conv2d(F.interpolate(x, scale_factor=2.0), kernel, padding=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_residual_stream_accuracy(dtype: torch.dtype) -> None:
    h, residual = (1 + torch.randn(2, 2, 32, 9, 9)).to(dtype)
    weight, bias, channel_bias = torch.randn(3, 32).to(dtype)
    options = {"residual": residual, "channel_bias": channel_bias}
    for found, arguments in (
        (ops.add_group_norm_silu(h, weight, bias, 8, 1e-6, **options), options),
        (ops.bias_group_norm_silu(h, channel_bias, weight, bias, 8, 1e-6), {"channel_bias": channel_bias}),
    ):
        wide = {name: value.double() for name, value in arguments.items()}
        expected = ops.add_group_norm_silu(h.double(), weight.double(), bias.double(), 8, 1e-6, **wide)
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected[1])]
        for mine, right in pairs:
            assert mine.dtype == dtype
            assert mine.is_contiguous(memory_format=torch.channels_last)
            assert relative_l2(mine, right) < RELATIVE_L2[dtype]


def test_the_norm_is_that_of_the_rounded_sum() -> None:
    h, one = torch.full((1, 4, 3, 3), 1000.0).bfloat16(), torch.ones(4).bfloat16()
    added, normed = ops.add_group_norm_silu(h, one, one, 2, 1e-6, channel_bias=one)
    assert added.unique().tolist() == [1000.0]
    torch.testing.assert_close(normed.float(), torch.full_like(h, 0.7311).float(), rtol=0.01, atol=0)


def test_no_gradient_is_refused_or_not_wanted() -> None:
    h, one = torch.randn(1, 4, 3, 3), torch.ones(4, requires_grad=True)
    calls = (
        lambda: ops.add_group_norm_silu(h, one, one, 2, 1e-6)[1],
        lambda: ops.bias_group_norm_silu(h, one.detach(), one, one, 2, 1e-6),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"_silu: has no gradient, and weight requires one: .* group_norm_silu"):
            call()
        with torch.no_grad():
            assert not call().requires_grad


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
    with pytest.raises(ValueError, match="add_group_norm_silu: h of four phases must have 4·C channels, got 6"):
        ops.add_group_norm_silu(x, affine, affine, 3, 1e-6, phases=True)
    with pytest.raises(ValueError, match=r"residual must be floating \[B, C, 2·H, 2·W\] .* 2·H=6, 2·W=6, got float32"):
        ops.add_group_norm_silu(torch.zeros(2, 24, 4, 4), affine, affine, 3, 1e-6, residual=x, phases=True)
    with pytest.raises(ValueError, match="bias_group_norm_silu: groups must divide C=6 channels, got 4"):
        ops.bias_group_norm_silu(x, affine, affine, affine, 4, 1e-6)
    with pytest.raises(ValueError, match="eps must be positive and finite, got 0"):
        ops.group_norm_silu(x, affine, affine, 3, 0)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be floating \[D\] with D=4, got float32 \[6\]"):
        ops.rms_norm(x, affine)
