"""GroupNorm with SiLU over channels-last maps, and over the residual stream of a frozen decoder.

Bound by memory bandwidth. x: bytes of one map.

| kernel                   | bytes moved                                                      | FLOPs per element |
|--------------------------|------------------------------------------------------------------|-------------------|
| group_norm_statistics    | x read; of a sum, its addends read and itself written: 2x or 3x  | 4, of a sum 6     |
| group_norm_finish        | partial sums only: 8·B·SPLITS·C                                  | -                 |
| group_norm_silu_apply    | 2x (x read, y written); 1.5x from 16 bits to float8_e4m3fn       | 7                 |
| group_norm_silu_reduce   | 2x (x and dy read)                                               | 20                |
| group_norm_silu_backward | 3x (x and dy read, dx written)                                   | 24                |

In a decoder the pass that writes the next map of the residual stream takes the norm's statistics too: a map is written
by one pass and read by one more, 5x for a block's end, 4x for an upsampled map. Inside a block, where the sum is no
one's residual, it is never written: statistics, finish and apply read the convolution's result twice and write its
norm, 3x, and add the convolution's bias on the way. A residual block moves 8x, where separate passes for two biases
(2x each), two norms (3x each) and the addition (3x) would move 13x. Decoding an image of 384² pixels with VQ-16 in
bf16 moves 1.49 GB so, 0.50 ms at 3.0 TB/s.

So that nothing but bandwidth binds, the loops are short and wait at no barrier. In machine code for sm_90, bf16 and 128
channels (`python -m vapi_fast.kernels.check`), and the time to issue that on 132 multiprocessors at 1.755 GHz, four
warps a cycle, as a share of the time of its bytes at 3.0 TB/s (an H100) and at 4.3 TB/s (an H200):

| loop of                       | instructions an element | registers | issue, H100 | H200 |
|-------------------------------|-------------------------|-----------|-------------|------|
| group_norm_statistics         | 6.3                     | 64        | 32 %        | 46 % |
| the same, of a sum            | 13.6                    | 80        | 23 %        | 33 % |
| the same, of phases           | 15.1                    | 79        | 38 %        | 55 % |
| group_norm_silu_apply         | 10.2                    | 59        | 26 %        | 37 % |
| the same, to float8_e4m3fn    | 11.8                    | 64        | 40 %        | 57 % |
| group_norm_silu_reduce        | 19.8                    | 74        | 50 %        | 72 % |
| group_norm_silu_backward      | 19.3                    | 80        | 33 %        | 47 % |

With e^ and a division, and a prologue for each tile, apply took 20.7 (52 % and 75 %), with a sum for each place of the
tile statistics 96 registers: two programs a multiprocessor, of which 532 were launched for 264 places. What that is
worth is predicted, not measured: a step of LlamaGen-XXL at 384² (1024 images decoded) gains 60 ms on an H100, 100 on an
H200.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    channel_blocks,
    channels_last,
    check_dtypes,
    contiguous,
    launch,
    multiprocessors,
    next_power_of_2,
)
from .straight_through import INTERPRETED

STATISTICS = {"BLOCK_ELEMENTS": 8192, "ROWS": 4, "num_warps": 8, "num_stages": 1}
SUM_STATISTICS = {"BLOCK_ELEMENTS": 4096, "ROWS": 2, "num_warps": 8, "num_stages": 1}
FINISH = {"BLOCK_SPLITS": 64, "num_warps": 1, "num_stages": 1}
APPLY = {"BLOCK_ELEMENTS": 8192, "num_warps": 8, "num_stages": 1}
REDUCE = {"BLOCK_ELEMENTS": 4096, "ROWS": 2, "num_warps": 8, "num_stages": 1}
BACKWARD = {"BLOCK_ELEMENTS": 4096, "num_warps": 8, "num_stages": 1}
PROGRAMS = 12  # a multiprocessor, where there is enough to do


@triton.jit
def channel_row(pointer, index, inside):
    """One fp32 number for each channel, as a row beside pixels: `[1, BLOCK_C]`."""
    return tl.load(pointer + index, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def silu_gate(h):
    """sigmoid(h) by 2^ and 1 / √d squared: 5 instructions where e^ and a division take 11, and hardly less exact."""
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * h))
    return root * root


@triton.jit
def in_eight_bits(h):
    """The nearest that float8_e4m3fn holds, at most 448: what is then cast. NaN stays NaN."""
    h = tl.clamp(h, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETED:  # whose cast does not carry into the exponent: units of 2⁻³ of the power of two, 2⁻⁹ at least
        exponent = tl.maximum((tl.abs(h).to(tl.int32, bitcast=True) >> 23) - 3, 127 - 9)
        unit = (exponent << 23).to(tl.float32, bitcast=True)
        h = (h / unit + 12582912.0 - 12582912.0) * unit
    return h


@triton.jit
def before_silu(dy, x, mean, rstd, weight, bias):
    """x̂, and the gradient of SiLU's input h = x̂ · weight + bias."""
    normed = (x - mean) * rstd
    h = normed * weight + bias
    gate = silu_gate(h)
    return normed, dy * gate * (1 + h * (1 - gate))


