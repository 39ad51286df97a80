"""GroupNorm with SiLU, also of a residual stream: against formulas, and Triton against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import RELATIVE_L2, assert_accurate, relative_l2
from fused import DEVICE, DTYPES, assert_eight_bits, assert_fused_accurate, misaligned
from torch import Tensor
from torch.nn import functional as F

from vapi_fast import ops
from vapi_fast.kernels import group_norm

SIZES = [((2, 24, 9, 11), 8), ((1, 6, 5, 7), 3), ((3, 5, 3, 3), 1), ((2, 32, 1, 63), 32)]  # maps and groups


# ---- the formulas


@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 5, 7), 3), ((1, 4, 1, 63), 4), ((3, 5, 3, 3), 1)])
def test_group_norm_silu_is_its_formula(shape: tuple[int, int, int, int], groups: int) -> None:
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


@pytest.mark.parametrize(("dtype", "phases"), [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)])
def test_the_norm_in_eight_bits(backend: str, dtype: torch.dtype, phases: bool) -> None:
    """In units of a scale: where these are small its numbers lie equally far apart, and none is beyond the largest."""
    h = torch.randn(2, 24 * (4 if phases else 1), 5, 8, device=DEVICE).to(dtype)
    weight, bias = torch.randn(2, 24, device=DEVICE)
    norm = (weight * torch.logspace(-4, 2, 24, device=DEVICE), bias / 10, 6, 1e-6)
    for silu, scale in ((True, 1e-2), (False, 1e-4)):
        options = {"phases": phases, "silu": silu}
        total, normed = ops.add_group_norm_silu(h, *norm, **options, normed_scale=scale)
        exact = F.group_norm(total.double(), 6, norm[0].double(), norm[1].double(), 1e-6)
        exact = F.silu(exact) if silu else exact
        assert_eight_bits(normed, exact, scale)
        assert normed.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(total, ops.add_group_norm_silu(h, *norm, **options)[0])
    assert (normed.float().abs() == 448).any()
    h[0, 0, 0, 0] = torch.nan
    if backend == "reference" or h.is_cuda:  # interpreted, a NaN is cast to 384
        assert ops.add_group_norm_silu(h, *norm, phases=phases, normed_scale=1.0)[1][0].isnan().any()


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


# ---- on Triton, against float64


def maps(*shape: int) -> Tensor:
    return (3 + 2 * torch.randn(shape)).to(memory_format=torch.channels_last)


def affine(channels: int) -> dict[str, Tensor]:
    return {"weight": 1 + 0.1 * torch.randn(channels), "bias": torch.randn(channels)}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("shape", "groups"), SIZES)
def test_group_norm_silu(shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype) -> None:
    inputs = [maps(*shape), *affine(shape[1]).values()]
    assert_fused_accurate(lambda *t: ops.group_norm_silu(*t, groups, 1e-6), inputs, dtype)


@pytest.fixture(params=[1, 2, 12])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On four multiprocessors, each with so many programs: with few, each has several tiles of a map."""
    monkeypatch.setattr(group_norm, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(group_norm, "PROGRAMS", request.param)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("images", [slice(0, 2), slice(2, 4)])
def test_group_norm_silu_over_several_splits_of_the_pixels(images: slice) -> None:
    inputs = [maps(4, 512, 12, 13)[images], torch.randn(512), torch.randn(512)]
    assert_fused_accurate(lambda *t: ops.group_norm_silu(*t, 2, 1e-6), inputs, torch.float32)


def test_programs_fill_the_multiprocessors_a_whole_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_norm, "multiprocessors", lambda device: 132)
    x = torch.empty(14, 128, 384, 384, dtype=torch.bfloat16, device="meta")
    launched, (pixels, per_split, splits), block = group_norm.over_pixels(group_norm.APPLY, x)
    assert launched == 14 * splits
    assert 0.95 * 12 * 132 < launched <= 12 * 132
    assert (splits - 1) * per_split < pixels <= splits * per_split
    assert per_split % block["BLOCK_P"] == 0


def test_group_norm_silu_keeps_memory_format_and_dtype(backend: str) -> None:
    x, one = maps(2, 8, 5, 6).to(DEVICE), torch.randn(8, device=DEVICE)
    out = ops.group_norm_silu(x, one, one, 4, 1e-6)
    plain = ops.group_norm_silu(x.contiguous(), one, one, 4, 1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    torch.testing.assert_close(out, plain)
    assert ops.group_norm_silu(x.bfloat16(), one, one, 4, 1e-6).dtype == torch.bfloat16


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SIZES)
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
@pytest.mark.parametrize(("shape", "groups"), SIZES)
def test_bias_group_norm_silu(shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype) -> None:
    assert_bias_accurate(dtype, maps(*shape), 3 * torch.randn(shape[1]), groups)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("phases", [False, True])
