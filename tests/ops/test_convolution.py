"""3×3 convolution of frozen networks, and with the norm behind it: against formulas, and Triton against float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from accuracy import RELATIVE_L2, relative_l2
from fused import DEVICE, assert_eight_bits, assert_fused_accurate, misaligned
from torch import Tensor
from torch.nn import functional as F

from vapi_fast import ops
from vapi_fast.kernels import launch

kernels = importlib.import_module("vapi_fast.kernels.convolution")  # the package has the function under this name

SIXTEEN = (torch.bfloat16, torch.float16)
# Images, channels in and out, height and width: no multiples of a block, several tiles, and the least there is.
SIZES = [(2, 24, 40, 9, 21), (1, 72, 136, 3, 9), (3, 8, 8, 1, 1), (1, 3, 5, 4, 6)]


def maps(*shape: int) -> Tensor:
    return (1 + torch.randn(shape)).to(memory_format=torch.channels_last)


def weights(outputs: int, inputs: int) -> Tensor:
    return (torch.randn(outputs, inputs, 3, 3) * (9 * inputs) ** -0.5).to(memory_format=torch.channels_last)


def inputs_of(batch: int, inputs: int, outputs: int, height: int, width: int) -> list[Tensor]:
    """x, kernel, channel_bias and residual."""
    residual = maps(batch, outputs, height, width)
    return [maps(batch, inputs, height, width), weights(outputs, inputs), torch.randn(outputs), residual]


def convolution(x: Tensor, kernel: Tensor, channel_bias: Tensor, residual: Tensor) -> Tensor:
    return ops.convolution(x, kernel, channel_bias=channel_bias, residual=residual)


@pytest.fixture(params=["descriptors", "pointers"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the tiles come: by descriptors where the sizes allow it, or by pointers everywhere."""
    if request.param == "descriptors":
        yield request.param
    else:
        with mock.patch.object(kernels, "described", return_value=False):
            yield request.param


# ---- the formulas


def test_convolution_is_its_formula() -> None:
    x, kernel, channel_bias, residual = (each.double() for each in inputs_of(2, 3, 4, 5, 6))
    out = convolution(x, kernel, channel_bias, residual)
    padded = F.pad(x, (1, 1, 1, 1))
    for i in range(5):
        for j in range(6):
            window = padded[:, :, i : i + 3, j : j + 3]
            expected = torch.einsum("bkuv,ckuv->bc", window, kernel) + channel_bias + residual[:, :, i, j]
            torch.testing.assert_close(out[:, :, i, j], expected)
    torch.testing.assert_close(ops.convolution(x, kernel), F.conv2d(x, kernel, padding=1))


@pytest.mark.parametrize("silu", [True, False])
def test_the_norm_is_that_of_the_rounded_sum(silu: bool) -> None:
    x, kernel, channel_bias, residual = (each.bfloat16() for each in inputs_of(2, 3, 4, 5, 6))
    weight, bias = torch.randn(2, 4)
    options = {"channel_bias": channel_bias, "residual": residual}
    total, normed = ops.convolution_group_norm_silu(x, kernel, weight, bias, 2, 1e-2, silu=silu, **options)
    assert torch.equal(total, ops.convolution(x, kernel, **options))
    wide = F.group_norm(total.float(), 2, weight, bias, 1e-2)
    assert torch.equal(normed, (F.silu(wide) if silu else wide).bfloat16())


def test_a_scale_of_each_channel_and_a_dtype_of_the_sum() -> None:
    x, kernel, channel_bias, residual = inputs_of(2, 3, 4, 5, 6)
    scale = torch.rand(4) + 0.5
    out = ops.convolution(x, kernel, channel_scale=scale, channel_bias=channel_bias, residual=residual)
    expected = F.conv2d(x, kernel * scale[:, None, None, None], channel_bias, padding=1) + residual
    torch.testing.assert_close(out, expected)
    assert ops.convolution(x, kernel, dtype=torch.float16).dtype == torch.float16


def test_no_gradient_is_refused_or_not_wanted() -> None:
    x, kernel = torch.randn(1, 4, 3, 3), torch.randn(4, 4, 3, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"convolution: has no gradient, and kernel requires one: .* F.conv2d"):
        ops.convolution(x, kernel)
    with torch.no_grad():
        assert not ops.convolution(x, kernel).requires_grad


