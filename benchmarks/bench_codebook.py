"""Nearest codes of the encoder's latents, and the decoder's entries."""

from __future__ import annotations

from operations import FORWARD, Operation, test_operation
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "test_operation"]


def expanded_distances(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """|z|² + |e|² − 2 z·e with one matrix product, as LlamaGen's quantizer has it."""
    z, codes = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    distances = z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * z @ codes.t()
    indices = distances.argmin(-1)
    return z + (codes[indices] - z).detach(), indices


def normalized_embedding(indices: Tensor, codebook: Tensor) -> Tensor:
    return F.embedding(indices, F.normalize(codebook, dim=-1))


OPERATIONS = [
    Operation(
        "vq_lookup",
        ("matrix product", expanded_distances),
        lambda s, e: (4 * s.code_width * (2 * s.rows + s.vocabulary) + 8 * s.rows, 12 * s.code_width * s.rows),
        lambda s: (2 * s.logits * s.code_width, 0),
        targets={FORWARD: [("ms", 0.15)]},
    ),
    Operation(
        "codebook_lookup",
        ("F.embedding", normalized_embedding),
        lambda s, e: (
            8 * s.group * s.rows + 4 * s.code_width * (s.vocabulary + s.group * s.rows),
            8 * s.group * s.rows + 4 * s.code_width * (2 * s.vocabulary + s.group * s.rows),
        ),
    ),
]
