"""RMSNorm and GroupNorm+SiLU on Triton against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from fused import DEVICE, DTYPES, assert_fused_accurate, misaligned, strided
from torch import Tensor

from vapi_fast import ops


def image(*shape: int) -> Tensor:
    return (3 + 2 * torch.randn(shape)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (63, 100), (3, 65, 192), (2, 2, 2, 1000), (4, 2), (577, 64)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_fused_accurate(ops.rms_norm, [torch.randn(shape), 1 + 0.1 * torch.randn(shape[-1])], dtype)


@pytest.mark.parametrize("change", [misaligned, strided, lambda x: x.transpose(0, 1), lambda x: x[:, 1:, 3:]])
def test_rms_norm_of_any_strides(change: object) -> None:
    x = change(torch.randn(5, 7, 96))
    assert_fused_accurate(ops.rms_norm, [x, torch.randn(x.shape[-1])], torch.float32)


def test_rms_norm_promotes() -> None:
    x, weight = torch.randn(9, 65, device=DEVICE).bfloat16(), torch.randn(65, device=DEVICE)
    with ops.use_backend("triton"):
        assert ops.rms_norm(x, weight).dtype == torch.float32
        assert ops.rms_norm(x, weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.gpu  # the interpreter truncates where hardware rounds to bfloat16
def test_rms_norm_rounds_before_the_weight() -> None:
    x, weight = torch.randn(9, 65, device=DEVICE).bfloat16(), torch.randn(65, device=DEVICE)
    fused = ops.rms_norm(x, weight)
    with ops.use_backend("reference"):
        expected = ops.rms_norm(x, weight)
    assert (fused == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 24, 9, 11), 8), ((1, 6, 5, 7), 3), ((3, 5, 3, 3), 1), ((2, 32, 1, 63), 32)]
)
def test_group_norm_silu(shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype) -> None:
    inputs = [image(*shape), 1 + 0.1 * torch.randn(shape[1]), torch.randn(shape[1])]
    assert_fused_accurate(lambda *t: ops.group_norm_silu(*t, groups, 1e-6), inputs, dtype)


@pytest.mark.parametrize("split", [slice(0, 2), slice(2, 4)])
def test_group_norm_silu_over_several_splits_of_the_pixels(split: slice) -> None:
    x = image(4, 512, 12, 13)[split]
    out = assert_fused_accurate(
        lambda *t: ops.group_norm_silu(*t, 32, 1e-6), [x, torch.randn(512), torch.randn(512)], torch.float32
    )
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_group_norm_silu_with_a_mean_far_from_zero() -> None:
    inputs = [300 + image(1, 8, 16, 16), torch.randn(8), torch.randn(8)]
    assert_fused_accurate(lambda *t: ops.group_norm_silu(*t, 4, 1e-6), inputs, torch.float32, gradients=False)


def test_group_norm_silu_keeps_the_memory_format() -> None:
    x, affine = image(2, 8, 5, 6).contiguous(), torch.randn(8)
    out = assert_fused_accurate(lambda *t: ops.group_norm_silu(*t, 4, 1e-6), [x, affine, affine], torch.float32)
    assert out.is_contiguous()


@pytest.mark.parametrize("name", ["rms_norm", "group_norm_silu"])
def test_empty_batch(name: str) -> None:
    affine = torch.randn(8, device=DEVICE, requires_grad=True)
    with ops.use_backend("triton"):
        if name == "rms_norm":
            out = ops.rms_norm(torch.empty(0, 8, device=DEVICE), affine)
        else:
            out = ops.group_norm_silu(torch.empty(0, 8, 3, 3, device=DEVICE), affine, affine, 4, 1e-6)
        out.sum().backward()
    assert out.shape[0] == 0
    assert affine.grad.tolist() == [0.0] * 8


def test_zero_rows_equal_pixels_and_nan() -> None:
    with ops.use_backend("triton"):
        one = torch.ones(8, device=DEVICE)
        assert ops.rms_norm(torch.zeros(2, 8, device=DEVICE), one).tolist() == [[0.0] * 8] * 2
        x = torch.randn(2, 8, device=DEVICE)
        x[1, 0] = torch.nan
        assert ops.rms_norm(x, one).isnan().all(-1).tolist() == [False, True]
        flat = torch.full((1, 8, 4, 4), 7.0, device=DEVICE)
        torch.testing.assert_close(
            ops.group_norm_silu(flat, one, one, 4, 1e-6), torch.full_like(flat, 0.731058578), rtol=1e-6, atol=1e-6
        )
        flat[0, 0, 0, 0] = torch.nan
        assert ops.group_norm_silu(flat, one, one, 4, 1e-6).isnan().all((2, 3)).tolist() == [[True] * 2 + [False] * 6]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_production_sizes(dtype: torch.dtype) -> None:
    assert_fused_accurate(ops.rms_norm, [torch.randn(16, 577, 1536), torch.randn(1536)], dtype)
    for channels, size in ((128, 384), (256, 192), (512, 24)):
        inputs = [image(4, channels, size, size), torch.randn(channels), torch.randn(channels)]
        assert_fused_accurate(lambda *t: ops.group_norm_silu(*t, 32, 1e-6), inputs, dtype)