def test_bad_arguments() -> None:
    x, kernel = torch.zeros(2, 6, 4, 4), torch.zeros(8, 6, 3, 3)
    with pytest.raises(ValueError, match=r"convolution: kernel must be of 3×3 taps, got \[8, 6, 5, 5\]"):
        ops.convolution(x, torch.zeros(8, 6, 5, 5))
    with pytest.raises(
        ValueError, match=r"kernel must be floating \[C, I, 3, 3\] with I=6, got float32 \[8, 5, 3, 3\]"
    ):
        ops.convolution(x, torch.zeros(8, 5, 3, 3))
    with pytest.raises(ValueError, match=r"residual must be floating \[B, C, H, W\] with B=2, C=8, H=4, W=4"):
        ops.convolution(x, kernel, residual=x)
    with pytest.raises(ValueError, match="convolution: x must have W > 0, got W=0"):
        ops.convolution(x[..., :0], kernel)
    eight = x.to(torch.float8_e4m3fn), kernel.to(torch.float8_e4m3fn)
    with pytest.raises(
        TypeError, match=r"dtype must be a floating one where x is float8_e4m3fn \[2, 6, 4, 4\], got None"
    ):
        ops.convolution(*eight)
    with pytest.raises(TypeError, match="x and kernel both or none must be float8_e4m3fn, got float32"):
        ops.convolution(x, eight[1], dtype=torch.float32)
    with pytest.raises(TypeError, match=r"dtype must be a floating one where x is float32 .*, got torch\.int8"):
        ops.convolution(x, kernel, dtype=torch.int8)
    with pytest.raises(ValueError, match="normed_scale must be positive and finite, got 0"):
        ops.convolution_group_norm_silu(x, kernel, torch.zeros(8), torch.zeros(8), 4, 1e-6, normed_scale=0)
    with pytest.raises(ValueError, match="convolution_group_norm_silu: groups must divide C=8 channels, got 3"):
        ops.convolution_group_norm_silu(x, kernel, torch.zeros(8), torch.zeros(8), 3, 1e-6)


