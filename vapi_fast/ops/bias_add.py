"""The sum that a residual stream ends with before its resolution changes."""

from __future__ import annotations

from torch import Tensor

from .backends import implementation
from .checks import ArgumentChecks


def bias_add(h: Tensor, channel_bias: Tensor, residual: Tensor | None = None, *, pad: int = 0) -> Tensor:
    """h + channel_bias + residual for inference, with room for a strided convolution's far edge.

    h floating `[B, C, H, W]` (a convolution's result without its bias), channel_bias floating `[C]`, residual floating
    of h's shape → `[B, C, H + pad, W + pad]` in h's dtype, channels-last: `pad` rows below and columns to the right are
    zeros. Computed in fp32 (float64 for float64) and rounded once. Raises TypeError or ValueError for an argument of
    the wrong type, shape, device or range, and ValueError where a gradient would be wanted.
    """
    checks = ArgumentChecks("bias_add")
    checks.floating("h", h, "B C H W")
    checks.not_empty("h", "C", "H", "W")
    checks.floating("channel_bias", channel_bias, "C")
    if residual is not None:
        checks.floating("residual", residual, "B C H W")
    checks.count("pad", pad, 0)
    checks.no_gradient("add them", h=h, channel_bias=channel_bias, residual=residual)
    return implementation(h).bias_add(h, channel_bias, residual, pad=pad)
