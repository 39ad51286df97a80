"""Perceptual and squared distances of image groups to their reference image. All bound by memory bandwidth.

| kernel         | bytes moved (a: bytes of the group's maps, b: of the reference's)    | FLOPs per element of a |
|----------------|----------------------------------------------------------------------|------------------------|
| lpips_forward  | a + b                                                                | 7                      |
| lpips_backward | 2a + b for the gradient to a, a + 2b for that to b, 2a + 2b for both | 15                     |
| mse_forward    | a + b                                                                | 3                      |
| mse_backward   | as lpips_backward                                                    | 3                      |
| scaled_pixels  | the images, and channels / C times as many numbers of the result     | 2                      |
| row_sums       | partial sums only: 4 bytes for each 4096 elements of a               | -                      |

A program holds one tile of the reference in registers while the group's tiles go by, the next STAGES − 1 of them under
way. Sums over pixels leave it as one partial sum a rollout. `row_sums` adds these up, in an order that depends on
neither the batch nor the group: a rollout's distance is the same bit for bit in any company.

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

from .launch import DTYPES, channel_blocks, channels_last, check_dtypes, launch, multiprocessors

LPIPS_FORWARD = {"BLOCK_ELEMENTS": 4096, "num_warps": 4, "num_stages": 3}
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
def row_sums_kernel(x_ptr, sum_ptr, columns, BLOCK: tl.constexpr):
    """Sum of each row of fp32 `[rows, columns]`."""
    row = x_ptr + tl.program_id(0).to(tl.int64) * columns
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.load(row + column, mask=column < columns, other=0.0)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total, axis=0))


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


def row_sums(x: Tensor) -> Tensor:
    rows, columns = x.shape
    sums = x.new_empty(rows)
    launch(row_sums_kernel, (rows,), x, sums, columns, **ROW_SUMS)
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


def channels_last_like(x: Tensor) -> Tensor:
    """New maps of the shape of x, `[B, (G,) C, H, W]`, channels last in memory."""
    shape = (math.prod(x.shape[:-3]), *x.shape[-3:])
    maps = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return maps.view(x.shape)


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
