"""RMSNorm, the transformer's normalisation."""

from __future__ import annotations

from torch import Tensor

from .backends import implementation
from .checks import ArgumentChecks


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
