"""GroupNorm with SiLU, the tokenizer's normalisation, and what a frozen decoder fuses with it."""

from __future__ import annotations

from torch import Tensor

from .backends import implementation
from .checks import ArgumentChecks


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """SiLU(GroupNorm(x) · weight + bias), the norm over each group of channels and all pixels.

    x floating `[B, C, H, W]`, weight and bias floating `[C]`, C a multiple of groups, eps > 0 → `[B, C, H, W]` in x's
    dtype, computed in fp32 (float64 for float64), with gradients to all three. Raises TypeError or ValueError for an
    argument of the wrong type, shape, device or range.
    """
    checks = ArgumentChecks("group_norm_silu")
    checks.floating("x", x, "B C H W")
    checks.not_empty("x", "C", "H", "W")
    checks.floating("weight", weight, "C")
    checks.floating("bias", bias, "C")
    checks.count("groups", groups, 1)
    checks.positive("eps", eps)
    if x.shape[1] % groups:
        raise ValueError(f"group_norm_silu: groups must divide x's {x.shape[1]} channels, got {groups}")
    return implementation(x).group_norm_silu(x, weight, bias, groups, eps)


def bias_group_norm_silu(
    h: Tensor, channel_bias: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """SiLU(GroupNorm(h + channel_bias) · weight + bias) for inference: a convolution's bias, added while normalising.

    h floating `[B, C, H, W]` (a convolution's result without its bias), channel_bias, weight and bias floating `[C]`,
    C a multiple of groups, eps > 0 → `[B, C, H, W]` in h's dtype, channels-last. The sum is taken in fp32 (float64 for
    float64), never rounded and never written. Raises TypeError or ValueError for an argument of the wrong type, shape,
    device or range, and ValueError where a gradient would be wanted.
    """
    checks = ArgumentChecks("bias_group_norm_silu")
    checks.floating("h", h, "B C H W")
    checks.not_empty("h", "C", "H", "W")
    checks.floating("channel_bias", channel_bias, "C")
    check_norm(checks, weight, bias, groups, eps)
    checks.no_gradient("group_norm_silu", h=h, channel_bias=channel_bias, weight=weight, bias=bias)
    return implementation(h).bias_group_norm_silu(h, channel_bias, weight, bias, groups, eps)


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
    normed_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The next map of a residual stream and its norm, for inference: the norm's statistics ride on the addition.

        sum = h + channel_bias + residual
        normed = SiLU(GroupNorm(sum) · weight + bias), or without SiLU

    h floating `[B, C, H, W]`, residual floating of the same shape, channel_bias, weight and bias floating `[C]`, C a
    multiple of groups, eps > 0 → `(sum, normed)`, both `[B, C, H, W]` in h's dtype, channels-last. Computed in fp32
    (float64 for float64); the norm is that of the sum as it is returned, rounded to h's dtype.

    phases: h is `[B, 4·C, H + 1, W + 1]`, what a 2×2 convolution with padding 1 gives that stands for nearest-neighbour
    upsampling followed by a 3×3 convolution. Channels p·C … p·C + C − 1, p = 2·a + b, hold the rows of parity a and
    the columns of parity b: h[:, p·C + c, i + a, j + b] is pixel (2·i + a, 2·j + b). residual, sum and normed are
    then `[B, C, 2·H, 2·W]`.

    normed_scale: normed is in units of it, rounded to float8_e4m3fn, at most ±448 of them: what a convolution of such
    numbers takes in.

    Raises TypeError or ValueError for an argument of the wrong type, shape, device or range, and ValueError where a
    gradient would be wanted.
    """
    checks = ArgumentChecks("add_group_norm_silu")
    checks.flag("phases", phases)
    checks.flag("silu", silu)
    checks.floating("h", h, "B 4·C H+1 W+1" if phases else "B C H W")
    if phases:
        _check_phases(checks)
    checks.not_empty("h", "C", "H", "W")
    check_norm(checks, weight, bias, groups, eps, normed_scale)
    if channel_bias is not None:
        checks.floating("channel_bias", channel_bias, "C")
    if residual is not None:
        checks.floating("residual", residual, "B C 2·H 2·W" if phases else "B C H W")
    checks.no_gradient("group_norm_silu", h=h, weight=weight, bias=bias, residual=residual, channel_bias=channel_bias)
    return implementation(h).add_group_norm_silu(
        h,
        *(weight, bias, groups, eps),
        residual=residual,
        channel_bias=channel_bias,
        phases=phases,
        silu=silu,
        normed_scale=normed_scale,
    )


def _check_phases(checks: ArgumentChecks) -> None:
    """The sizes of the map that the phases `[B, 4·C, H+1, W+1]` hold."""
    sizes = checks.sizes
    if sizes["4·C"] % 4:
        raise ValueError(f"{checks.operation}: h of four phases must have 4·C channels, got {sizes['4·C']}")
    sizes["C"], sizes["H"], sizes["W"] = sizes["4·C"] // 4, max(sizes["H+1"] - 1, 0), max(sizes["W+1"] - 1, 0)
    sizes["2·H"], sizes["2·W"] = 2 * sizes["H"], 2 * sizes["W"]


def check_norm(
    checks: ArgumentChecks, weight: Tensor, bias: Tensor, groups: int, eps: float, normed_scale: float | None = None
) -> None:
    if normed_scale is not None:
        checks.positive("normed_scale", normed_scale)
    checks.floating("weight", weight, "C")
    checks.floating("bias", bias, "C")
    checks.count("groups", groups, 1)
    checks.positive("eps", eps)
    if checks.sizes["C"] % groups:
        raise ValueError(f"{checks.operation}: groups must divide C={checks.sizes['C']} channels, got {groups}")
