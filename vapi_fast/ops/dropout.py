"""Dropout of a transformer's states, drawn by counters."""

from __future__ import annotations

from torch import Tensor

from .backends import implementation
from .checks import ArgumentChecks


def dropout(x: Tensor, p: float, *, seed: int | Tensor, site: int = 0, sample_ids: Tensor | None = None) -> Tensor:
    """Zeros in a share p of the elements, the others times 1 / (1 − p): `F.dropout` with masks of a seed.

    An element's fate is a function of (seed, site, sample id, its position counted from the sample's last) alone: it
    depends on neither the batch, nor padding before the sample, nor the backend. The share is p rounded up to a
    multiple of 2⁻¹⁶ (0.1 is 0.10001). Nothing is kept for the gradient on the Triton backend, which draws the mask
    again.

    Args:
        x: floating `[B, T, D]`.
        p: in [0, 1).
        seed, sample_ids: as in `group_sample`.
        site: int ≥ 0, which of a model's dropouts this is; its low 32 bits count.

    Returns:
        `[B, T, D]` in x's dtype, with a gradient to x.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    """
    checks = ArgumentChecks("dropout")
    checks.floating("x", x, "B T D")
    checks.probability("p", p, one=False)
    checks.seed(seed)
    checks.count("site", site, 0)
    checks.sample_ids(sample_ids)
    return implementation(x).dropout(x, p, seed=seed, site=site, sample_ids=sample_ids)
