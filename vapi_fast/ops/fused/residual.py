"""The residual stream of a frozen decoder on Triton: launches and registration with PyTorch. Without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from vapi_fast.kernels import residual as kernels

from .launch import check_dtypes, launch, settings
from .normalization import channel_sums, channels_last, group_statistics, normalized, pixel_blocks, pixel_splits


def bias_group_norm_silu_forward(
    h: Tensor, channel_bias: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    h, channel_bias = channels_last(h), channel_bias.contiguous()
    statistics = group_statistics(h, channel_sums(h), groups, eps, channel_bias)
    return normalized(h, weight, bias, statistics, channel_bias)


def empty_sum(h: Tensor, phases: bool) -> Tensor:
    """A new map, channels-last, for the sum of h and others."""
    batch, channels, height, width = h.shape
    if phases:
        channels, height, width = channels // 4, 2 * (height - 1), 2 * (width - 1)
    shape = (batch, channels, height, width)
    return torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=torch.channels_last)


def add_group_norm_silu_forward(
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
    batch, channels, height, width = total.shape
    block = pixel_blocks(settings("add_group_norm_statistics", h), channels)
    splits, per_split = pixel_splits(total, block["BLOCK_P"])
    sums = torch.empty(batch, splits, 2, channels, dtype=torch.float32, device=h.device)
    launch(
        kernels.add_group_norm_statistics,
        (batch * splits,),
        h,
        None if residual is None else channels_last(residual),
        None if channel_bias is None else channel_bias.contiguous(),
        total,
        sums,
        h.shape[1] * h.shape[2] * h.shape[3] // channels,
        height * width,
        width,
        per_split,
        splits,
        C=channels,
        PHASES=phases,
        **block,
    )
    return total, normalized(total, weight, bias, group_statistics(total, sums, groups, eps), silu=silu)


bias_group_norm_silu_op = torch.library.custom_op(
    "vapi_fast::bias_group_norm_silu", bias_group_norm_silu_forward, mutates_args=()
)
add_group_norm_silu_op = torch.library.custom_op(
    "vapi_fast::add_group_norm_silu", add_group_norm_silu_forward, mutates_args=()
)


@bias_group_norm_silu_op.register_fake
def _(h: Tensor, channel_bias: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return empty_sum(h, phases=False)


@add_group_norm_silu_op.register_fake
def _(
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
    return empty_sum(h, phases), empty_sum(h, phases)


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
