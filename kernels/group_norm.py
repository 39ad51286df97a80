"""GroupNorm with SiLU over channels-last maps, and over the residual stream of a frozen decoder.

Bound by memory bandwidth. x: bytes of one map.

| kernel                   | bytes moved                                                      | FLOPs per element |
|--------------------------|------------------------------------------------------------------|-------------------|
| group_norm_statistics    | x read; of a sum, its addends read and itself written: 2x or 3x  | 4, of a sum 6     |
| group_norm_finish        | partial sums only: 8·B·SPLITS·C                                  | -                 |
| group_norm_silu_apply    | 2x (x read, y written)                                           | 8                 |
| group_norm_silu_reduce   | 2x (x and dy read)                                               | 20                |
| group_norm_silu_backward | 3x (x and dy read, dx written)                                   | 25                |

In a decoder the pass that writes the next map of the residual stream takes the norm's statistics too: a map is written
by one pass and read by one more, 5x for a block's end, 4x for an upsampled map. Inside a block, where the sum is no
one's residual, it is never written: statistics, finish and apply read the convolution's result twice and write its
norm, 3x, and add the convolution's bias on the way. A residual block moves 8x, where separate passes for two biases
(2x each), two norms (3x each) and the addition (3x) would move 13x. Decoding an image of 384² pixels with VQ-16 in
bf16 moves 1.49 GB so, 0.50 ms at 3.0 TB/s.
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

STATISTICS = {"BLOCK_ELEMENTS": 8192, "num_warps": 8, "num_stages": 2}
SUM_STATISTICS = {"BLOCK_ELEMENTS": 4096, "num_warps": 8, "num_stages": 1}
FINISH = {"BLOCK_SPLITS": 16, "num_warps": 1, "num_stages": 1}
APPLY = {"BLOCK_ELEMENTS": 8192, "num_warps": 8, "num_stages": 1}
REDUCE = {"BLOCK_ELEMENTS": 4096, "num_warps": 8, "num_stages": 1}
BACKWARD = {"BLOCK_ELEMENTS": 4096, "num_warps": 8, "num_stages": 1}


@triton.jit
def channel_row(pointer, index, inside):
    """One fp32 number for each channel, as a row beside pixels: `[1, BLOCK_C]`."""
    return tl.load(pointer + index, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def before_silu(dy, x, mean, rstd, weight, bias):
    """x̂, and the gradient of SiLU's input h = x̂ · weight + bias."""
    normed = (x - mean) * rstd
    h = normed * weight + bias
    gate = tl.sigmoid(h)
    return normed, dy * gate * (1 + h * (1 - gate))


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
    shift = channel_row(h_base, channel, inside_c)
    if channel_bias_ptr is not None:
        channel_bias = channel_row(channel_bias_ptr, channel, inside_c)
        shift += channel_bias
    if residual_ptr is not None:
        shift += channel_row(residual_ptr + base, channel, inside_c)
    shift = shift.to(h_ptr.dtype.element_ty).to(tl.float32)
    # A sum for each place of the tile: adding up its rows at every step would need a barrier.
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    last = tl.minimum(P, (split + 1) * pixels_per_split)
    for start in range(split * pixels_per_split, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = (pixel < last)[:, None] & inside_c[None, :]
        offset = pixel[:, None] * C + channel[None, :]
        h_row = pixel
        if PHASES:
            y, x = pixel // width, pixel % width
            h_row = ((y + 1) // 2 * (width // 2 + 1) + (x + 1) // 2) * 4 + y % 2 * 2 + x % 2
        value = tl.load(h_base + h_row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        if channel_bias_ptr is not None:
            value += channel_bias
        if residual_ptr is not None:
            value += tl.load(residual_ptr + base + offset, mask=inside, other=0.0).to(tl.float32)
        value = value.to(h_ptr.dtype.element_ty)
        if sum_ptr is not None:
            tl.store(sum_ptr + base + offset, value, mask=inside)
        centred = tl.where(inside, value.to(tl.float32) - shift, 0.0)
        total += centred
        squares += centred * centred
    out = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C + channel
    tl.store(out, tl.sum(total, axis=0), mask=inside_c)
    tl.store(out + C, tl.sum(squares, axis=0), mask=inside_c)


@triton.jit(do_not_specialize=["P", "SPLITS"])
def group_norm_finish_kernel(
    x_ptr,
    channel_bias_ptr,
    sums_ptr,
    mean_ptr,
    rstd_ptr,
    P,
    SPLITS,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of one group of one image, fp32 `[B, groups]`, from the channels' sums.

    The sums are those of x; the mean and variance are those of x + channel_bias, which moves whole channels.
    """
    image, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    size: tl.constexpr = C // GROUPS
    within = tl.arange(0, BLOCK_G)
    channel = group * size + within
    shift = tl.load(x_ptr + image.to(tl.int64) * P * C + channel, mask=within < size, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    squares = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, SPLITS, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        inside = (split < SPLITS)[:, None] & (within < size)[None, :]
        row = sums_ptr + (image.to(tl.int64) * SPLITS + split[:, None]) * 2 * C + channel[None, :]
        total += tl.sum(tl.load(row, mask=inside, other=0.0), axis=0)
        squares += tl.sum(tl.load(row + C, mask=inside, other=0.0), axis=0)
    channel_mean = shift + total / P
    if channel_bias_ptr is not None:
        channel_mean += tl.load(channel_bias_ptr + channel, mask=within < size, other=0.0).to(tl.float32)
    mean = tl.sum(tl.where(within < size, channel_mean, 0.0), axis=0) / size
    deviation = tl.where(within < size, channel_mean - mean, 0.0)
    variance = tl.sum((squares - total * (total / P)) / P + deviation * deviation, axis=0) / size
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), tl.rsqrt(tl.maximum(variance, 0.0) + eps))


@triton.jit(do_not_specialize=["P", "blocks"])
def group_norm_silu_apply_kernel(
    x_ptr,
    channel_bias_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    P,
    blocks,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = SiLU((x + channel_bias − mean) · rstd · weight + bias) for BLOCK_P pixels of one image, all channels."""
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = tl.arange(0, BLOCK_C)
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < P)[:, None] & (channel < C)[None, :]
    group = image * GROUPS + channel // (C // GROUPS)
    inside_c = channel < C
    mean = channel_row(mean_ptr, group, inside_c)
    scale = channel_row(rstd_ptr, group, inside_c) * channel_row(weight_ptr, channel, inside_c)
    bias = channel_row(bias_ptr, channel, inside_c)
    if channel_bias_ptr is not None:
        mean -= channel_row(channel_bias_ptr, channel, inside_c)
    offset = image.to(tl.int64) * P * C + pixel[:, None] * C + channel[None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    h = (x - mean) * scale + bias
    if SILU:
        h *= tl.sigmoid(h)
    tl.store(y_ptr + offset, h.to(y_ptr.dtype.element_ty), mask=inside)


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
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    last = tl.minimum(P, (split + 1) * pixels_per_split)
    for start in range(split * pixels_per_split, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = (pixel < last)[:, None] & (channel < C)[None, :]
        offset = image.to(tl.int64) * P * C + pixel[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        normed, dh = before_silu(dy, x, mean, rstd, weight, bias)
        total += dh
        products += dh * normed
    out = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C + channel
    tl.store(out, tl.sum(total, axis=0), mask=channel < C)
    tl.store(out + C, tl.sum(products, axis=0), mask=channel < C)


@triton.jit(do_not_specialize=["P", "blocks"])
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
    blocks,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = rstd · (dh·w − mean(dh·w) − x̂ · mean(dh·w·x̂)); the two means of a group are fp32 `[B, groups]`."""
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = tl.arange(0, BLOCK_C)
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < P)[:, None] & (channel < C)[None, :]
    group = image * GROUPS + channel // (C // GROUPS)
    inside_c = channel < C
    mean = channel_row(mean_ptr, group, inside_c)
    rstd = channel_row(rstd_ptr, group, inside_c)
    dmean = channel_row(dmean_ptr, group, inside_c)
    dproduct = channel_row(dproduct_ptr, group, inside_c)
    weight = channel_row(weight_ptr, channel, inside_c)
    bias = channel_row(bias_ptr, channel, inside_c)
    offset = image.to(tl.int64) * P * C + pixel[:, None] * C + channel[None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    normed, dh = before_silu(dy, x, mean, rstd, weight, bias)
    dx = rstd * (dh * weight - dmean - normed * dproduct)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def pixel_splits(x: Tensor, block_p: int) -> tuple[int, int]:
    """Programs an image for a reduction over its pixels, and the pixels of each, a multiple of block_p."""
    batch, _, height, width = x.shape
    blocks = triton.cdiv(height * width, block_p)
    splits = min(blocks, triton.cdiv(4 * multiprocessors(x.device), max(batch, 1)))
    per_split = triton.cdiv(blocks, max(splits, 1)) * block_p
    return triton.cdiv(height * width, per_split), per_split


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
    batch, channels, height, width = x.shape
    block = channel_blocks(STATISTICS if total is None else SUM_STATISTICS, channels, "BLOCK_P")
    splits, per_split = pixel_splits(x, block["BLOCK_P"])
    sums = new_sums(x, splits)
    maps = (h, None if residual is None else channels_last(residual), contiguous(channel_bias), total)
    sizes = (h.shape[1:].numel() // channels, height * width, width, per_split, splits)
    constants = {"C": channels, "PHASES": phases, **block}
    launch(group_norm_statistics_kernel, (batch * splits,), *maps, sums, *sizes, **constants)
    return sums


def group_statistics(x: Tensor, sums: Tensor, groups: int, eps: float, channel_bias: Tensor | None = None) -> Tensor:
    """Means and reciprocal standard deviations of the groups of x + channel_bias: fp32 `[2, B, groups]`."""
    batch, channels, height, width = x.shape
    statistics = x.new_empty(2, batch, groups, dtype=torch.float32)
    constants = {"C": channels, "GROUPS": groups, "BLOCK_G": next_power_of_2(channels // groups), **FINISH}
    sizes = (height * width, sums.shape[1])
    launch(group_norm_finish_kernel, (batch * groups,), x, channel_bias, sums, *statistics, *sizes, eps, **constants)
    return statistics


def normalized(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    channel_bias: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """The norm of x + channel_bias with these statistics, and SiLU of it."""
    y = torch.empty_like(x)
    batch, channels, height, width = x.shape
    block = channel_blocks(APPLY, channels, "BLOCK_P")
    blocks = triton.cdiv(height * width, block["BLOCK_P"])
    tensors = (x, channel_bias, weight.contiguous(), bias.contiguous(), *statistics, y)
    constants = {"C": channels, "GROUPS": statistics.shape[2], "SILU": silu, **block}
    launch(group_norm_silu_apply_kernel, (batch * blocks,), *tensors, height * width, blocks, **constants)
    return y


@torch.library.custom_op("vapi_fast::group_norm_silu", mutates_args=())
def group_norm_silu_op(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    x = channels_last(x)
    statistics = group_statistics(x, channel_sums(x), groups, eps)
    return normalized(x, weight, bias, statistics), statistics


@torch.library.custom_op("vapi_fast::group_norm_silu_backward", mutates_args=())
def group_norm_silu_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = channels_last(x), channels_last(dy)
    batch, channels, height, width = x.shape
    groups, pixels = statistics.shape[2], height * width
    inputs = (dy, x, weight.contiguous(), bias.contiguous(), *statistics)
    shape = {"C": channels, "GROUPS": groups}

    block = channel_blocks(REDUCE, channels, "BLOCK_P")
    splits, per_split = pixel_splits(x, block["BLOCK_P"])
    sums = new_sums(x, splits)
    sizes = (pixels, per_split, splits)
    launch(group_norm_silu_reduce_kernel, (batch * splits,), *inputs, sums, *sizes, **shape, **block)
    total = sums.sum(1)  # [B, 2, C]: Σ dh, Σ dh·x̂
    dbias, dweight = total.sum(0)
    means = (total * weight.float()).unflatten(-1, (groups, -1)).sum(-1) / (pixels * (channels // groups))
    means = [part.contiguous() for part in means.unbind(1)]
    block = channel_blocks(BACKWARD, channels, "BLOCK_P")
    blocks, dx = triton.cdiv(pixels, block["BLOCK_P"]), torch.empty_like(x)
    launch(group_norm_silu_backward_kernel, (batch * blocks,), *inputs, *means, dx, pixels, blocks, **shape, **block)
    return dx, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)


@torch.library.custom_op("vapi_fast::bias_group_norm_silu", mutates_args=())
def bias_group_norm_silu_op(
    h: Tensor, channel_bias: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    h, channel_bias = channels_last(h), channel_bias.contiguous()
    statistics = group_statistics(h, channel_sums(h), groups, eps, channel_bias)
    return normalized(h, weight, bias, statistics, channel_bias)


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
) -> tuple[Tensor, Tensor]:
    h, total = channels_last(h), empty_sum(h, phases)
    sums = channel_sums(h, total, residual, channel_bias, phases)
    return total, normalized(total, weight, bias, group_statistics(total, sums, groups, eps), silu=silu)


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
add_group_norm_silu_op.register_fake(lambda h, *o: (empty_sum(h, phases=o[-2]), empty_sum(h, phases=o[-2])))


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
) -> tuple[Tensor, Tensor]:
    """The sum with its statistics in one pass, its norm in another; see `vapi_fast.ops.add_group_norm_silu`."""
    check_dtypes("add_group_norm_silu", h=h, weight=weight, bias=bias, residual=residual, channel_bias=channel_bias)
    return add_group_norm_silu_op(h, weight, bias, groups, eps, residual, channel_bias, phases, silu)
