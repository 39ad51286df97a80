"""The vector quantizer's codebook: nearest code, and entries of given codes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import accumulation_dtype

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
