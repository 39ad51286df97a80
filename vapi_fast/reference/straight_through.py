"""The straight-through draw: a code's embedding with the gradient of the softmax's mean."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import GUMBEL, default_sample_ids, open_uniform23, philox, seed_key
from .precision import accumulation_dtype, full_precision


def straight_through_lookup(
    logits: Tensor, codebook: Tensor, *, tau: float, seed: int | Tensor, sample_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Hard Gumbel-softmax code embedding with a soft gradient; see `vapi_fast.ops.straight_through_lookup`."""
    dtype = accumulation_dtype(logits, codebook)
    perturbed = (logits.to(dtype) + gumbel_noise(logits.shape, seed, sample_ids, dtype, logits.device)) / tau
    codes = codebook.to(dtype)
    with full_precision(logits):
        soft = perturbed.softmax(-1) @ codes
    indices = perturbed.argmax(-1)
    z_q = codes.detach()[indices] + (soft - soft.detach())
    return z_q.to(codebook.dtype), indices


def gumbel_noise(
    shape: torch.Size, seed: int | Tensor, sample_ids: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Standard Gumbel noise −log(−log u) for logits of shape `[B, T, V]`."""
    batch, length, vocab_size = shape
    counter = (
        torch.arange(length, device=device)[:, None],
        torch.arange((vocab_size + 3) // 4, device=device),
        default_sample_ids(batch, sample_ids, device)[:, None, None],
        GUMBEL,
    )
    words = torch.stack(philox(counter, seed_key(seed)), dim=-1).flatten(-2)[..., :vocab_size]
    return -(-open_uniform23(words, dtype).log()).log()
