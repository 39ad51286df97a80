"""Pieces of LlamaGen's transformer: 2-D rotary positions, SwiGLU, attention of one query against a cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import accumulation_dtype, full_precision


def rotary_2d_table(grid_size: int, head_dim: int, prefix_len: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines of the 2-D rotary positions; see `vapi_fast.ops.rotary_2d_table`."""
    quarter = head_dim // 4
    frequencies = 1.0 / base ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float32)[:, None] * frequencies  # [grid_size, head_dim / 4]
    by_row = angles.repeat_interleave(grid_size, dim=0)
    by_column = angles.repeat(grid_size, 1)
    pairs = torch.cat([by_row, by_column], dim=-1)
    table = torch.stack([pairs.cos(), pairs.sin()], dim=-1)
    return torch.cat([table.new_zeros(prefix_len, *table.shape[1:]), table])


def rotary_2d(x: Tensor, table: Tensor) -> Tensor:
    """Rotation of interleaved pairs by position; see `vapi_fast.ops.rotary_2d`."""
    dtype = accumulation_dtype(x)
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table.to(dtype)[:, None].unbind(-1)  # [T, 1, head_dim / 2]
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up; see `vapi_fast.ops.swiglu`."""
    dtype = accumulation_dtype(gate, up)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int | Tensor,
    *,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_mask: Tensor | None = None,
) -> Tensor:
    """One query per sequence against shared prefix and own cache; see `vapi_fast.ops.decode_attention`."""
    dtype = accumulation_dtype(q)
    groups = q.shape[0] if prefix_k is None else prefix_k.shape[0]
    # [P, N/P, heads, …]: the sequences of a group side by side, so that the prefix broadcasts over them.
    query = q.to(dtype).unflatten(0, (groups, -1)) * q.shape[-1] ** -0.5
    keys, values = (cache.to(dtype).unflatten(0, (groups, -1)) for cache in (k_cache, v_cache))
    with full_precision(q):
        scores = torch.einsum("pghd,pghsd->pghs", query, keys)
        future = torch.arange(k_cache.shape[2], device=q.device) > position
        scores = scores.masked_fill(future, -torch.inf)
        # Slots past the position may hold anything, NaN included, and 0 · NaN is NaN.
        values = values.masked_fill(future[:, None], 0.0)
        if prefix_k is None:
            out = torch.einsum("pghs,pghsd->pghd", scores.softmax(-1), values)
            return out.flatten(0, 1).to(q.dtype)
        prefix_scores = torch.einsum("pghd,phld->pghl", query, prefix_k.to(dtype))
        if prefix_mask is not None:
            prefix_scores = prefix_scores.masked_fill(~prefix_mask[:, None, None], -torch.inf)
        weights = torch.cat([prefix_scores, scores], dim=-1).softmax(-1)
        prefix_weights, own_weights = weights.split([prefix_k.shape[2], k_cache.shape[2]], dim=-1)
        out = torch.einsum("pghl,phld->pghd", prefix_weights, prefix_v.to(dtype))
        out = out + torch.einsum("pghs,pghsd->pghd", own_weights, values)
        return out.flatten(0, 1).to(q.dtype)