@triton.jit
def row_sums(tile, ROWS: tl.constexpr):
    """Sums of ROWS rows of a tile that one thread holds; adding up more of them would need a barrier."""
    return tl.sum(tl.reshape(tile, [ROWS, tile.shape[0] // ROWS, tile.shape[1]]), axis=0)


@triton.jit(do_not_specialize=["h_pixels", "P", "width", "pixels_per_split", "SPLITS"])
def group_norm_statistics_kernel(
    h_ptr,
    residual_ptr,
    channel_bias_ptr,
    sum_ptr,
    sums_ptr,
    h_pixels,
    P,
    width,
    pixels_per_split,
    SPLITS,
    C: tl.constexpr,
    PHASES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Σ(x − k) and Σ(x − k)² of every channel over one split of the P pixels: fp32 `[B, SPLITS, 2, C]`.

    k is the channel's first pixel: near the mean, so that the variance does not vanish in the difference of sums. x is
    h, or where sum is given, h + channel_bias + residual, which is written there, rounded: the norm is that of what is
    written. h_pixels: of one image of h, times its phases. With PHASES h has half of the rows and columns, and one more
    of each, with four phases of C channels: pixel (y, x) of the sum is in phase 2·(y mod 2) + x mod 2, row (y + 1) / 2
    and column (x + 1) / 2, rounded down.
    """
    image, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    channel = tl.arange(0, BLOCK_C)
    inside_c = channel < C
    h_base = h_ptr + image.to(tl.int64) * h_pixels * C
    base = image.to(tl.int64) * P * C
    first_h = tl.load(h_base + channel, mask=inside_c, other=0.0)[None, :]
    shift = first_h.to(tl.float32)
    if channel_bias_ptr is not None:
        channel_bias = channel_row(channel_bias_ptr, channel, inside_c)
        shift += channel_bias
    if residual_ptr is not None:
        first_residual = tl.load(residual_ptr + base + channel, mask=inside_c, other=0.0)[None, :]
        shift += first_residual.to(tl.float32)
    shift = shift.to(h_ptr.dtype.element_ty).to(tl.float32)
    total = tl.zeros([BLOCK_P // ROWS, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P // ROWS, BLOCK_C], tl.float32)
    last = tl.minimum(P, (split + 1) * pixels_per_split)
    for start in range(split * pixels_per_split, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = (pixel < last)[:, None] & inside_c[None, :]
        offset = pixel[:, None] * C + channel[None, :]
        h_row = pixel
        if PHASES:
            y, x = pixel // width, pixel % width
            h_row = ((y + 1) // 2 * (width // 2 + 1) + (x + 1) // 2) * 4 + y % 2 * 2 + x % 2
        # Beyond the end the first pixel is read again: less itself it adds nothing to the sums.
        value = tl.load(h_base + h_row[:, None] * C + channel[None, :], mask=inside, other=first_h).to(tl.float32)
        if channel_bias_ptr is not None:
            value += channel_bias
        if residual_ptr is not None:
            value += tl.load(residual_ptr + base + offset, mask=inside, other=first_residual).to(tl.float32)
        value = value.to(h_ptr.dtype.element_ty)
        if sum_ptr is not None:
            tl.store(sum_ptr + base + offset, value, mask=inside)
        centred = value.to(tl.float32) - shift
        total += row_sums(centred, ROWS)
        squares += row_sums(centred * centred, ROWS)
    out = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C + channel
    tl.store(out, tl.sum(total, axis=0), mask=inside_c)
    tl.store(out + C, tl.sum(squares, axis=0), mask=inside_c)


@triton.jit(do_not_specialize=["P", "SPLITS"])
def group_norm_finish_kernel(
    x_ptr,
    channel_bias_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    mean_ptr,
    rstd_ptr,
    affine_ptr,
    P,
    SPLITS,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of one group of one image, fp32 `[B, groups]`, from the channels' sums.

    The sums are those of x less its first pixel, or without x of the values themselves; the mean and variance are those
    of x + channel_bias, which moves whole channels. Of every channel also scale and shift of its norm, x · scale +
    shift: fp32 `[B, 2, C]`.
    """
    image, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    size: tl.constexpr = C // GROUPS
    within = tl.arange(0, BLOCK_G)
    inside_c = within < size
    channel = group * size + within
    near, shift = 0.0, tl.zeros([BLOCK_G], tl.float32)
    if x_ptr is not None:
        first_pixel = x_ptr + image.to(tl.int64) * P * C
        near = tl.load(first_pixel + group * size).to(tl.float32)  # means are taken from here on, to be exact
        shift = tl.load(first_pixel + channel, mask=inside_c, other=0.0).to(tl.float32)
    totals = tl.zeros([BLOCK_SPLITS, BLOCK_G], tl.float32)
    squares = tl.zeros([BLOCK_SPLITS, BLOCK_G], tl.float32)
    for start in range(0, SPLITS, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        inside = (split < SPLITS)[:, None] & inside_c[None, :]
        row = sums_ptr + (image.to(tl.int64) * SPLITS + split[:, None]) * 2 * C + channel[None, :]
        totals += tl.load(row, mask=inside, other=0.0)
        squares += tl.load(row + C, mask=inside, other=0.0)
    total, square = tl.sum(totals, axis=0), tl.sum(squares, axis=0)
    channel_bias = tl.zeros([BLOCK_G], tl.float32)
    if channel_bias_ptr is not None:
        channel_bias = tl.load(channel_bias_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)
    channel_mean = shift - near + total / P + channel_bias
    mean = tl.sum(tl.where(inside_c, channel_mean, 0.0), axis=0) / size
    deviation = tl.where(inside_c, channel_mean - mean, 0.0)
    variance = tl.sum((square - total * (total / P)) / P + deviation * deviation, axis=0) / size
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    tl.store(mean_ptr + tl.program_id(0), near + mean)
    tl.store(rstd_ptr + tl.program_id(0), rstd)
    scale = rstd * tl.load(weight_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)
    affine = affine_ptr + image * 2 * C + channel
    tl.store(affine, scale, mask=inside_c)
    tl.store(affine + C, bias + (channel_bias - mean) * scale - near * scale, mask=inside_c)


@triton.jit(do_not_specialize=["P", "pixels_per_split", "SPLITS"])
def group_norm_silu_apply_kernel(
    x_ptr,
    affine_ptr,
    y_ptr,
    factor,
    P,
    pixels_per_split,
    SPLITS,
    C: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = SiLU(x · scale + shift) for one split of the pixels of one image; affine: scale and shift, `[B, 2, C]`.

    With a factor y is that times as much, in float8_e4m3fn.
    """
    image, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    channel = tl.arange(0, BLOCK_C)
    inside_c = channel < C
    scale = channel_row(affine_ptr, image * 2 * C + channel, inside_c)
    shift = channel_row(affine_ptr, image * 2 * C + C + channel, inside_c)
    base = image.to(tl.int64) * P * C
    last = tl.minimum(P, (split + 1) * pixels_per_split)
    for start in range(split * pixels_per_split, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = (pixel < last)[:, None] & inside_c[None, :]
        offset = pixel[:, None] * C + channel[None, :]
        h = tl.load(x_ptr + base + offset, mask=inside, other=0.0).to(tl.float32) * scale + shift
        if SILU:
            h *= silu_gate(h)
        if factor is not None:
            h = in_eight_bits(h * factor)
        tl.store(y_ptr + base + offset, h.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["P", "pixels_per_split", "SPLITS"])
def group_norm_silu_reduce_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    P,
    pixels_per_split,
    SPLITS,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Σ dh and Σ dh·x̂ of every channel over one split of the pixels: fp32 `[B, SPLITS, 2, C]`; h is SiLU's input."""
    image, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    channel = tl.arange(0, BLOCK_C)
    group = image * GROUPS + channel // (C // GROUPS)
    inside_c = channel < C
    mean = channel_row(mean_ptr, group, inside_c)
    rstd = channel_row(rstd_ptr, group, inside_c)
    weight = channel_row(weight_ptr, channel, inside_c)
    bias = channel_row(bias_ptr, channel, inside_c)
    total = tl.zeros([BLOCK_P // ROWS, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_P // ROWS, BLOCK_C], tl.float32)
    last = tl.minimum(P, (split + 1) * pixels_per_split)
    for start in range(split * pixels_per_split, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = (pixel < last)[:, None] & (channel < C)[None, :]
        offset = image.to(tl.int64) * P * C + pixel[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        normed, dh = before_silu(dy, x, mean, rstd, weight, bias)
        total += row_sums(dh, ROWS)
        products += row_sums(dh * normed, ROWS)
    out = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C + channel
    tl.store(out, tl.sum(total, axis=0), mask=channel < C)
    tl.store(out + C, tl.sum(products, axis=0), mask=channel < C)


@triton.jit(do_not_specialize=["P", "pixels_per_split", "SPLITS"])
def group_norm_silu_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dmean_ptr,
    dproduct_ptr,
    dx_ptr,
    P,
    pixels_per_split,
    SPLITS,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = rstd · (dh·w − mean(dh·w) − x̂ · mean(dh·w·x̂)); the two means of a group are fp32 `[B, groups]`."""
    image, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    channel = tl.arange(0, BLOCK_C)
    group = image * GROUPS + channel // (C // GROUPS)
    inside_c = channel < C
    mean = channel_row(mean_ptr, group, inside_c)
    rstd = channel_row(rstd_ptr, group, inside_c)
    weight = channel_row(weight_ptr, channel, inside_c)
    bias = channel_row(bias_ptr, channel, inside_c)
    dh_scale = rstd * weight
    dmean = rstd * channel_row(dmean_ptr, group, inside_c)
    dproduct = rstd * channel_row(dproduct_ptr, group, inside_c)
    base = image.to(tl.int64) * P * C
    last = tl.minimum(P, (split + 1) * pixels_per_split)
    for start in range(split * pixels_per_split, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = (pixel < last)[:, None] & inside_c[None, :]
        offset = pixel[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + base + offset, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + base + offset, mask=inside, other=0.0).to(tl.float32)
        normed, dh = before_silu(dy, x, mean, rstd, weight, bias)
        dx = dh * dh_scale - dmean - normed * dproduct
        tl.store(dx_ptr + base + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def over_pixels(settings: dict[str, int], x: Tensor) -> tuple[int, tuple[int, int, int], dict[str, int]]:
    """A launch over the pixels of x: programs, its pixels, those of a program and programs an image, constants.

    Programs are PROGRAMS a multiprocessor or just below, a multiple of however many of them it holds at once (1, 2, 3,
    4, 6): the last ones do not run alone. Where there are fewer tiles, each has a program.
    """
    batch, channels, height, width = x.shape
    block = channel_blocks(settings, channels, "BLOCK_P")
    if "ROWS" in block:
        block["ROWS"] = min(block["ROWS"], block["BLOCK_P"])
    tiles = triton.cdiv(height * width, block["BLOCK_P"])
    splits = max(1, min(tiles, PROGRAMS * multiprocessors(x.device) // max(batch, 1)))
    per_split = triton.cdiv(tiles, splits) * block["BLOCK_P"]
    splits = triton.cdiv(height * width, max(per_split, 1))
    return batch * splits, (height * width, per_split, splits), block


def new_sums(x: Tensor, splits: int) -> Tensor:
    """Two sums of every channel for each part of the pixels: fp32 `[B, splits, 2, C]`."""
    return x.new_empty(len(x), splits, 2, x.shape[1], dtype=torch.float32)


def channel_sums(
    h: Tensor,
    total: Tensor | None = None,
    residual: Tensor | None = None,
    channel_bias: Tensor | None = None,
    phases: bool = False,
) -> Tensor:
    """Sums of every channel, and of its squares, of h, or of total = h + channel_bias + residual, written here."""
    x = h if total is None else total
    channels, width = x.shape[1], x.shape[3]
    programs, (pixels, *sizes), block = over_pixels(STATISTICS if total is None else SUM_STATISTICS, x)
    sums = new_sums(x, sizes[1])
    maps = (h, None if residual is None else channels_last(residual), contiguous(channel_bias), total)
    sizes = (h.shape[1:].numel() // channels, pixels, width, *sizes)
    launch(group_norm_statistics_kernel, (programs,), *maps, sums, *sizes, C=channels, PHASES=phases, **block)
    return sums


def group_statistics(
    x: Tensor,
    sums: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    channel_bias: Tensor | None = None,
    shifted: bool = True,
) -> tuple[Tensor, Tensor]:
    """Of the norm of x + channel_bias: the groups' means and reciprocal standard deviations, fp32 `[2, B, groups]`;
    scale and shift of every channel of x, fp32 `[B, 2, C]`. shifted: the sums are of x less its first pixel."""
    batch, channels, height, width = x.shape
    statistics = x.new_empty(2, batch, groups, dtype=torch.float32)
    affine = x.new_empty(batch, 2, channels, dtype=torch.float32)
    constants = {"C": channels, "GROUPS": groups, "BLOCK_G": next_power_of_2(channels // groups), **FINISH}
    tensors = (x if shifted else None, channel_bias, weight.contiguous(), bias.contiguous(), sums, *statistics, affine)
    sizes = (height * width, sums.shape[1])
    launch(group_norm_finish_kernel, (batch * groups,), *tensors, *sizes, eps, **constants)
    return statistics, affine


def normalized(x: Tensor, affine: Tensor, silu: bool = True, normed_scale: float | None = None) -> Tensor:
    """x · scale + shift, and SiLU of it; with a scale for it in float8_e4m3fn."""
    y = normed_like(x, normed_scale)
    programs, sizes, block = over_pixels(APPLY, x)
    maps = (x, affine, y, None if normed_scale is None else 1 / normed_scale)
    launch(group_norm_silu_apply_kernel, (programs,), *maps, *sizes, C=x.shape[1], SILU=silu, **block)
    return y


def normed_like(x: Tensor, normed_scale: float | None) -> Tensor:
    return torch.empty_like(x, dtype=x.dtype if normed_scale is None else torch.float8_e4m3fn)


@torch.library.custom_op("vapi_fast::group_norm_silu", mutates_args=())
def group_norm_silu_op(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    x = channels_last(x)
    statistics, affine = group_statistics(x, channel_sums(x), weight, bias, groups, eps)
    return normalized(x, affine), statistics


@torch.library.custom_op("vapi_fast::group_norm_silu_backward", mutates_args=())
def group_norm_silu_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = channels_last(x), channels_last(dy)
    channels, groups = x.shape[1], statistics.shape[2]
    inputs = (dy, x, weight.contiguous(), bias.contiguous(), *statistics)
    shape = {"C": channels, "GROUPS": groups}

    programs, sizes, block = over_pixels(REDUCE, x)
    sums = new_sums(x, sizes[-1])
    launch(group_norm_silu_reduce_kernel, (programs,), *inputs, sums, *sizes, **shape, **block)
    total = sums.sum(1)  # [B, 2, C]: Σ dh, Σ dh·x̂
    dbias, dweight = total.sum(0)
    means = (total * weight.float()).unflatten(-1, (groups, -1)).sum(-1) / (sizes[0] * (channels // groups))
    means = [part.contiguous() for part in means.unbind(1)]
    programs, sizes, block = over_pixels(BACKWARD, x)
    dx = torch.empty_like(x)
    launch(group_norm_silu_backward_kernel, (programs,), *inputs, *means, dx, *sizes, **shape, **block)
    return dx, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)


@torch.library.custom_op("vapi_fast::bias_group_norm_silu", mutates_args=())
def bias_group_norm_silu_op(
    h: Tensor, channel_bias: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    h, channel_bias = channels_last(h), channel_bias.contiguous()
    return normalized(h, group_statistics(h, channel_sums(h), weight, bias, groups, eps, channel_bias)[1])


@torch.library.custom_op("vapi_fast::add_group_norm_silu", mutates_args=())
def add_group_norm_silu_op(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    residual: Tensor | None,
    channel_bias: Tensor | None,
    phases: bool,
    silu: bool,
    normed_scale: float | None,
) -> tuple[Tensor, Tensor]:
    h, total = channels_last(h), empty_sum(h, phases)
    sums = channel_sums(h, total, residual, channel_bias, phases)
    return total, normalized(total, group_statistics(total, sums, weight, bias, groups, eps)[1], silu, normed_scale)


def empty_sum(h: Tensor, phases: bool) -> Tensor:
    """A new map, channels-last, for the sum of h and others."""
    batch, channels, height, width = h.shape
    if phases:
        channels, height, width = channels // 4, 2 * (height - 1), 2 * (width - 1)
    shape = (batch, channels, height, width)
    return torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=torch.channels_last)


@group_norm_silu_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    return empty_sum(x, phases=False), x.new_empty(2, x.shape[0], groups, dtype=torch.float32)


@group_norm_silu_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty_sum(x, phases=False), torch.empty_like(weight), torch.empty_like(bias)


bias_group_norm_silu_op.register_fake(lambda h, *_: empty_sum(h, phases=False))


@add_group_norm_silu_op.register_fake
def _(h: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, phases, _, normed_scale = others
    total = empty_sum(h, phases)
    return total, normed_like(total, normed_scale)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *group_norm_silu_backward_op(dy, *ctx.saved_tensors), None, None


group_norm_silu_op.register_autograd(_gradient, setup_context=_context)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm with SiLU, one statistics pass and one apply pass; see `vapi_fast.ops.group_norm_silu`."""
    check_dtypes("group_norm_silu", x=x, weight=weight, bias=bias)
    y = group_norm_silu_op(x, weight, bias, groups, eps)[0]
    return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


def bias_group_norm_silu(
    h: Tensor, channel_bias: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """GroupNorm with SiLU that adds a convolution's bias; see `vapi_fast.ops.bias_group_norm_silu`."""
    check_dtypes("bias_group_norm_silu", h=h, channel_bias=channel_bias, weight=weight, bias=bias)
    return bias_group_norm_silu_op(h, channel_bias, weight, bias, groups, eps)


def add_group_norm_silu(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    residual: Tensor | None = None,
    channel_bias: Tensor | None = None,
    phases: bool = False,
    silu: bool = True,
    normed_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum with its statistics in one pass, its norm in another; see `vapi_fast.ops.add_group_norm_silu`."""
    check_dtypes("add_group_norm_silu", h=h, weight=weight, bias=bias, residual=residual, channel_bias=channel_bias)
    options = (residual, channel_bias, phases, silu, normed_scale)
    return add_group_norm_silu_op(h, weight, bias, groups, eps, *options)
