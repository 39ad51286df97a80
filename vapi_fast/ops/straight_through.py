"""The straight-through draw: a code's embedding with the gradient of the softmax's mean."""

from __future__ import annotations

from torch import Tensor

from .backends import implementation
from .checks import ArgumentChecks


def straight_through_lookup(
    logits: Tensor, codebook: Tensor, *, tau: float, seed: int | Tensor, sample_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Hard Gumbel-softmax code embedding: an entry in value, the softmax's mean of entries in gradient.

    y = softmax((logits + g) / τ) with standard Gumbel g from Philox at (t, v, sample id); the value is the codebook's
    entry of argmax y, the gradients to logits and codebook are those of y · codebook (the paper's "STE").

    Args:
        logits: floating `[B, T, V]`.
        codebook: floating `[V, C]`, used as given: normalise it first where the tokenizer does.
        tau: τ > 0.
        seed, sample_ids: as in `group_sample`.

    Returns:
        z_q `[B, T, C]` in the codebook's dtype; indices int64 `[B, T]`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    """
    checks = ArgumentChecks("straight_through_lookup")
    checks.floating("logits", logits, "B T V")
    checks.floating("codebook", codebook, "V C")
    checks.not_empty("codebook", "V", "C")
    checks.positive("tau", tau)
    checks.seed(seed)
    checks.sample_ids(sample_ids)
    return implementation(logits).straight_through_lookup(logits, codebook, tau=tau, seed=seed, sample_ids=sample_ids)
