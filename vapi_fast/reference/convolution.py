"""3×3 convolution of frozen networks, with what follows it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .group_norm import add_group_norm_silu, channels_last
from .precision import accumulation_dtype, full_precision


def convolution(
    x: Tensor, kernel: Tensor, *, channel_bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """3×3 convolution with what is added to it; see `vapi_fast.ops.convolution`."""
    dtype = accumulation_dtype(*(each for each in (x, kernel, channel_bias, residual) if each is not None))
    with full_precision(x):
        total = F.conv2d(x.to(dtype), kernel.to(dtype), padding=1)
    if channel_bias is not None:
        total += channel_bias.to(dtype)[:, None, None]
    if residual is not None:
        total += residual.to(dtype)
    return channels_last(total.to(x.dtype))


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
) -> tuple[Tensor, Tensor]:
    """The same and its norm; see `vapi_fast.ops.convolution_group_norm_silu`."""
    total = convolution(x, kernel, channel_bias=channel_bias, residual=residual)
    return total, add_group_norm_silu(total, weight, bias, groups, eps, silu=silu)[1]
