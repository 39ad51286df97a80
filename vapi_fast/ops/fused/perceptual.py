"""LPIPS distance and mean squared error on Triton: launches, registration with PyTorch, gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vapi_fast.kernels import perceptual as kernels

from .launch import check_dtypes, launch, multiprocessors, settings
from .normalization import channels_last, pixel_blocks

PROGRAMS_PER_MULTIPROCESSOR = 8  # what it takes to hide the latency of device memory


def maps_of(x: Tensor) -> Tensor:
    """`[B, (G,) C, H, W]` as `[B·G, C, H, W]`: a view where the maps lie one behind the other."""
    return x.flatten(0, 1) if x.ndim == 5 else x


def group_size(a: Tensor) -> int:
    return a.shape[1] if a.ndim == 5 else 1


def group_splits(tiles: int, group: int, device: torch.device) -> tuple[int, int]:
    """Programs that share a tile's group, more than one where tiles are few, and the rollouts of each."""
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device), max(tiles, 1))
    rollouts = max(triton.cdiv(group, wanted), 1)
    return max(triton.cdiv(group, rollouts), 1), rollouts


def row_sums(x: Tensor) -> Tensor:
    rows, columns = x.shape
    sums = torch.empty(rows, dtype=torch.float32, device=x.device)
    launch(kernels.row_sums, (rows,), x, sums, columns, **settings("row_sums", x))
    return sums


def lpips_forward(features_a: list[Tensor], features_b: list[Tensor], weights: list[Tensor]) -> Tensor:
    batch, group = len(features_b[0]), group_size(features_a[0])
    tables = [pixel_blocks(settings("lpips_forward", b), b.shape[1]) for b in features_b]
    pixels = [b.shape[2] * b.shape[3] for b in features_b]
    blocks = [triton.cdiv(p, table["BLOCK_P"]) for p, table in zip(pixels, tables, strict=True)]
    partial = torch.empty(batch * group, sum(blocks), dtype=torch.float32, device=features_a[0].device)
    for level, (a, b, weight) in enumerate(zip(features_a, features_b, weights, strict=True)):
        splits, rollouts = group_splits(batch * blocks[level], group, a.device)
        launch(
            kernels.lpips_forward,
            (batch * blocks[level] * splits,),
            channels_last(maps_of(a)),
            channels_last(b),
            weight.contiguous(),
            partial[:, sum(blocks[:level]) :],
            pixels[level],
            b.shape[1],
            group,
            blocks[level],
            splits,
            rollouts,
            partial.stride(0),
            enable_fp_fusion=False,
            STAGES=tables[level]["num_stages"],
            **tables[level],
        )
    return row_sums(partial).view(features_a[0].shape[:-3])


