"""3×3 convolution of frozen networks, with bias, residual and the statistics of the norm that follows."""

from __future__ import annotations

from torch import Tensor

from .backends import implementation
from .checks import ArgumentChecks
from .group_norm import check_norm


def convolution(
    x: Tensor, kernel: Tensor, *, channel_bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """3×3 convolution with a padding of one, for inference, its bias and a residual added before it is rounded.

        y[b, c, i, j] = Σ_{k, u, v} x[b, k, i + u − 1, j + v − 1] · kernel[c, k, u, v] + channel_bias[c] + residual

    x floating `[B, I, H, W]`, kernel floating `[C, I, 3, 3]`, channel_bias floating `[C]`, residual floating
    `[B, C, H, W]` → `[B, C, H, W]` in x's dtype, channels-last; x and kernel are fastest so. Summed in fp32 (float64
    for float64); 16 bits are multiplied on the matrix units. Raises TypeError or ValueError for an argument of the
    wrong type, shape or device, and ValueError where a gradient would be wanted.
    """
    checks = ArgumentChecks("convolution")
    _check(checks, x, kernel, channel_bias, residual)
    checks.no_gradient("F.conv2d", x=x, kernel=kernel, channel_bias=channel_bias, residual=residual)
    return implementation(x).convolution(x, kernel, channel_bias=channel_bias, residual=residual)


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
    """The same and its norm, whose statistics are taken of the convolution's result as it is written.

        sum = convolution(x, kernel) + channel_bias + residual
        normed = SiLU(GroupNorm(sum) · weight + bias), or without SiLU

    As `convolution`; weight and bias floating `[C]`, C a multiple of groups, eps > 0 → `(sum, normed)`, both
    `[B, C, H, W]` in x's dtype, channels-last. The norm is that of the sum as it is returned, rounded to x's dtype.
    """
    checks = ArgumentChecks("convolution_group_norm_silu")
    checks.flag("silu", silu)
    _check(checks, x, kernel, channel_bias, residual)
    check_norm(checks, weight, bias, groups, eps)
    frozen = {"x": x, "kernel": kernel, "weight": weight, "bias": bias}
    checks.no_gradient("F.conv2d", **frozen, residual=residual, channel_bias=channel_bias)
    return implementation(x).convolution_group_norm_silu(
        x, kernel, weight, bias, groups, eps, residual=residual, channel_bias=channel_bias, silu=silu
    )


def _check(
    checks: ArgumentChecks, x: Tensor, kernel: Tensor, channel_bias: Tensor | None, residual: Tensor | None
) -> None:
    checks.floating("x", x, "B I H W")
    checks.not_empty("x", "I", "H", "W")
    checks.floating("kernel", kernel, "C I 3 3")
    if checks.sizes["3"] != 3:
        raise ValueError(f"{checks.operation}: kernel must be of 3×3 taps, got {list(kernel.shape)}")
    checks.not_empty("kernel", "C")
    if channel_bias is not None:
        checks.floating("channel_bias", channel_bias, "C")
    if residual is not None:
        checks.floating("residual", residual, "B C H W")
