"""Dropout whose masks are functions of seed, site and sample id."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .philox import DROPOUT, MASK, default_sample_ids, philox, seed_key
from .precision import accumulation_dtype

HALVES = 8  # 16-bit numbers in four words


def dropout(x: Tensor, p: float, *, seed: int | Tensor, site: int = 0, sample_ids: Tensor | None = None) -> Tensor:
    """Zeros in a share p of the elements, the others scaled; see `vapi_fast.ops.dropout`.

    On a CPU it takes about twice as long as `F.dropout`.
    """
    dropped = dropout_mask(x.shape, p, seed=seed, site=site, sample_ids=sample_ids, device=x.device)
    wide = x.to(accumulation_dtype(x))
    return torch.where(dropped, 0.0, wide * (1 / (1 - p))).to(x.dtype)


def dropout_forward(x: Tensor, p: float, site: int, seed: int | Tensor, sample_ids: Tensor | None) -> Tensor:
    """`dropout` without autograd; also its own gradient."""
    return dropout(x, p, seed=seed, site=site, sample_ids=sample_ids)


def dropout_mask(
    shape: torch.Size, p: float, *, seed: int | Tensor, site: int, sample_ids: Tensor | None, device: torch.device
) -> Tensor:
    """Bool `[B,T,D]`, True where an element is dropped: eight of a row share a counter, D/8 columns apart.

    Positions count from the last one back, so that a sample keeps its masks where padding before it is left out.
    """
    batch, length, width = shape
    columns = -(-width // HALVES)
    counter = torch.arange(length * columns, device=device).view(length, columns).flip(0)
    ids = default_sample_ids(batch, sample_ids, device)[:, None, None]
    words = philox((counter, site & MASK, ids, DROPOUT), seed_key(seed))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    # u < p for u = k·2⁻¹⁶ is k < ⌈p·2¹⁶⌉: an integer comparison is the same on every backend.
    return torch.cat(halves, dim=-1)[..., :width] < math.ceil(p * 2**16)
