"""3×3 convolution of frozen networks, with what follows it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .group_norm import add_group_norm_silu, channels_last
from .precision import accumulation_dtype, full_precision


def convolution(
    x: Tensor,
    kernel: Tensor,
    *,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    channel_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """3×3 convolution with what is added to it; see `vapi_fast.ops.convolution`."""
    given = (x, kernel, channel_bias, residual, channel_scale)
    wide = accumulation_dtype(*(each for each in given if each is not None))
    with full_precision(x):
        total = F.conv2d(x.to(wide), kernel.to(wide), padding=1)
    if channel_scale is not None:
        total *= channel_scale.to(wide)[:, None, None]
    if channel_bias is not None:
        total += channel_bias.to(wide)[:, None, None]
    if residual is not None:
        total += residual.to(wide)
    return channels_last(total.to(dtype or x.dtype))


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
    """The same and its norm; see `vapi_fast.ops.convolution_group_norm_silu`."""
    added = {"channel_bias": channel_bias, "residual": residual, "channel_scale": channel_scale}
    total = convolution(x, kernel, **added, dtype=dtype)
    return total, add_group_norm_silu(total, weight, bias, groups, eps, silu=silu, normed_scale=normed_scale)[1]
