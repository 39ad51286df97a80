"""The vector quantizer's codebook: nearest code, and entries of given codes."""

from __future__ import annotations

from torch import Tensor

from .backends import implementation
from .checks import ArgumentChecks


def vq_lookup(z: Tensor, codebook: Tensor, *, l2_norm: bool = True) -> tuple[Tensor, Tensor]:
    """Nearest codebook entry of each latent vector, with a straight-through gradient.

    Args:
        z: floating `[..., C]`, channels last.
        codebook: floating `[V, C]`, V ≥ 1.
        l2_norm: scale both to unit length first (eps 1e-12), as LlamaGen's tokenizers do.

    Returns:
        z_q `[..., C]` in z's dtype: the (normalised) entry in value, the (normalised) z in gradient, none to the
        codebook. indices int64 `[...]`: least |z − e|², the lowest index of a tie.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device.
    """
    checks = ArgumentChecks("vq_lookup")
    checks.floating("z", z, "... C")
    checks.floating("codebook", codebook, "V C")
    checks.not_empty("codebook", "V", "C")
    checks.flag("l2_norm", l2_norm)
    return implementation(z).vq_lookup(z, codebook, l2_norm=l2_norm)


def codebook_lookup(indices: Tensor, codebook: Tensor, *, l2_norm: bool = True) -> Tensor:
    """Codebook entries for decoding.

    indices int64 `[...]` in [0, V), codebook floating `[V, C]` → `[..., C]` in the codebook's dtype, scaled to unit
    length (eps 1e-12) if l2_norm, with a gradient to the codebook. Raises TypeError or ValueError for an argument of
    the wrong type, shape, device or range.
    """
    checks = ArgumentChecks("codebook_lookup")
    checks.floating("codebook", codebook, "V C")
    checks.integers("indices", indices, "...")
    checks.flag("l2_norm", l2_norm)
    checks.token_range("indices", indices, codebook.shape[0])
    return implementation(codebook).codebook_lookup(indices, codebook, l2_norm=l2_norm)