# ---- on Triton, against float64


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("sizes", SIZES)
def test_convolution(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = inputs_of(*sizes)
    out = assert_fused_accurate(convolution, inputs, dtype, gradients=False)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_fused_accurate(lambda x, kernel: ops.convolution(x, kernel), inputs[:2], dtype, gradients=False)


@pytest.mark.parametrize("sizes", [(2, 24, 40, 5, 9), (1, 3, 5, 4, 6)])
def test_convolution_in_fp32(sizes: tuple[int, ...]) -> None:
    assert_fused_accurate(convolution, inputs_of(*sizes), torch.float32, gradients=False)


EIGHT_SIZES = [(2, 32, 40, 9, 21), (1, 144, 136, 3, 9), (3, 16, 16, 1, 1), (1, 3, 5, 4, 6)]  # rows of whole 16 bytes


def eight_bits(*sizes: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """x and kernel in float8_e4m3fn, up to where it ends and down to where its numbers lie equally far apart; what is
    added, and each channel's scale."""
    x, kernel, channel_bias, residual = (each.to(DEVICE) for each in inputs_of(*sizes))
    x[:, ::2] *= 100
    x[:, 1::4] *= 1e-3
    scale = torch.rand(sizes[2], device=DEVICE) * 1e-3
    operands = [each.clamp(-448, 448).to(torch.float8_e4m3fn) for each in (x, 100 * kernel)]
    return operands, {"channel_scale": scale, "channel_bias": channel_bias, "residual": residual}


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("sizes", EIGHT_SIZES)
def test_convolution_of_eight_bits(sizes: tuple[int, ...]) -> None:
    """Their products are exact; of a GPU's sums `kernels/convolution` says how exact they are."""
    operands, added = eight_bits(*sizes)
    with ops.use_backend("triton"):
        out, *others = (ops.convolution(*operands, **added, dtype=dtype) for dtype in (torch.float32, *SIXTEEN))
    expected = ops.convolution(*(each.double() for each in operands), **added)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert relative_l2(out, expected) < (2e-3 if out.is_cuda else 1e-6)
    for rounded, dtype, error in zip(others, SIXTEEN, (5e-3, 4e-4), strict=True):  # bfloat16 is cut off, interpreted
        assert rounded.dtype == dtype
        assert relative_l2(rounded, expected) < (2e-3 + error if out.is_cuda else error)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("sizes", "groups", "silu"), [((2, 32, 40, 9, 21), 8, True), ((1, 144, 136, 3, 9), 2, False)])
def test_eight_bits_with_the_norm_in_eight_bits(sizes: tuple[int, ...], groups: int, silu: bool) -> None:
    operands, added = eight_bits(*sizes)
    norm = (*torch.randn(2, sizes[2], device=DEVICE), groups, 1e-6)
    options = {"silu": silu, "dtype": torch.float16}
    with ops.use_backend("triton"):
        total, normed = ops.convolution_group_norm_silu(*operands, *norm, **added, **options, normed_scale=0.01)
        plain = ops.convolution_group_norm_silu(*operands, *norm, **added, **options)[1]
    assert (total.dtype, normed.dtype, plain.dtype) == (torch.float16, torch.float8_e4m3fn, torch.float16)
    assert normed.is_contiguous(memory_format=torch.channels_last)
    exact = add_norm(total.double(), norm, silu)
    assert_eight_bits(normed, exact, 0.01)
    assert relative_l2(plain, exact) < RELATIVE_L2[torch.float16] / 2


def add_norm(total: Tensor, norm: tuple[Tensor, Tensor, int, float], silu: bool) -> Tensor:
    weight, bias, groups, eps = norm
    normed = F.group_norm(total, groups, weight.double(), bias.double(), eps)
    return F.silu(normed) if silu else normed


def test_rounded_once() -> None:
    """Bias and residual are added to the sum in fp32: against a result that is rounded before, they are exact."""
    x, kernel = torch.full((1, 16, 3, 3), 1.0), torch.full((16, 16, 3, 3), 1.0)
    residual = torch.full((1, 16, 3, 3), -143.0)
    given = [each.bfloat16().to(DEVICE) for each in (x, kernel, torch.full((16,), 0.0625), residual)]
    with ops.use_backend("triton"):
        assert (convolution(*given)[:, :, 1, 1] == 144 + 0.0625 - 143).all()  # 144 + 1/16 is no bfloat16


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize(("sizes", "groups"), [((2, 24, 40, 9, 21), 8), ((1, 72, 136, 3, 9), 2), ((3, 8, 8, 1, 1), 1)])
@pytest.mark.parametrize("ends", [True, False])
def test_with_the_norm(sizes: tuple[int, ...], groups: int, dtype: torch.dtype, ends: bool) -> None:
    """The end of a residual block, and its middle, where no residual is added."""
    inputs = inputs_of(*sizes)[: 4 if ends else 3]
    affine = [1 + 0.1 * torch.randn(sizes[2]), torch.randn(sizes[2])]

    def call(which: int) -> Callable[..., Tensor]:
        def normed(weight: Tensor, bias: Tensor, x: Tensor, kernel: Tensor, *added: Tensor) -> Tensor:
            options = dict(zip(("channel_bias", "residual"), added, strict=False))
            return ops.convolution_group_norm_silu(x, kernel, weight, bias, groups, 1e-6, silu=ends, **options)[which]

        return normed

    for which in (0, 1):
        out = assert_fused_accurate(call(which), affine + inputs, dtype, gradients=False)
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_statistics_of_a_mean_far_from_zero(dtype: torch.dtype) -> None:
    """Sums that are not shifted lose less than the map's own rounding does, ten deviations from zero."""
    x, kernel, channel_bias, residual = (each.to(DEVICE, dtype) for each in inputs_of(2, 8, 16, 33, 18))
    weight, bias, options = (
        *torch.randn(2, 16, device=DEVICE),
        {"channel_bias": channel_bias + 30, "residual": residual},
    )
    with ops.use_backend("triton"):
        total, normed = ops.convolution_group_norm_silu(x, kernel, weight, bias, 4, 1e-6, **options)
    expected = F.silu(F.group_norm(total.double(), 4, weight.double(), bias.double(), 1e-6))
    assert (total.double().mean() / total.double().std()).abs() > 10
    assert relative_l2(normed, expected) < RELATIVE_L2[dtype] / 2


@pytest.mark.parametrize(
    "change",
    [misaligned, Tensor.contiguous, lambda x: x.transpose(2, 3), lambda x: x.repeat(1, 1, 2, 2)[..., ::2, ::2]],
)
def test_any_strides(change: Callable[[Tensor], Tensor]) -> None:
    x, kernel, _, residual = inputs_of(2, 16, 24, 5, 5)
    inputs = [change(x), change(kernel), torch.randn(48)[::2], change(residual)]
    assert_fused_accurate(convolution, inputs, torch.bfloat16, gradients=False)


def test_other_dtypes_of_what_is_added_and_of_the_kernel() -> None:
    x, kernel, channel_bias, residual = (each.to(DEVICE) for each in inputs_of(2, 16, 24, 5, 5))
    for given in ((x.bfloat16(), kernel.bfloat16()), (x.half(), kernel.bfloat16())):
        with ops.use_backend("triton"):
            out = convolution(*given, channel_bias, residual)
        expected = convolution(*(each.double() for each in (*given, channel_bias, residual)))
        assert out.dtype == given[0].dtype
        assert relative_l2(out, expected) < RELATIVE_L2[out.dtype]


# ---- how it is launched


@pytest.mark.parametrize(
    ("inputs", "outputs", "dtype", "by_descriptors"),
    [
        (128, 128, torch.bfloat16, True),
        (4, 128, torch.bfloat16, False),  # 8 bytes a pixel
        (128, 3, torch.float16, False),
        (128, 128, torch.float32, False),
        (128, 128, torch.float8_e4m3fn, True),
        (24, 128, torch.float8_e4m3fn, False),  # 24 bytes a pixel
    ],
)
def test_what_is_launched(inputs: int, outputs: int, dtype: torch.dtype, by_descriptors: bool) -> None:
    x, kernel = torch.zeros(2, inputs, 40, 24, dtype=dtype), torch.zeros(outputs, inputs, 3, 3, dtype=dtype)
    with launch.recorded() as recording:
        kernels.convolved(x, kernel, *(None,) * 3, torch.float16, statistics=False)
    (launched,) = recording.launches
    assert launched.constants["DESCRIPTORS"] == by_descriptors
    assert launched.constants["BLOCK_K"] * dtype.itemsize == (128 if by_descriptors or dtype.itemsize == 4 else 64)
    tile = launched.constants["TILE_H"], launched.constants["TILE_W"]
    blocks = -(-outputs // launched.constants["BLOCK_C"])
    assert launched.grid == (2 * blocks * -(-40 // tile[0]) * -(-24 // tile[1]),)


@pytest.mark.parametrize(("side", "tile", "tiles"), [(384, (16, 16), 576), (48, (16, 16), 9), (24, (8, 32), 3)])
def test_tiles_reach_beyond_the_map_as_little_as_they_can(side: int, tile: tuple[int, int], tiles: int) -> None:
    assert kernels.best_tile(256, side, side) == tile
    assert kernels.count_tiles(tile, side, side) == tiles


def test_no_descriptors_where_a_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x = mock.Mock(dtype=torch.bfloat16, shape=(1, 128, 8, 8), device=torch.device("cuda", 0))
    x.element_size.return_value, x.storage_offset.return_value = 2, 0
    for architecture, expected in (("sm_80", False), ("sm_90", True), ("sm_120", False)):
        monkeypatch.setattr(kernels, "device_architecture", lambda index, name=architecture: name)
        assert kernels.described(x, None) is expected


# ---- on both


def test_empty_batch(backend: str) -> None:
    x, kernel, one = torch.empty(0, 8, 3, 3, device=DEVICE), torch.ones(8, 8, 3, 3, device=DEVICE), torch.ones(8)
    assert ops.convolution(x, kernel).shape == x.shape
    results = ops.convolution_group_norm_silu(x, kernel, one.to(DEVICE), one.to(DEVICE), 4, 1e-6)
    assert [each.shape for each in results] == [x.shape] * 2
