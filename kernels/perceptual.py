"""Perceptual and squared distances of image groups to their reference image. All bound by memory bandwidth.

| kernel         | bytes moved (a: bytes of the group's maps, b: of the reference's)    | FLOPs per element of a |
|----------------|----------------------------------------------------------------------|------------------------|
| lpips_forward  | a + b                                                                | 7                      |
| lpips_max_pool | 1.25 (a + b)                                                         | 8                      |
| lpips_backward | 2a + b for the gradient to a, a + 2b for that to b, 2a + 2b for both | 15                     |
| mse_forward    | a + b                                                                | 3                      |
| mse_backward   | as lpips_backward                                                    | 3                      |
| scaled_pixels  | the images, and channels / C times as many numbers of the result     | 2                      |
| row_sums       | partial sums only: 4 bytes for each 4096 elements of a               | -                      |

A program holds one tile of the reference in registers while the group's tiles go by, the next STAGES − 1 of them under
way. Sums over pixels leave it as one partial sum a rollout. `row_sums` adds these up, in an order that depends on
neither the batch nor the group: a rollout's distance is the same bit for bit in any company.

`lpips_max_pool` also takes the maxima of a level's 2×2 pixels, which the network goes on with, where pooling by itself
would read the maps once more. A step of LlamaGen-XXL (1024 rollouts of 128 images at 384², 35.4 MB of VGG16's first
four levels each in bf16) moves 40.8 GB less so, 13.6 ms at 3.0 TB/s: predicted.

The LPIPS kernels are launched without contraction to fused multiply-adds: a·s − b̂ with b̂ rounded and a·s not would
give equal features a distance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES, channel_blocks, channels_last, check_dtypes, contiguous, launch, multiprocessors

LPIPS_FORWARD = {"BLOCK_ELEMENTS": 4096, "num_warps": 4, "num_stages": 3}
LPIPS_MAX_POOL = {"BLOCK_ELEMENTS": 1024, "num_warps": 4, "num_stages": 3}  # of a quarter of the pixels
LPIPS_BACKWARD = {"BLOCK_ELEMENTS": 2048, "num_warps": 4, "num_stages": 3}
MSE = {"BLOCK": 4096, "num_warps": 4, "num_stages": 3}
ROW_SUMS = {"BLOCK": 2048, "num_warps": 8, "num_stages": 1}
SCALED = {"BLOCK_ELEMENTS": 4096, "num_warps": 4, "num_stages": 1}
PROGRAMS_PER_MULTIPROCESSOR = 8  # what it takes to hide the latency of device memory
CHANNEL_EPS = tl.constexpr(1e-10)


@triton.jit
def inverse_norm(x):
    """1 / (|x| + eps) and |x| of each row of fp32 `[pixels, channels]`."""
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    return 1.0 / (norm + CHANNEL_EPS), norm


@triton.jit
def through_norm(dunit, unit, scale, norm):
    """Gradient to x from that to x̂ = x · scale, scale = 1 / (norm + eps)."""
    along = tl.sum(unit * dunit, axis=1) / tl.where(norm == 0.0, 1.0, scale * norm)
    return scale[:, None] * (dunit - unit * along[:, None])


@triton.jit(do_not_specialize=["P", "G", "blocks", "splits", "rollouts", "stride_partial"])
def lpips_forward_kernel(
    a_ptr,
    b_ptr,
    weight_ptr,
    partial_ptr,
    P,
    C,
    G,
    blocks,
    splits,
    rollouts,
    stride_partial,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Σ_pixels Σ_c w (â − b̂)² / P over one block of pixels, for `rollouts` of an image's G: fp32 `[B·G, blocks]`.

    a is `[B·G, P, C]`, b `[B, P, C]`; rows of the result are `stride_partial` apart.
    """
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    image, block = (tile // blocks).to(tl.int64), tile % blocks
    first, last = split * rollouts, tl.minimum(G, (split + 1) * rollouts)
    channel = tl.arange(0, BLOCK_C)
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < P)[:, None] & (channel < C)[None, :]
    # Offset within a map: the block's as one 64-bit number, the elements' in 32 bits.
    start = block.to(tl.int64) * BLOCK_P * C
    within = tl.arange(0, BLOCK_P)[:, None] * C + channel[None, :]
    b = tl.load(b_ptr + image * P * C + start + within, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    scale_b, _ = inverse_norm(b)
    unit_b = b * scale_b[:, None]
    for rollout in tl.range(first, last, num_stages=STAGES):
        row = image * G + rollout
        a = tl.load(a_ptr + row * P * C + start + within, mask=inside, other=0.0).to(tl.float32)
        scale_a, _ = inverse_norm(a)
        difference = a * scale_a[:, None] - unit_b
        total = tl.sum(tl.sum(weight * difference * difference, axis=1), axis=0) / P
        tl.store(partial_ptr + row * stride_partial + block, total)


@triton.jit
def weighed_difference(a, unit_b, weight):
    """w (â − b̂)² of fp32 `[pixels, channels]`."""
    scale, _ = inverse_norm(a)
    difference = a * scale[:, None] - unit_b
    return weight * difference * difference


@triton.jit
def unit(x):
    scale, _ = inverse_norm(x)
    return x * scale[:, None]


@triton.jit
def largest(x00, x01, x10, x11):
    """NaN where one of them is."""
    above = tl.maximum(x00, x01, propagate_nan=tl.PropagateNan.ALL)
    below = tl.maximum(x10, x11, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(above, below, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["H", "W", "G", "blocks", "splits", "rollouts"])
def lpips_max_pool_kernel(
    a_ptr,
    b_ptr,
    weight_ptr,
    partial_ptr,
    pooled_a_ptr,
    pooled_b_ptr,
    H,
    W,
    C,
    G,
    blocks,
    splits,
    rollouts,
    BLOCK_WINDOWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `lpips_forward_kernel` over one block of 2×2 windows, and the maxima of those that lie inside, of a and of b.

    a is `[B·G, H, W, C]`, b `[B, H, W, C]`; the maxima are `[…, H // 2, W // 2, C]`. A tile holds one pixel of each
    window, of which a window at an odd edge lacks some.
    """
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    image, block = (tile // blocks).to(tl.int64), tile % blocks
    first, last = split * rollouts, tl.minimum(G, (split + 1) * rollouts)
    channel = tl.arange(0, BLOCK_C)
    window = block * BLOCK_WINDOWS + tl.arange(0, BLOCK_WINDOWS)
    across = (W + 1) // 2
    y, x = window // across, window % across
    given, right, below = (channel < C)[None, :], (2 * x + 1 < W)[:, None], (2 * y + 1 < H)[:, None]
    in00 = (2 * y < H)[:, None] & given
    in01, in10, in11 = in00 & right, in00 & below, in00 & right & below
    at00 = (2 * y.to(tl.int64) * W + 2 * x)[:, None] * C + channel[None, :]
    at01, at10 = at00 + C, at00 + W * C
    at11 = at10 + C
    pooled = (y.to(tl.int64) * (W // 2) + x)[:, None] * C + channel[None, :]
    size, pooled_size = H.to(tl.int64) * W * C, (H // 2).to(tl.int64) * (W // 2) * C
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    b_map = b_ptr + image * size
    b00 = tl.load(b_map + at00, mask=in00, other=0.0).to(tl.float32)
    b01 = tl.load(b_map + at01, mask=in01, other=0.0).to(tl.float32)
    b10 = tl.load(b_map + at10, mask=in10, other=0.0).to(tl.float32)
    b11 = tl.load(b_map + at11, mask=in11, other=0.0).to(tl.float32)
    if split == 0:
        out = pooled_b_ptr + image * pooled_size + pooled
        tl.store(out, largest(b00, b01, b10, b11).to(pooled_b_ptr.dtype.element_ty), mask=in11)
    b00, b01, b10, b11 = unit(b00), unit(b01), unit(b10), unit(b11)
    for rollout in tl.range(first, last, num_stages=STAGES):
        row = image * G + rollout
        a_map = a_ptr + row * size
        a00 = tl.load(a_map + at00, mask=in00, other=0.0).to(tl.float32)
        a01 = tl.load(a_map + at01, mask=in01, other=0.0).to(tl.float32)
        a10 = tl.load(a_map + at10, mask=in10, other=0.0).to(tl.float32)
        a11 = tl.load(a_map + at11, mask=in11, other=0.0).to(tl.float32)
        out = pooled_a_ptr + row * pooled_size + pooled
        tl.store(out, largest(a00, a01, a10, a11).to(pooled_a_ptr.dtype.element_ty), mask=in11)
        above = weighed_difference(a00, b00, weight) + weighed_difference(a01, b01, weight)
        total = above + weighed_difference(a10, b10, weight) + weighed_difference(a11, b11, weight)
        tl.store(partial_ptr + row * blocks + block, tl.sum(tl.sum(total, axis=1), axis=0) / (H * W))


@triton.jit(do_not_specialize=["P", "G", "blocks", "splits", "rollouts"])
def lpips_backward_kernel(
    ddistance_ptr,
    a_ptr,
    b_ptr,
    weight_ptr,
    da_ptr,
    db_ptr,
    dweight_ptr,
    P,
    C,
    G,
    blocks,
    splits,
    rollouts,
    NEEDS_A: tl.constexpr,
    NEEDS_B: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """da, db and each program's share of dweight (fp32 `[programs, C]`), those needed; db needs splits = 1.

    With n = |a|, s = 1 / (n + eps), â = s·a and h = ∂d/∂â: da = s (h − â (â·h) / (s·n)), and s·h where n = 0.
    """
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    image, block = (tile // blocks).to(tl.int64), tile % blocks
    first, last = split * rollouts, tl.minimum(G, (split + 1) * rollouts)
    channel = tl.arange(0, BLOCK_C)
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < P)[:, None] & (channel < C)[None, :]
    # Offset within a map: the block's as one 64-bit number, the elements' in 32 bits.
    start = block.to(tl.int64) * BLOCK_P * C
    within = tl.arange(0, BLOCK_P)[:, None] * C + channel[None, :]
    b = tl.load(b_ptr + image * P * C + start + within, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    scale_b, norm_b = inverse_norm(b)
    unit_b = b * scale_b[:, None]
    if NEEDS_B:
        dunit_b = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if NEEDS_WEIGHT:
        squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for rollout in tl.range(first, last, num_stages=STAGES):
        row = image * G + rollout
        a = tl.load(a_ptr + row * P * C + start + within, mask=inside, other=0.0).to(tl.float32)
        ddistance = tl.load(ddistance_ptr + row) / P
        scale_a, norm_a = inverse_norm(a)
        unit_a = a * scale_a[:, None]
        difference = unit_a - unit_b
        if NEEDS_WEIGHT:
            squares += ddistance * difference * difference
        if NEEDS_A or NEEDS_B:
            dunit = (2.0 * ddistance) * weight * difference
        if NEEDS_A:
            da = through_norm(dunit, unit_a, scale_a, norm_a)
            out = da_ptr + row * P * C + start + within
            tl.store(out, da.to(da_ptr.dtype.element_ty), mask=inside)
        if NEEDS_B:
            dunit_b -= dunit
    if NEEDS_B:
        db = through_norm(dunit_b, unit_b, scale_b, norm_b)
        tl.store(db_ptr + image * P * C + start + within, db.to(db_ptr.dtype.element_ty), mask=inside)
    if NEEDS_WEIGHT:
        out = dweight_ptr + tl.program_id(0).to(tl.int64) * C + channel
        tl.store(out, tl.sum(squares, axis=0), mask=channel < C)


@triton.jit(do_not_specialize=["G", "blocks", "splits", "rollouts"])
def mse_forward_kernel(
    a_ptr, b_ptr, partial_ptr, N, G, blocks, splits, rollouts, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """Σ (a − b)² / N over one block of an image's N elements, for `rollouts` of its G: fp32 `[B·G, blocks]`."""
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    image, block = (tile // blocks).to(tl.int64), tile % blocks
    first, last = split * rollouts, tl.minimum(G, (split + 1) * rollouts)
    start, within = block.to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    inside = within < N - start
    b = tl.load(b_ptr + image * N + start + within, mask=inside, other=0.0).to(tl.float32)
    for rollout in tl.range(first, last, num_stages=STAGES):
        row = image * G + rollout
        a = tl.load(a_ptr + row * N + start + within, mask=inside, other=0.0).to(tl.float32)
        difference = a - b
        total = tl.sum(difference * difference, axis=0) / N
        tl.store(partial_ptr + row * blocks + block, total)


@triton.jit(do_not_specialize=["G", "blocks", "splits", "rollouts"])
def mse_backward_kernel(
    derror_ptr,
    a_ptr,
    b_ptr,
    da_ptr,
    db_ptr,
    N,
    G,
    blocks,
    splits,
    rollouts,
    NEEDS_A: tl.constexpr,
    NEEDS_B: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """da = 2 (a − b) · derror / N, and db = −Σ_g da, those needed; db needs splits = 1."""
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    image, block = (tile // blocks).to(tl.int64), tile % blocks
    first, last = split * rollouts, tl.minimum(G, (split + 1) * rollouts)
    start, within = block.to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    inside = within < N - start
    b = tl.load(b_ptr + image * N + start + within, mask=inside, other=0.0).to(tl.float32)
    if NEEDS_B:
        db = tl.zeros([BLOCK], tl.float32)
    for rollout in tl.range(first, last, num_stages=STAGES):
        row = image * G + rollout
        a = tl.load(a_ptr + row * N + start + within, mask=inside, other=0.0).to(tl.float32)
        da = (2.0 * tl.load(derror_ptr + row) / N) * (a - b)
        if NEEDS_A:
            tl.store(da_ptr + row * N + start + within, da.to(da_ptr.dtype.element_ty), mask=inside)
        if NEEDS_B:
            db -= da
    if NEEDS_B:
        tl.store(db_ptr + image * N + start + within, db.to(db_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["P", "tiles", "stride_b", "stride_c"])
def scaled_pixels_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    y_ptr,
    P,
    tiles,
    stride_b,
    stride_c,
    stride_p,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = (x − shift) / scale for one tile of an image's P pixels, `[B, P, CHANNELS]`; beyond the first C, zeros."""
    image, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    pixel, channel = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    given, inside = channel < C, pixel < P
    shift = tl.load(shift_ptr + channel, mask=given, other=0.0).to(tl.float32)[None, :]
    scale = tl.load(scale_ptr + channel, mask=given, other=1.0).to(tl.float32)[None, :]
    place = image * stride_b + pixel.to(tl.int64)[:, None] * stride_p + channel.to(tl.int64)[None, :] * stride_c
    x = tl.load(x_ptr + place, mask=inside[:, None] & given[None, :], other=0.0).to(tl.float32)
    y = (x - shift) / scale
    out = y_ptr + image * P * CHANNELS + pixel[:, None] * CHANNELS + channel[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (channel < CHANNELS)[None, :])


@triton.jit
def row_sums_kernel(x_ptr, before_ptr, sum_ptr, columns, BLOCK: tl.constexpr):
    """Sum of each row of fp32 `[rows, columns]`, added to the sum before, if there is one."""
    row = x_ptr + tl.program_id(0).to(tl.int64) * columns
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.load(row + column, mask=column < columns, other=0.0)
    found = tl.sum(total, axis=0)
    if before_ptr is not None:
        found += tl.load(before_ptr + tl.program_id(0)).to(tl.float32)
    tl.store(sum_ptr + tl.program_id(0), found)


def maps_of(x: Tensor) -> Tensor:
    """`[B, (G,) C, H, W]` as `[B·G, C, H, W]`: a view where the maps lie one behind the other."""
    return x.flatten(0, 1) if x.ndim == 5 else x


def group_size(a: Tensor) -> int:
    return a.shape[1] if a.ndim == 5 else 1


def group_splits(tiles: int, group: int, device: torch.device, *, shared: bool = False) -> tuple[int, int]:
    """Programs that share a tile's group, more than one where tiles are few, and the rollouts of each.

    shared: a sum over the group is wanted, all of which one program must see then.
    """
    if shared:
        return 1, group
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device), max(tiles, 1))
    rollouts = max(triton.cdiv(group, wanted), 1)
    return max(triton.cdiv(group, rollouts), 1), rollouts


def row_sums(x: Tensor, before: Tensor | None = None) -> Tensor:
    rows, columns = x.shape
    sums = x.new_empty(rows)
    launch(row_sums_kernel, (rows,), x, before, sums, columns, **ROW_SUMS)
    return sums


@torch.library.custom_op("vapi_fast::lpips_distance", mutates_args=())
def lpips_distance_op(features_a: list[Tensor], features_b: list[Tensor], weights: list[Tensor]) -> Tensor:
    batch, group = len(features_b[0]), group_size(features_a[0])
    constants = [channel_blocks(LPIPS_FORWARD, b.shape[1], "BLOCK_P") for b in features_b]
    blocks = [triton.cdiv(b.shape[2:].numel(), each["BLOCK_P"]) for b, each in zip(features_b, constants, strict=True)]
    partial = features_a[0].new_empty(batch * group, sum(blocks), dtype=torch.float32)
    for level, (a, b, weight) in enumerate(zip(features_a, features_b, weights, strict=True)):
        splits, rollouts = group_splits(batch * blocks[level], group, a.device)
        launch(
            lpips_forward_kernel,
            (batch * blocks[level] * splits,),
            channels_last(maps_of(a)),
            channels_last(b),
            weight.contiguous(),
            partial[:, sum(blocks[:level]) :],
            *(b.shape[2:].numel(), b.shape[1], group, blocks[level], splits, rollouts, partial.stride(0)),
            enable_fp_fusion=False,
            STAGES=LPIPS_FORWARD["num_stages"],
            **constants[level],
        )
    return row_sums(partial).view(features_a[0].shape[:-3])


@torch.library.custom_op("vapi_fast::lpips_distance_backward", mutates_args=())
def lpips_distance_backward_op(
    ddistance: Tensor,
    features_a: list[Tensor],
    features_b: list[Tensor],
    weights: list[Tensor],
    needs_a: bool,
    needs_b: bool,
    needs_weights: bool,
) -> list[Tensor]:
    """Gradients to all of features_a, all of features_b and all weights, as far as needed, in this order."""
    ddistance = ddistance.contiguous()
    levels = zip(features_a, features_b, weights, strict=True)
    gradients = [lpips_level_backward(ddistance, *level, needs_a, needs_b, needs_weights) for level in levels]
    return [level[kind] for kind in range(3) for level in gradients if level[kind] is not None]


def lpips_level_backward(
    ddistance: Tensor, a: Tensor, b: Tensor, weight: Tensor, needs_a: bool, needs_b: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    batch, channels, height, width = b.shape
    group, pixels = group_size(a), height * width
    block = channel_blocks(LPIPS_BACKWARD, channels, "BLOCK_P")
    blocks = triton.cdiv(pixels, block["BLOCK_P"])
    splits, rollouts = group_splits(batch * blocks, group, a.device, shared=needs_b)
    programs = batch * blocks * splits
    da = channels_last_like(a) if needs_a else None
    db = channels_last_like(b) if needs_b else None
    shares = a.new_empty(programs, channels, dtype=torch.float32) if needs_weight else None
    inputs = (ddistance, channels_last(maps_of(a)), channels_last(b), weight.contiguous())
    sizes = (pixels, channels, group, blocks, splits, rollouts)
    needs = {"NEEDS_A": needs_a, "NEEDS_B": needs_b, "NEEDS_WEIGHT": needs_weight}
    options = {"enable_fp_fusion": False, "STAGES": LPIPS_BACKWARD["num_stages"], **block}
    launch(lpips_backward_kernel, (programs,), *inputs, da, db, shares, *sizes, **needs, **options)
    return da, db, shares.sum(0).to(weight.dtype) if needs_weight else None


def channels_last_like(x: Tensor, *size: int) -> Tensor:
    """New maps as x, `[B, (G,) C, H, W]`, channels last in memory; size: their own H and W."""
    shape = (*x.shape[:-2], *(size or x.shape[-2:]))
    flat = (math.prod(shape[:-3]), *shape[-3:])
    return torch.empty(flat, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).view(shape)


@lpips_distance_op.register_fake
def _(features_a: list[Tensor], features_b: list[Tensor], weights: list[Tensor]) -> Tensor:
    return features_a[0].new_empty(features_a[0].shape[:-3], dtype=torch.float32)


@lpips_distance_backward_op.register_fake
def _(ddistance: Tensor, *options: Any) -> list[Tensor]:
    features_a, features_b, weights = ((x if need else []) for x, need in zip(options[:3], options[3:], strict=True))
    return [channels_last_like(x) for x in (*features_a, *features_b)] + [w.new_empty(w.shape) for w in weights]


def _lpips_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[0], *inputs[1], *inputs[2])


def _lpips_gradient(ctx: Any, ddistance: Tensor) -> tuple[list[Tensor | None], ...]:
    levels = len(ctx.saved_tensors) // 3
    inputs = [list(ctx.saved_tensors[start : start + levels]) for start in range(0, 3 * levels, levels)]
    needs = [any(flags) for flags in ctx.needs_input_grad]
    gradients = iter(lpips_distance_backward_op(ddistance, *inputs, *needs))
    return tuple([next(gradients) if need else None for _ in range(levels)] for need in needs)


lpips_distance_op.register_autograd(_lpips_gradient, setup_context=_lpips_context)


def lpips_distance(features_a: Sequence[Tensor], features_b: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """LPIPS distance in one pass over the features; see `vapi_fast.ops.lpips_distance`."""
    for level, (a, b, weight) in enumerate(zip(features_a, features_b, weights, strict=True)):
        names = (f"features_a[{level}]", f"features_b[{level}]", f"weights[{level}]")
        check_dtypes("lpips_distance", **dict(zip(names, (a, b, weight), strict=True)))
    return lpips_distance_op(list(features_a), list(features_b), list(weights))


@torch.library.custom_op("vapi_fast::lpips_distance_max_pool", mutates_args=())
def lpips_distance_max_pool_op(
    features_a: Tensor, features_b: Tensor, weight: Tensor, before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = features_b.shape
    group, maps = group_size(features_a), maps_of(features_a)
    block = channel_blocks(LPIPS_MAX_POOL, channels, "BLOCK_WINDOWS")
    blocks = triton.cdiv(triton.cdiv(height, 2) * triton.cdiv(width, 2), block["BLOCK_WINDOWS"])
    splits, rollouts = group_splits(batch * blocks, group, maps.device)
    partial = maps.new_empty(len(maps), blocks, dtype=torch.float32)
    pooled = pooled_like(features_a), pooled_like(features_b)
    tensors = (channels_last(maps), channels_last(features_b), weight.contiguous(), partial, *pooled)
    sizes = (height, width, channels, group, blocks, splits, rollouts)
    options = {"enable_fp_fusion": False, "STAGES": LPIPS_MAX_POOL["num_stages"], **block}
    launch(lpips_max_pool_kernel, (batch * blocks * splits,), *tensors, *sizes, **options)
    return row_sums(partial, contiguous(before)).view(features_a.shape[:-3]), *pooled


def pooled_like(x: Tensor) -> Tensor:
    return channels_last_like(x, x.shape[-2] // 2, x.shape[-1] // 2)


@lpips_distance_max_pool_op.register_fake
def _(features_a: Tensor, features_b: Tensor, weight: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    distance = features_a.new_empty(features_a.shape[:-3], dtype=torch.float32)
    return distance, pooled_like(features_a), pooled_like(features_b)


def lpips_distance_max_pool(
    features_a: Tensor, features_b: Tensor, weight: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One level's distance and both poolings in one pass; see `vapi_fast.ops.lpips_distance_max_pool`."""
    given = {"features_a": features_a, "features_b": features_b, "weight": weight, "before": before}
    check_dtypes("lpips_distance_max_pool", **given)
    return lpips_distance_max_pool_op(features_a, features_b, weight, before)


@torch.library.custom_op("vapi_fast::scaled_pixels", mutates_args=())
def scaled_pixels_op(images: Tensor, shift: Tensor, scale: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    if images.stride(2) != images.shape[3] * images.stride(3):  # the kernel takes pixels that are equally far apart
        images = channels_last(images)
    y = empty_pixels(images, channels, dtype)
    pixels = images.shape[2:].numel()
    block = channel_blocks(SCALED, channels, "BLOCK_P")
    tiles = triton.cdiv(pixels, block["BLOCK_P"])
    sizes = (pixels, tiles, images.stride(0), images.stride(1), images.stride(3))
    constants = {"C": images.shape[1], "CHANNELS": channels, **block}
    maps = (images, shift.contiguous(), scale.contiguous(), y)
    launch(scaled_pixels_kernel, (len(images) * tiles,), *maps, *sizes, **constants)
    return y


def empty_pixels(images: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    shape = (len(images), channels, *images.shape[2:])
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


@scaled_pixels_op.register_fake
def _(images: Tensor, shift: Tensor, scale: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    return empty_pixels(images, channels, dtype)


def scaled_pixels(
    images: Tensor, shift: Tensor, scale: Tensor, *, channels: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Shifted, scaled, cast and padded in one pass; see `vapi_fast.ops.scaled_pixels`."""
    check_dtypes("scaled_pixels", images=images, shift=shift, scale=scale)
    dtype = dtype or images.dtype
    if dtype not in DTYPES:
        raise TypeError(f"scaled_pixels: dtype must be one of 32 or 16 bits on the 'triton' backend, got {dtype}")
    return scaled_pixels_op(images, shift, scale, channels, dtype)


def same_layout(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, torch.memory_format]:
    """a as `[B·G, C, H, W]` and b, both dense and in the same memory format: a's own, if it has one."""
    memory_format = torch.channels_last if a.stride(-3) == 1 else torch.contiguous_format
    a = maps_of(a)
    return a.contiguous(memory_format=memory_format), b.contiguous(memory_format=memory_format), memory_format


@torch.library.custom_op("vapi_fast::mse", mutates_args=())
def mse_op(a: Tensor, b: Tensor) -> Tensor:
    maps, reference, _ = same_layout(a, b)
    batch, group, size = len(b), group_size(a), maps.shape[1:].numel()
    blocks = triton.cdiv(size, MSE["BLOCK"])
    splits, rollouts = group_splits(batch * blocks, group, a.device)
    partial = a.new_empty(batch * group, blocks, dtype=torch.float32)
    sizes, constants = (size, group, blocks, splits, rollouts), {"STAGES": MSE["num_stages"], **MSE}
    launch(mse_forward_kernel, (batch * blocks * splits,), maps, reference, partial, *sizes, **constants)
    return row_sums(partial).view(a.shape[:-3])


@torch.library.custom_op("vapi_fast::mse_backward", mutates_args=())
def mse_backward_op(derror: Tensor, a: Tensor, b: Tensor, needs_a: bool, needs_b: bool) -> list[Tensor]:
    """Gradients to a and to b, as far as needed, in this order."""
    maps, reference, _ = same_layout(a, b)
    batch, group, size = len(b), group_size(a), maps.shape[1:].numel()
    blocks = triton.cdiv(size, MSE["BLOCK"])
    splits, rollouts = group_splits(batch * blocks, group, a.device, shared=needs_b)
    da, db = empty_like_maps(a, b, needs_a, needs_b)
    tensors, sizes = (derror.contiguous(), maps, reference, da, db), (size, group, blocks, splits, rollouts)
    constants = {"NEEDS_A": needs_a, "NEEDS_B": needs_b, "STAGES": MSE["num_stages"], **MSE}
    launch(mse_backward_kernel, (batch * blocks * splits,), *tensors, *sizes, **constants)
    return [gradient for gradient in (da, db) if gradient is not None]


def empty_like_maps(a: Tensor, b: Tensor, needs_a: bool, needs_b: bool) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to a and to b, before they are known, those needed."""
    maps, reference, memory_format = same_layout(a, b)
    da = torch.empty_like(maps, memory_format=memory_format).view(a.shape) if needs_a else None
    return da, torch.empty_like(reference, memory_format=memory_format) if needs_b else None


mse_op.register_fake(lambda a, b: a.new_empty(a.shape[:-3], dtype=torch.float32))
mse_backward_op.register_fake(lambda derror, *options: [x for x in empty_like_maps(*options) if x is not None])


def _mse_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mse_gradient(ctx: Any, derror: Tensor) -> tuple[Tensor | None, ...]:
    gradients = iter(mse_backward_op(derror, *ctx.saved_tensors, *ctx.needs_input_grad))
    return tuple(next(gradients) if need else None for need in ctx.needs_input_grad)


mse_op.register_autograd(_mse_gradient, setup_context=_mse_context)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each image in one pass; see `vapi_fast.ops.mse`."""
    check_dtypes("mse", a=a, b=b)
    return mse_op(a, b)
