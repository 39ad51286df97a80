"""3×3 convolution of frozen networks, with bias, residual and the statistics of the norm that follows."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import implementation
from .checks import FLOATING, ArgumentChecks, described
from .group_norm import check_norm

E4M3 = torch.float8_e4m3fn


def convolution(
    x: Tensor,
    kernel: Tensor,
    *,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    channel_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """3×3 convolution with a padding of one, for inference, its bias and a residual added before it is rounded.

        y[b, c, i, j] = s[c] · Σ_{k, u, v} x[b, k, i + u − 1, j + v − 1] · kernel[c, k, u, v] + bias[c] + residual[…]

    x floating `[B, I, H, W]`, kernel floating `[C, I, 3, 3]`, channel_bias and channel_scale (s, by default 1) floating
    `[C]`, residual floating `[B, C, H, W]` → `[B, C, H, W]` in `dtype`, by default x's, channels-last; x and kernel are
    fastest so. Summed in fp32 (float64 for float64); 16 bits are multiplied on the matrix units.

    x and kernel may both be float8_e4m3fn, in which a number has three bits behind its first: then `dtype` is to be
    given, and channel_scale is what one of x's units times one of the kernel's is. On a GPU from sm_89 on.

    Raises TypeError or ValueError for an argument of the wrong type, shape or device, and ValueError where a gradient
    would be wanted.
    """
    checks = ArgumentChecks("convolution")
    _check(checks, x, kernel, channel_bias, residual, channel_scale, dtype)
    given = {"channel_bias": channel_bias, "residual": residual, "channel_scale": channel_scale}
    checks.no_gradient("F.conv2d", x=x, kernel=kernel, **given)
    return implementation(x).convolution(x, kernel, **given, dtype=dtype)


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
    """The same and its norm, whose statistics are taken of the convolution's result as it is written.

        sum = channel_scale · convolution(x, kernel) + channel_bias + residual
        normed = SiLU(GroupNorm(sum) · weight + bias), or without SiLU

    As `convolution`; weight and bias floating `[C]`, C a multiple of groups, eps > 0 → `(sum, normed)`, both
    `[B, C, H, W]` in `dtype`, channels-last. The norm is that of the sum as it is returned, rounded. With a
    normed_scale, normed is in units of it in float8_e4m3fn, as in `add_group_norm_silu`.
    """
    checks = ArgumentChecks("convolution_group_norm_silu")
    checks.flag("silu", silu)
    _check(checks, x, kernel, channel_bias, residual, channel_scale, dtype)
    check_norm(checks, weight, bias, groups, eps, normed_scale)
    given = {"channel_bias": channel_bias, "residual": residual, "channel_scale": channel_scale}
    checks.no_gradient("F.conv2d", x=x, kernel=kernel, weight=weight, bias=bias, **given)
    return implementation(x).convolution_group_norm_silu(
        x, kernel, weight, bias, groups, eps, **given, silu=silu, dtype=dtype, normed_scale=normed_scale
    )


def _check(
    checks: ArgumentChecks,
    x: Tensor,
    kernel: Tensor,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    channel_scale: Tensor | None,
    dtype: torch.dtype | None,
) -> None:
    checks.floating("x", x, "B I H W", beside=(E4M3,))
    checks.not_empty("x", "I", "H", "W")
    checks.floating("kernel", kernel, "C I 3 3", beside=(E4M3,))
    if checks.sizes["3"] != 3:
        raise ValueError(f"{checks.operation}: kernel must be of 3×3 taps, got {list(kernel.shape)}")
    checks.not_empty("kernel", "C")
    for name, each in (("channel_bias", channel_bias), ("channel_scale", channel_scale)):
        if each is not None:
            checks.floating(name, each, "C")
    if residual is not None:
        checks.floating("residual", residual, "B C H W")
    if (x.dtype == E4M3) != (kernel.dtype == E4M3):
        raise TypeError(
            f"{checks.operation}: of x and kernel both or none must be float8_e4m3fn, got {described(x)} and "
            f"{described(kernel)}"
        )
    if dtype not in FLOATING and not (dtype is None and x.dtype != E4M3):
        raise TypeError(f"{checks.operation}: dtype must be a floating one where x is {described(x)}, got {dtype}")
