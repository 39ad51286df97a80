"""A residual stream's sums and norms on Triton against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import RELATIVE_L2, relative_l2
from fused import DEVICE, DTYPES, assert_fused_accurate, misaligned
from torch import Tensor

from vapi_fast import ops


def maps(*shape: int) -> Tensor:
    return (3 + 2 * torch.randn(shape)).to(memory_format=torch.channels_last)


def assert_stream_accurate(
    dtype: torch.dtype, inputs: dict[str, Tensor], groups: int, *, phases: bool = False, silu: bool = True
) -> None:
    """Sum and norm of h and whatever else is given."""
    names = list(inputs)

    def stream(which: int) -> Callable[..., Tensor]:
        def call(*values: Tensor) -> Tensor:
            given = dict(zip(names, values, strict=True))
            options = {"phases": phases, "silu": silu}
            return ops.add_group_norm_silu(groups=groups, eps=1e-6, **given, **options)[which]

        return call

    for which in (0, 1):
        out = assert_fused_accurate(stream(which), list(inputs.values()), dtype, gradients=False)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)


def affine(channels: int) -> dict[str, Tensor]:
    return {"weight": 1 + 0.1 * torch.randn(channels), "bias": torch.randn(channels)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 24, 9, 11), 8), ((1, 6, 5, 7), 3), ((3, 5, 3, 3), 1), ((2, 32, 1, 63), 32)]
)
def test_block_ends(shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype) -> None:
    """The end of a residual block, of attention or of a block before it, and of the first convolution."""
    channels = shape[1]
    h, added = {"h": maps(*shape)} | affine(channels), {"residual": maps(*shape) - 6}
    channel_bias = {"channel_bias": torch.randn(channels)}
    assert_stream_accurate(dtype, h | added | channel_bias, groups)
    assert_stream_accurate(dtype, h | added, groups, silu=False)
    assert_stream_accurate(dtype, h | channel_bias, groups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 24, 5, 4), 8), ((1, 6, 3, 7), 3), ((3, 5, 1, 3), 1), ((1, 32, 2, 1), 4)]
)
def test_phases(shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype) -> None:
    batch, channels, height, width = shape
    inputs = {"h": maps(batch, 4 * channels, height + 1, width + 1)} | affine(channels)
    assert_stream_accurate(dtype, inputs | {"channel_bias": torch.randn(channels)}, groups, phases=True)
    inputs["residual"] = maps(batch, channels, 2 * height, 2 * width)
    assert_stream_accurate(dtype, inputs, groups, phases=True, silu=False)


def assert_bias_accurate(dtype: torch.dtype, h: Tensor, channel_bias: Tensor, groups: int) -> None:
    inputs = [h, channel_bias, *affine(len(channel_bias)).values()]
    out = assert_fused_accurate(lambda *t: ops.bias_group_norm_silu(*t, groups, 1e-6), inputs, dtype, gradients=False)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 24, 9, 11), 8), ((1, 6, 5, 7), 3), ((3, 5, 3, 3), 1), ((2, 32, 1, 63), 32)]
)
def test_bias_group_norm_silu(shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype) -> None:
    assert_bias_accurate(dtype, maps(*shape), 3 * torch.randn(shape[1]), groups)


@pytest.mark.parametrize("phases", [False, True])
def test_several_splits_of_the_pixels(phases: bool) -> None:
    inputs = {"h": maps(2, 1024, 6, 7) if phases else maps(2, 256, 10, 13)} | affine(256)
    shape = (2, 256, 10, 12) if phases else (2, 256, 10, 13)
    assert_stream_accurate(torch.float32, inputs | {"residual": maps(*shape)}, 32, phases=phases)


@pytest.mark.parametrize(
    "change",
    [misaligned, Tensor.contiguous, lambda x: x.transpose(2, 3), lambda x: x.repeat(1, 1, 2, 2)[..., ::2, ::2]],
)
def test_any_strides(change: Callable[[Tensor], Tensor]) -> None:
    plain = {"h": change(maps(2, 16, 5, 5)), "residual": change(maps(2, 16, 5, 5))} | affine(16)
    assert_stream_accurate(torch.float32, plain | {"channel_bias": torch.randn(32)[::2]}, 4)
    phases = {"h": change(maps(2, 16, 5, 5)), "residual": change(maps(2, 4, 8, 8))} | affine(4)
    assert_stream_accurate(torch.float32, phases, 2, phases=True)
    assert_bias_accurate(torch.float32, change(maps(2, 16, 5, 5)), torch.randn(32)[::2], 4)


def test_an_expanded_residual() -> None:
    h, one, row = maps(2, 8, 5, 6).to(DEVICE), torch.ones(8, device=DEVICE), torch.randn(8, 5, 6, device=DEVICE)
    with ops.use_backend("triton"):
        added, _ = ops.add_group_norm_silu(h, one, one, 4, 1e-6, residual=row.expand(2, -1, -1, -1))
    torch.testing.assert_close(added, h + row)


def test_a_mean_far_from_zero() -> None:
    inputs = {"h": 100 + maps(1, 8, 16, 16), "residual": 100 + maps(1, 8, 16, 16)} | affine(8)
    assert_stream_accurate(torch.float32, inputs | {"channel_bias": 50 + torch.randn(8)}, 4)
    assert_bias_accurate(torch.float32, 200 + maps(1, 8, 16, 16), 50 + torch.randn(8), 4)


def test_other_dtypes_of_residual_and_parameters() -> None:
    h, residual = maps(2, 8, 5, 6).to(DEVICE, torch.bfloat16), maps(2, 8, 5, 6).to(DEVICE)
    one = torch.rand(8, device=DEVICE)
    results = []
    for backend in ("triton", "reference"):
        with ops.use_backend(backend):
            results.append(ops.add_group_norm_silu(h, one, one, 4, 1e-6, residual=residual, channel_bias=one))
    for mine, right in zip(*results, strict=True):
        assert mine.dtype == right.dtype == torch.bfloat16
        assert relative_l2(mine, right) < RELATIVE_L2[torch.bfloat16]


def test_empty_batch() -> None:
    one = torch.ones(8, device=DEVICE)
    with ops.use_backend("triton"):
        assert ops.bias_group_norm_silu(torch.empty(0, 8, 3, 3, device=DEVICE), one, one, one, 4, 1e-6).numel() == 0
        h = torch.empty(0, 32, 3, 4, device=DEVICE)
        added, normed = ops.add_group_norm_silu(h, one, one, 4, 1e-6, phases=True)
    assert added.shape == normed.shape == (0, 8, 4, 6)


def test_equal_pixels_and_nan() -> None:
    one, flat = torch.ones(8, device=DEVICE), torch.full((1, 8, 4, 4), 7.0, device=DEVICE)
    expected = torch.full_like(flat, 0.731058578)
    with ops.use_backend("triton"):
        added, normed = ops.add_group_norm_silu(flat, one, one, 4, 1e-6, residual=flat, channel_bias=one)
        assert added.unique().tolist() == [15.0]
        torch.testing.assert_close(normed, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            ops.bias_group_norm_silu(flat, one, one, one, 4, 1e-6), expected, rtol=1e-6, atol=1e-6
        )
        with_nan = flat.clone()
        with_nan[0, 0, 1, 2] = torch.nan
        for norm in (
            ops.add_group_norm_silu(with_nan, one, one, 4, 1e-6)[1],
            ops.add_group_norm_silu(flat, one, one, 4, 1e-6, residual=with_nan)[1],
            ops.bias_group_norm_silu(with_nan, one, one, one, 4, 1e-6),
        ):
            assert norm.isnan().all((2, 3)).tolist() == [[True] * 2 + [False] * 6]
        added, _ = ops.add_group_norm_silu(flat, one, one, 4, 1e-6, residual=with_nan)
        assert added.isnan().sum() == 1


def test_the_norm_is_that_of_the_rounded_sum() -> None:
    """1000 + 1 is 1000 in bfloat16: all pixels equal, whose norm is 0 whatever was lost in rounding."""
    h, one = torch.full((1, 4, 4, 4), 1000.0, device=DEVICE).bfloat16(), torch.ones(4, device=DEVICE).bfloat16()
    with ops.use_backend("triton"):
        added, normed = ops.add_group_norm_silu(h, one, one, 2, 1e-6, channel_bias=one, silu=False)
    assert added.unique().tolist() == [1000.0]
    assert normed.unique().tolist() == [1.0]


def test_inputs_keep_their_values() -> None:
    h, residual = maps(1, 8, 5, 6).to(DEVICE), maps(1, 8, 5, 6).to(DEVICE)
    before, one = (h.clone(), residual.clone()), torch.ones(8, device=DEVICE)
    with ops.use_backend("triton"):
        ops.add_group_norm_silu(h, one, one, 4, 1e-6, residual=residual)
    assert torch.equal(h, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("phases", [False, True])
def test_registration(phases: bool) -> None:
    h, one = maps(2, 32, 3, 4).to(DEVICE), torch.rand(8 if phases else 32, device=DEVICE)
    residual = maps(2, 8, 4, 6).to(DEVICE) if phases else h.flip(0)
    for options in ((residual, None), (None, one)):
        arguments = (h, one, one, 4, 1e-6, *options, phases, not phases)
        torch.library.opcheck(torch.ops.vapi_fast.add_group_norm_silu.default, arguments)
    if not phases:
        arguments = (h.contiguous(), one, one, one, 4, 1e-6)
        torch.library.opcheck(torch.ops.vapi_fast.bias_group_norm_silu.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_production_sizes(dtype: torch.dtype) -> None:
    for channels, size in ((128, 384), (256, 192), (512, 24)):
        inputs = {"h": maps(4, channels, size, size)} | affine(channels)
        bias = {"channel_bias": torch.randn(channels)}
        assert_stream_accurate(dtype, inputs | bias | {"residual": maps(4, channels, size, size)}, 32)
        phases = {"h": maps(4, 4 * channels, size // 2 + 1, size // 2 + 1)} | affine(channels)
        assert_stream_accurate(dtype, phases | bias, 32, phases=True)
        assert_bias_accurate(dtype, inputs["h"], bias["channel_bias"], 32)
