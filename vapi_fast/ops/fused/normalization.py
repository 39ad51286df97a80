"""RMSNorm and GroupNorm+SiLU on Triton: launches, registration with PyTorch, gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from vapi_fast.kernels import normalization as kernels

from .launch import check_dtypes, launch, multiprocessors, next_power_of_2, settings


def rows_of(x: Tensor) -> Tensor:
    """`[..., D]` as `[rows, D]` with adjacent columns; a view where the strides allow it."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = rows_of(x)
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    block = settings("rms_norm_forward", x)
    launch(
        kernels.rms_norm_forward,
        (triton.cdiv(len(rows), block["BLOCK_ROWS"]),),
        rows,
        weight.contiguous(),
        y,
        len(rows),
        x.shape[-1],
        rows.stride(0),
        eps,
        BLOCK_D=next_power_of_2(x.shape[-1]),
        **block,
    )
    return y


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, dy = rows_of(x), dy.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = settings("rms_norm_backward", x)
    programs = min(triton.cdiv(len(rows), block["BLOCK_ROWS"]), 2 * multiprocessors(x.device))
    dweight = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
    launch(
        kernels.rms_norm_backward,
        (programs,),
        dy,
        rows,
        weight.contiguous(),
        dx,
        dweight,
        len(rows),
        x.shape[-1],
        rows.stride(0),
        eps,
        BLOCK_D=next_power_of_2(x.shape[-1]),
        **block,
    )
    return dx, dweight.sum(0).to(weight.dtype)


rms_norm_op = torch.library.custom_op("vapi_fast::rms_norm", rms_norm_forward, mutates_args=())
rms_norm_backward_op = torch.library.custom_op("vapi_fast::rms_norm_backward", rms_norm_backward, mutates_args=())


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))


@rms_norm_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *rms_norm_backward_op(dy, *ctx.saved_tensors, ctx.eps), None


