"""The vector quantizer's codebook: nearest code, entries of given codes, and the straight-through draw."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .philox import GUMBEL, default_sample_ids, open_uniform23, philox, seed_key
from .precision import accumulation_dtype, full_precision

# Distances held at once: 2²⁶ float32 are 256 MiB, where a batch of 384² images would need gigabytes.
DISTANCES_AT_ONCE = 2**26


def vq_lookup(z: Tensor, codebook: Tensor, *, l2_norm: bool = True) -> tuple[Tensor, Tensor]:
    """Nearest codebook entry with a straight-through gradient; see `vapi_fast.ops.vq_lookup`."""
    dtype = accumulation_dtype(z, codebook)
    latents, codes = z.to(dtype), codebook.detach().to(dtype)
    if l2_norm:
        latents, codes = F.normalize(latents, dim=-1), F.normalize(codes, dim=-1)
    indices = nearest(latents.detach().reshape(-1, z.shape[-1]), codes).view(z.shape[:-1])
    # z_n + (e − z_n).detach() has this gradient too, but rounds: here the value is the entry itself.
    z_q = codes[indices] + (latents - latents.detach())
    return z_q.to(z.dtype), indices


def nearest(latents: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code, the lowest one of a tie: latents `[N, C]`, codes `[V, C]` → int64 `[N]`."""
    # The expansion |z|² − 2 z·e + |e|² is faster, but a blocked matrix product rounds equal codes differently.
    rows = max(1, DISTANCES_AT_ONCE // codes.shape[0])
    blocks = [torch.cdist(block, codes, compute_mode="donot_use_mm_for_euclid_dist") for block in latents.split(rows)]
    return torch.cat([distances.argmin(-1) for distances in blocks])


def codebook_lookup(indices: Tensor, codebook: Tensor, *, l2_norm: bool = True) -> Tensor:
    """Codebook entries of the given indices; see `vapi_fast.ops.codebook_lookup`."""
    codes = codebook.to(accumulation_dtype(codebook))
    if l2_norm:
        codes = F.normalize(codes, dim=-1)
    return F.embedding(indices, codes).to(codebook.dtype)


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