def test_several_splits_of_the_pixels(phases: bool) -> None:
    inputs = {"h": maps(2, 1024, 6, 7) if phases else maps(2, 256, 10, 13)} | affine(256)
    shape = (2, 256, 10, 12) if phases else (2, 256, 10, 13)
    assert_stream_accurate(torch.float32, inputs | {"residual": maps(*shape)}, 2, phases=phases)


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


def test_a_mean_far_from_zero() -> None:
    inputs = [300 + maps(1, 8, 16, 16), *affine(8).values()]
    assert_fused_accurate(lambda *t: ops.group_norm_silu(*t, 4, 1e-6), inputs, torch.float32, gradients=False)
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


# ---- on both


def test_an_expanded_residual_and_inputs_that_keep_their_values(backend: str) -> None:
    h, one, row = maps(2, 8, 5, 6).to(DEVICE), torch.ones(8, device=DEVICE), torch.randn(8, 5, 6, device=DEVICE)
    before = h.clone(), row.clone()
    added, _ = ops.add_group_norm_silu(h, one, one, 4, 1e-6, residual=row.expand(2, -1, -1, -1))
    torch.testing.assert_close(added, h + row)
    assert torch.equal(h, before[0])
    assert torch.equal(row, before[1])


def test_empty_batch(backend: str) -> None:
    one = torch.ones(8, device=DEVICE, requires_grad=True)
    out = ops.group_norm_silu(torch.empty(0, 8, 3, 3, device=DEVICE), one, one, 4, 1e-6)
    out.sum().backward()
    assert out.shape == (0, 8, 3, 3)
    assert one.grad.tolist() == [0.0] * 8
    with torch.no_grad():
        assert ops.bias_group_norm_silu(torch.empty(0, 8, 3, 3, device=DEVICE), one, one, one, 4, 1e-6).numel() == 0
        h = torch.empty(0, 32, 3, 4, device=DEVICE)
        added, normed = ops.add_group_norm_silu(h, one, one, 4, 1e-6, phases=True)
    assert added.shape == normed.shape == (0, 8, 4, 6)


def test_equal_pixels_and_nan(backend: str) -> None:
    one, flat = torch.ones(8, device=DEVICE), torch.full((1, 8, 4, 4), 7.0, device=DEVICE)
    added, normed = ops.add_group_norm_silu(flat, one, one, 4, 1e-6, residual=flat, channel_bias=one)
    assert added.unique().tolist() == [15.0]
    for found in (
        normed,
        ops.group_norm_silu(flat, one, one, 4, 1e-6),
        ops.bias_group_norm_silu(flat, one, one, one, 4, 1e-6),
    ):
        torch.testing.assert_close(found, torch.full_like(flat, 0.731058578), rtol=1e-6, atol=1e-6)
    with_nan = flat.clone()
    with_nan[0, 0, 1, 2] = torch.nan
    added, normed = ops.add_group_norm_silu(flat, one, one, 4, 1e-6, residual=with_nan)
    assert added.isnan().sum() == 1
    for found in (
        normed,
        ops.group_norm_silu(with_nan, one, one, 4, 1e-6),
        ops.add_group_norm_silu(with_nan, one, one, 4, 1e-6)[1],
        ops.bias_group_norm_silu(with_nan, one, one, one, 4, 1e-6),
    ):
        assert found.isnan().all((2, 3)).tolist() == [[True] * 2 + [False] * 6]


def test_the_norm_is_that_of_the_rounded_sum(backend: str) -> None:
    """1000 + 1 is 1000 in bfloat16: all pixels equal, whose norm is 0 whatever was lost in rounding."""
    h, one = torch.full((1, 4, 4, 4), 1000.0, device=DEVICE).bfloat16(), torch.ones(4, device=DEVICE).bfloat16()
    added, normed = ops.add_group_norm_silu(h, one, one, 2, 1e-6, channel_bias=one, silu=False)
    assert added.unique().tolist() == [1000.0]
    assert normed.unique().tolist() == [1.0]


@pytest.mark.parametrize("phases", [False, True])
def test_registration(phases: bool) -> None:
    h, one = maps(2, 32, 3, 4).to(DEVICE), torch.rand(8 if phases else 32, device=DEVICE)
    residual = maps(2, 8, 4, 6).to(DEVICE) if phases else h.flip(0)
    for options in ((residual, None), (None, one)):
        arguments = (h, one, one, 4, 1e-6, *options, phases, not phases, None)
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
        assert_fused_accurate(lambda *t: ops.group_norm_silu(*t, 32, 1e-6), list(inputs.values()), dtype)
        assert_stream_accurate(dtype, inputs | bias | {"residual": maps(4, channels, size, size)}, 32)
        phases = {"h": maps(4, 4 * channels, size // 2 + 1, size // 2 + 1)} | affine(channels)
        assert_stream_accurate(dtype, phases | bias, 32, phases=True)
        assert_bias_accurate(dtype, inputs["h"], bias["channel_bias"], 32)
