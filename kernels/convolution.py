"""3×3 convolution of channels-last maps for frozen networks; what follows it rides on its result.

An implicit product, channels out × 9·channels in × pixels: a program computes BLOCK_C channels of a tile of pixels, tap
by tap, BLOCK_K channels in at a time. Tiles come by tensor descriptors (TMA), for which a pixel outside of the map is a
zero, so that padding costs nothing; where a GPU has none, or a map does not lie as they need it, by pointers and masks.
The product is taken transposed, channels are its rows: so weights as well as pixels reach the matrix units from shared
memory, and a channel's sum over pixels stays within four threads.

| kernel                    | bytes moved                                              | FLOPs         |
|---------------------------|----------------------------------------------------------|---------------|
| convolution               | x and the residual read, y written; weights, 18·I·C      | 18·B·H·W·I·C  |
| the same, with statistics | and 8·C for each tile of pixels                          | and 3·B·H·W·C |

Bound by the matrix units: with 128 channels a pixel takes 0.37 ns of an H100 by its FLOPs (798 TFLOP/s) and 0.26 by its
bytes (3.0 TB/s). Near is what passes through L2: a step of 256 pixels and 128 channels reads 48 KiB, 9.3 TB/s at that
rate; one of 128 pixels would read 12.5 TB/s.

What rides on the result saves passes over maps (x: bytes of one). In the middle of a residual block the statistics read
nothing: the norm moves 2x, not 3x. At its end bias and residual are added before the one rounding, where a pass read
result and residual and wrote the sum: 3x, of which one is the residual, not 5x; before an upsampling 1x, not 3x.
Decoding an image of 384² pixels with VQ-16 in bf16 moves 0.49 GB of 1.53 less so, 0.16 ms at 3.0 TB/s. Of a step of
LlamaGen-XXL (1024 images) that is 0.17 s at the copy's rate, 0.21 at the 0.8 of it that GroupNorm's passes are expected
to reach, 0.28 if the residual's read hides behind products. Nobody has measured that. A slower product would cost more
than it saves, as convolutions take 1.0 s of that step: cuDNN stays, but for shapes at which this was found faster on a
GPU (`runtime.forms`).

Of 8 bits (float8_e4m3fn) x and the weights have scales, and a channel's sum is multiplied by what a product of their
units is worth, before anything is added to it. A step then takes as many bytes, and twice the channels in. A pixel's
FLOPs take 0.18 ns at twice the rate, its bytes 0.13, or with the residual 0.21. Of VQ-16's full resolution there are
six, 43.5 GFLOP an image each: a step of LlamaGen-XXL has 0.30 s of them at 900 TFLOP/s, by estimate, in place of 0.51
by cuDNN in 16 bits at 520.

Matrix units of sm_90 add products of 8 bits up to about 14 bits of the largest. Emulated so, 32 at a time, each cut off
below the 13th bit of fraction, a sum over 9·128 is off by 7·10⁻⁴ of the sums' rms: rounding what is multiplied costs
4·10⁻², rounding the result to float16 2·10⁻⁴. Added up in fp32 every 128 (`max_num_imprecise_acc`) it would be off by
1.4·10⁻⁴, for which 256 pixels have no room (255 registers, 72 bytes spilled): with 128 (150 registers) twice the
weights pass through L2. So it is not. On the preset, whose sums are over 9·32, advantages of 8 images with 8 rollouts
each have so a cosine of 0.999964 with those in float32, in place of 0.999966.

Machine code for sm_90 (`python -m vapi_fast.kernels.check`), bf16 by descriptors: 64×256×16 products in groups of four,
one wait a group; 239 registers with residual and statistics (181 by Triton 3.6), no spill; 192 KiB of shared memory, so
one program a multiprocessor, whose end no other one's products hide. Of 8 bits they are 64×256×32, 181 registers (176)
with residual and statistics, 163 (157) without residual, and as much shared memory.

The sums are of the values as they are written, not shifted: what the mean then costs the variance, 2⁻²⁴ of its square,
is less than what rounding the map to 16 bits does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .group_norm import group_statistics, normalized, normed_like
from .launch import DTYPES, channels_last, check_dtypes, contiguous, device_architecture, launch
from .straight_through import INTERPRETED

OPERANDS = (*DTYPES, torch.float8_e4m3fn)
# Tiles of 16-bit maps by descriptors, of them and of fp32 by pointers.
DESCRIPTORS = {"BLOCK_C": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
POINTERS = {"BLOCK_C": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
SINGLE = {"BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
TILES = {256: ((16, 16), (8, 32)), 128: ((8, 16), (4, 32)), 64: ((8, 8), (4, 16))}  # rows and columns of so many pixels
DESCRIBED = ("sm_90", "sm_100", "sm_103")  # with descriptors, and shared memory for four stages


@triton.jit(do_not_specialize=["H", "W", "tiles", "tiles_x"])
def convolution_kernel(
    y,
    x,
    kernel,
    channel_scale_ptr,
    channel_bias_ptr,
    residual,
    sums_ptr,
    C,
    H,
    W,
    tiles,
    tiles_x,
    INPUTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    RAGGED: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = channel_scale · the convolution + channel_bias + residual, of one tile; and Σy and Σy² of its channels, `[B,
    tiles, 2, C]`.

    y, x, residual: maps `[B, H, W, channels]` and kernel `[C, 9·INPUTS]`, descriptors or pointers. RAGGED: some tiles
    reach beyond the map.
    """
    TILE: tl.constexpr = TILE_H * TILE_W
    CHUNKS: tl.constexpr = (INPUTS + BLOCK_K - 1) // BLOCK_K  # known, or ptxas makes every product wait for the last
    blocks = tl.cdiv(C, BLOCK_C)
    first_c, part = tl.program_id(0) % blocks * BLOCK_C, tl.program_id(0) // blocks
    image, tile = part // tiles, part % tiles
    top, left = tile // tiles_x * TILE_H, tile % tiles_x * TILE_W
    channel, within = first_c + tl.arange(0, BLOCK_C), tl.arange(0, TILE)
    row, column = top + within // TILE_W, left + within % TILE_W
    base = image.to(tl.int64) * H * W
    total = tl.zeros([BLOCK_C, TILE], tl.float32)
    for step in range(9 * CHUNKS):
        tap, first_k = step // CHUNKS, step % CHUNKS * BLOCK_K
        down, right = tap // 3 - 1, tap % 3 - 1
        if DESCRIPTORS:
            # Beyond the last channel pixels are zeros, whatever the next tap's weights are.
            pixels = x.load([image, top + down, left + right, first_k]).reshape(TILE, BLOCK_K)
            weights = kernel.load([first_c, tap * INPUTS + first_k])
        else:
            k = first_k + tl.arange(0, BLOCK_K)
            y_in, x_in, inside_k = row + down, column + right, (k < INPUTS)[None, :]
            inside = (y_in >= 0) & (y_in < H) & (x_in >= 0) & (x_in < W)
            place = x + base * INPUTS + ((y_in * W + x_in) * INPUTS)[:, None] + k[None, :]
            pixels = tl.load(place, mask=inside[:, None] & inside_k, other=0.0)
            place = kernel + (channel * (9 * INPUTS) + tap * INPUTS)[:, None] + k[None, :]
            weights = tl.load(place, mask=(channel < C)[:, None] & inside_k, other=0.0)
        if INTERPRETED:  # which would multiply the bits of bfloat16 numbers, and of 8-bit ones a rounding to float16
            weights, pixels = weights.to(tl.float32), pixels.to(tl.float32)
        total = tl.dot(weights, pixels.T, total, input_precision="tf32x3")  # 16-bit operands disregard the precision
    inside_c, inside = channel < C, ((row < H) & (column < W))[None, :]
    place = (row * W + column)[None, :] * C + channel[:, None]
    if channel_scale_ptr is not None:
        total *= tl.load(channel_scale_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)[:, None]
    if channel_bias_ptr is not None:
        total += tl.load(channel_bias_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        if DESCRIPTORS:
            total += residual.load([image, top, left, first_c]).reshape(TILE, BLOCK_C).T.to(tl.float32)
        else:
            total += tl.load(residual + base * C + place, mask=inside & inside_c[:, None], other=0.0).to(tl.float32)
    if DESCRIPTORS:
        result = total.to(y.dtype)
        y.store([image, top, left, first_c], result.T.reshape(1, TILE_H, TILE_W, BLOCK_C))
    else:
        result = total.to(y.dtype.element_ty)
        tl.store(y + base * C + place, result, mask=inside & inside_c[:, None])
    if sums_ptr is not None:
        value = result.to(tl.float32)
        if RAGGED:
            value = tl.where(inside, value, 0.0)
        out = sums_ptr + part.to(tl.int64) * 2 * C + channel
        tl.store(out, tl.sum(value, axis=1), mask=inside_c)
        tl.store(out + C, tl.sum(value * value, axis=1), mask=inside_c)


def described(*tensors: Tensor | None) -> bool:
    """Whether tensor descriptors can stand for these: on such a GPU or interpreted, rows of whole 16 bytes."""
    given = [each for each in tensors if each is not None]
    device = given[0].device
    return (device.type != "cuda" or device_architecture(device.index) in DESCRIBED) and all(
        each.dtype != torch.float32
        and each.shape[1] * each.element_size() % 16 == 0
        and each.storage_offset() * each.element_size() % 16 == 0
        for each in given
    )


def map_descriptor(x: Tensor, tile: tuple[int, int], channels: int) -> TensorDescriptor:
    """A channels-last map as `[B, H, W, C]`, a tile of one image at a time."""
    batch, size, height, width = x.shape
    strides = [height * width * size, width * size, size, 1]
    return TensorDescriptor(x, [batch, height, width, size], strides, [1, *tile, channels])


def best_tile(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Of so many pixels the tile whose copies reach beyond the map the least."""
    return min(TILES[pixels], key=lambda tile: count_tiles(tile, height, width))


def count_tiles(tile: tuple[int, int], height: int, width: int) -> int:
    return triton.cdiv(height, tile[0]) * triton.cdiv(width, tile[1])


def convolved(
    x: Tensor,
    kernel: Tensor,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    channel_scale: Tensor | None,
    dtype: torch.dtype | None,
    statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    """The convolution with what is added, in `dtype`, and with `statistics` every channel's sums by tile."""
    y = result_like(x, kernel, dtype)
    if x.dtype != kernel.dtype:
        dtype = torch.promote_types(x.dtype, kernel.dtype)
        x, kernel = x.to(dtype), kernel.to(dtype)
    x, kernel = channels_last(x), channels_last(kernel)
    residual = None if residual is None else channels_last(residual)
    (batch, inputs, height, width), channels = x.shape, len(kernel)
    descriptors = described(y, x, kernel, residual)
    single = x.dtype == torch.float32
    settings = DESCRIPTORS if descriptors else SINGLE if single else POINTERS
    if x.dtype == torch.float8_e4m3fn:  # as many bytes
        settings = settings | {"BLOCK_K": 2 * settings["BLOCK_K"]}
    pixels = 256 if descriptors else 64 if single else 128
    tile = best_tile(pixels, height, width)
    tiles, blocks = count_tiles(tile, height, width), triton.cdiv(channels, settings["BLOCK_C"])
    sums = x.new_empty(batch, tiles, 2, channels, dtype=torch.float32) if statistics else None
    given: list[Any] = [y, x, kernel, contiguous(channel_scale), contiguous(channel_bias), residual, sums]
    if descriptors and batch:
        given[0], given[1] = map_descriptor(y, tile, settings["BLOCK_C"]), map_descriptor(x, tile, settings["BLOCK_K"])
        weights = [settings["BLOCK_C"], settings["BLOCK_K"]]
        given[2] = TensorDescriptor(kernel, [channels, 9 * inputs], [9 * inputs, 1], weights)
        given[5] = None if residual is None else map_descriptor(residual, tile, settings["BLOCK_C"])
    launch(
        convolution_kernel,
        (batch * tiles * blocks,),
        *given,
        *(channels, height, width, tiles, triton.cdiv(width, tile[1])),
        INPUTS=inputs,
        DESCRIPTORS=descriptors,
        RAGGED=height % tile[0] > 0 or width % tile[1] > 0,
        TILE_H=tile[0],
        TILE_W=tile[1],
        **settings,
    )
    return y, sums


def result_like(x: Tensor, kernel: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A new map for the sum, channels-last, in x's dtype where it has no other."""
    shape = (len(x), len(kernel), *x.shape[2:])
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("vapi_fast::convolution", mutates_args=())
def convolution_op(
    x: Tensor,
    kernel: Tensor,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    channel_scale: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    return convolved(x, kernel, channel_bias, residual, channel_scale, dtype, statistics=False)[0]


@torch.library.custom_op("vapi_fast::convolution_group_norm_silu", mutates_args=())
def convolution_group_norm_silu_op(
    x: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    residual: Tensor | None,
    channel_bias: Tensor | None,
    silu: bool,
    channel_scale: Tensor | None,
    dtype: torch.dtype | None,
    normed_scale: float | None,
) -> tuple[Tensor, Tensor]:
    total, sums = convolved(x, kernel, channel_bias, residual, channel_scale, dtype, statistics=True)
    affine = group_statistics(total, sums, weight, bias, groups, eps, shifted=False)[1]
    return total, normalized(total, affine, silu, normed_scale)


convolution_op.register_fake(lambda x, kernel, *others: result_like(x, kernel, others[-1]))


@convolution_group_norm_silu_op.register_fake
def _(x: Tensor, kernel: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, dtype, normed_scale = others
    total = result_like(x, kernel, dtype)
    return total, normed_like(total, normed_scale)


def convolution(
    x: Tensor,
    kernel: Tensor,
    *,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    channel_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """3×3 convolution with what is added to it, rounded once; see `vapi_fast.ops.convolution`."""
    check_dtypes("convolution", OPERANDS, x=x, kernel=kernel)
    check_dtypes("convolution", channel_bias=channel_bias, residual=residual, channel_scale=channel_scale)
    return convolution_op(x, kernel, channel_bias, residual, channel_scale, dtype)


def convolution_group_norm_silu(
    x: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    residual: Tensor | None = None,
    channel_bias: Tensor | None = None,
    silu: bool = True,
    channel_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    normed_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, the norm's statistics taken on the way; see `vapi_fast.ops.convolution_group_norm_silu`."""
    check_dtypes("convolution_group_norm_silu", OPERANDS, x=x, kernel=kernel)
    others = {"residual": residual, "channel_bias": channel_bias, "channel_scale": channel_scale}
    check_dtypes("convolution_group_norm_silu", weight=weight, bias=bias, **others)
    norm = (weight, bias, groups, eps)
    return convolution_group_norm_silu_op(
        x, kernel, *norm, residual, channel_bias, silu, channel_scale, dtype, normed_scale
    )
