"""Normalisation layers: of the tokenizer (GroupNorm with SiLU) and of the transformer (RMSNorm)."""

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


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm: x / sqrt(mean x² + eps) over the last dimension in fp32, cast back to x's dtype, times weight.

    x floating `[..., D]`, weight floating `[D]`, eps > 0 → `[..., D]` in the dtype that x and weight promote to, with
    gradients to both. Raises TypeError or ValueError for an argument of the wrong type, shape, device or range.
    """
    checks = ArgumentChecks("rms_norm")
    checks.floating("x", x, "... D")
    checks.not_empty("x", "D")
    checks.floating("weight", weight, "D")
    checks.positive("eps", eps)
    return implementation(x).rms_norm(x, weight, eps)