def lpips_backward(
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
    block = pixel_blocks(settings("lpips_backward", a), channels)
    blocks = triton.cdiv(pixels, block["BLOCK_P"])
    # The gradient to b is a sum over the group, all of which one program must see.
    splits, rollouts = (1, group) if needs_b else group_splits(batch * blocks, group, a.device)
    programs = batch * blocks * splits
    da = channels_last_like(a) if needs_a else None
    db = channels_last_like(b) if needs_b else None
    shares = torch.empty(programs, channels, dtype=torch.float32, device=a.device) if needs_weight else None
    launch(
        kernels.lpips_backward,
        (programs,),
        ddistance,
        channels_last(maps_of(a)),
        channels_last(b),
        weight.contiguous(),
        da,
        db,
        shares,
        pixels,
        channels,
        group,
        blocks,
        splits,
        rollouts,
        NEEDS_A=needs_a,
        NEEDS_B=needs_b,
        NEEDS_WEIGHT=needs_weight,
        enable_fp_fusion=False,
        STAGES=block["num_stages"],
        **block,
    )
    return da, db, shares.sum(0).to(weight.dtype) if needs_weight else None


def channels_last_like(x: Tensor) -> Tensor:
    """New maps of the shape of x, `[B, (G,) C, H, W]`, channels last in memory."""
    shape = (math.prod(x.shape[:-3]), *x.shape[-3:])
    maps = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return maps.view(x.shape)


lpips_distance_op = torch.library.custom_op("vapi_fast::lpips_distance", lpips_forward, mutates_args=())
lpips_distance_backward_op = torch.library.custom_op(
    "vapi_fast::lpips_distance_backward", lpips_backward, mutates_args=()
)


@lpips_distance_op.register_fake
def _(features_a: list[Tensor], features_b: list[Tensor], weights: list[Tensor]) -> Tensor:
    return features_a[0].new_empty(features_a[0].shape[:-3], dtype=torch.float32)


@lpips_distance_backward_op.register_fake
def _(
    ddistance: Tensor,
    features_a: list[Tensor],
    features_b: list[Tensor],
    weights: list[Tensor],
    needs_a: bool,
    needs_b: bool,
    needs_weights: bool,
) -> list[Tensor]:
    maps = (features_a if needs_a else []) + (features_b if needs_b else [])
    vectors = weights if needs_weights else []
    return [channels_last_like(x) for x in maps] + [w.new_empty(w.shape) for w in vectors]


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


def same_layout(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, torch.memory_format]:
    """a as `[B·G, C, H, W]` and b, both dense and in the same memory format: a's own, if it has one."""
    memory_format = torch.channels_last if a.stride(-3) == 1 else torch.contiguous_format
    a = maps_of(a)
    return a.contiguous(memory_format=memory_format), b.contiguous(memory_format=memory_format), memory_format


def mse_forward(a: Tensor, b: Tensor) -> Tensor:
    maps, reference, _ = same_layout(a, b)
    batch, group, size = len(b), group_size(a), maps.shape[1:].numel()
    block = settings("mse_forward", a)
    blocks = triton.cdiv(size, block["BLOCK"])
    splits, rollouts = group_splits(batch * blocks, group, a.device)
    partial = torch.empty(batch * group, blocks, dtype=torch.float32, device=a.device)
    launch(
        kernels.mse_forward,
        (batch * blocks * splits,),
        maps,
        reference,
        partial,
        size,
        group,
        blocks,
        splits,
        rollouts,
        STAGES=block["num_stages"],
        **block,
    )
    return row_sums(partial).view(a.shape[:-3])


def mse_backward(derror: Tensor, a: Tensor, b: Tensor, needs_a: bool, needs_b: bool) -> list[Tensor]:
    """Gradients to a and to b, as far as needed, in this order."""
    maps, reference, memory_format = same_layout(a, b)
    batch, group, size = len(b), group_size(a), maps.shape[1:].numel()
    block = settings("mse_backward", a)
    blocks = triton.cdiv(size, block["BLOCK"])
    splits, rollouts = (1, group) if needs_b else group_splits(batch * blocks, group, a.device)
    da = torch.empty_like(maps, memory_format=memory_format).view(a.shape) if needs_a else None
    db = torch.empty_like(reference, memory_format=memory_format) if needs_b else None
    launch(
        kernels.mse_backward,
        (batch * blocks * splits,),
        derror.contiguous(),
        maps,
        reference,
        da,
        db,
        size,
        group,
        blocks,
        splits,
        rollouts,
        NEEDS_A=needs_a,
        NEEDS_B=needs_b,
        STAGES=block["num_stages"],
        **block,
    )
    return [gradient for gradient in (da, db) if gradient is not None]


mse_op = torch.library.custom_op("vapi_fast::mse", mse_forward, mutates_args=())
mse_backward_op = torch.library.custom_op("vapi_fast::mse_backward", mse_backward, mutates_args=())


@mse_op.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[:-3], dtype=torch.float32)


@mse_backward_op.register_fake
def _(derror: Tensor, a: Tensor, b: Tensor, needs_a: bool, needs_b: bool) -> list[Tensor]:
    maps, reference, memory_format = same_layout(a, b)
    da = torch.empty_like(maps, memory_format=memory_format).view(a.shape)
    db = torch.empty_like(reference, memory_format=memory_format)
    return [gradient for gradient, need in ((da, needs_a), (db, needs_b)) if need]


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