rms_norm_op.register_autograd(_rms_norm_gradient, setup_context=_rms_norm_context)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm in one pass; see `vapi_fast.ops.rms_norm`."""
    check_dtypes("rms_norm", x=x, weight=weight)
    return rms_norm_op(x, weight, eps)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def pixel_blocks(block: dict[str, int], channels: int) -> dict[str, int]:
    """A table's BLOCK_ELEMENTS, split into all channels and as many pixels as remain."""
    block_c = next_power_of_2(channels)
    rest = {name: value for name, value in block.items() if name != "BLOCK_ELEMENTS"}
    return rest | {"BLOCK_C": block_c, "BLOCK_P": max(1, block["BLOCK_ELEMENTS"] // block_c)}


def pixel_splits(x: Tensor, block_p: int) -> tuple[int, int]:
    """Programs an image for a reduction over its pixels, and the pixels of each, a multiple of block_p."""
    batch, _, height, width = x.shape
    blocks = triton.cdiv(height * width, block_p)
    splits = min(blocks, triton.cdiv(4 * multiprocessors(x.device), max(batch, 1)))
    per_split = triton.cdiv(blocks, max(splits, 1)) * block_p
    return triton.cdiv(height * width, per_split), per_split


def channel_sums(x: Tensor) -> Tensor:
    """Sums of every channel, and of its squares, for each part of the pixels: fp32 `[B, splits, 2, C]`."""
    batch, channels, height, width = x.shape
    block = pixel_blocks(settings("group_norm_statistics", x), channels)
    splits, per_split = pixel_splits(x, block["BLOCK_P"])
    sums = torch.empty(batch, splits, 2, channels, dtype=torch.float32, device=x.device)
    launch(
        kernels.group_norm_statistics,
        (batch * splits,),
        x,
        sums,
        height * width,
        per_split,
        splits,
        C=channels,
        **block,
    )
    return sums


def group_statistics(x: Tensor, sums: Tensor, groups: int, eps: float, channel_bias: Tensor | None = None) -> Tensor:
    """Means and reciprocal standard deviations of the groups of x + channel_bias: fp32 `[2, B, groups]`."""
    batch, channels, height, width = x.shape
    statistics = torch.empty(2, batch, groups, dtype=torch.float32, device=x.device)
    launch(
        kernels.group_norm_finish,
        (batch * groups,),
        x,
        channel_bias,
        sums,
        *statistics.unbind(0),
        height * width,
        sums.shape[1],
        eps,
        C=channels,
        GROUPS=groups,
        BLOCK_G=next_power_of_2(channels // groups),
        **settings("group_norm_finish", x),
    )
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
    block = pixel_blocks(settings("group_norm_silu_apply", x), channels)
    blocks = triton.cdiv(height * width, block["BLOCK_P"])
    launch(
        kernels.group_norm_silu_apply,
        (batch * blocks,),
        x,
        channel_bias,
        weight.contiguous(),
        bias.contiguous(),
        *statistics.unbind(0),
        y,
        height * width,
        blocks,
        C=channels,
        GROUPS=statistics.shape[2],
        SILU=silu,
        **block,
    )
    return y


def group_norm_silu_forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    x = channels_last(x)
    statistics = group_statistics(x, channel_sums(x), groups, eps)
    return normalized(x, weight, bias, statistics), statistics


def group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, dy, weight, bias = channels_last(x), channels_last(dy), weight.contiguous(), bias.contiguous()
    batch, channels, height, width = x.shape
    mean, rstd = statistics.unbind(0)
    groups, pixels = mean.shape[1], height * width
    dx = torch.empty_like(x)

    block = pixel_blocks(settings("group_norm_silu_reduce", x), channels)
    splits, per_split = pixel_splits(x, block["BLOCK_P"])
    sums = torch.empty(batch, splits, 2, channels, dtype=torch.float32, device=x.device)
    common = (dy, x, weight, bias, mean, rstd)
    launch(
        kernels.group_norm_silu_reduce,
        (batch * splits,),
        *common,
        sums,
        pixels,
        per_split,
        splits,
        C=channels,
        GROUPS=groups,
        **block,
    )
    total = sums.sum(1)  # [B, 2, C]: Σ dh, Σ dh·x̂
    dbias, dweight = total.sum(0)
    means = (total * weight.float()).unflatten(-1, (groups, -1)).sum(-1) / (pixels * (channels // groups))
    dmean, dproduct = (part.contiguous() for part in means.unbind(1))
    block = pixel_blocks(settings("group_norm_silu_backward", x), channels)
    blocks = triton.cdiv(pixels, block["BLOCK_P"])
    launch(
        kernels.group_norm_silu_backward,
        (batch * blocks,),
        *common,
        dmean,
        dproduct,
        dx,
        pixels,
        blocks,
        C=channels,
        GROUPS=groups,
        **block,
    )
    return dx, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)


group_norm_silu_op = torch.library.custom_op("vapi_fast::group_norm_silu", group_norm_silu_forward, mutates_args=())
group_norm_silu_backward_op = torch.library.custom_op(
    "vapi_fast::group_norm_silu_backward", group_norm_silu_backward, mutates_args=()
)


@group_norm_silu_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    statistics = x.new_empty(2, x.shape[0], groups, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), statistics


@group_norm_silu_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight), torch.empty_like(bias)


def _group_norm_silu_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _group_norm_silu_gradient(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *group_norm_silu_backward_op(dy, *ctx.saved_tensors), None, None


group_norm_silu_op.register_autograd(_group_norm_silu_gradient, setup_context=_group_norm_silu_context)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm with SiLU, one statistics pass and one apply pass; see `vapi_fast.ops.group_norm_silu`."""
    check_dtypes("group_norm_silu", x=x, weight=weight, bias=bias)
    y = group_norm_silu_op(x, weight, bias, groups, eps)[0]
    return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()
