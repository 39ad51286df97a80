"""A cache of keys and values: filling it, and attention of one query a sequence against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import accumulation_dtype, full_precision


@torch.no_grad()
def append_to_cache(qkv: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor, position: int | Tensor) -> Tensor:
    """A new position's queries rotated, its keys and values stored; see `vapi_fast.ops.append_to_cache`."""
    dtype = accumulation_dtype(qkv)
    if isinstance(position, Tensor):
        position = position.clamp(0, len(table) - 1)
    row = table[position] if isinstance(position, int) else table.index_select(0, position.view(1))[0]
    cosine, sine = row.to(dtype).unbind(-1)
    even, odd = qkv[:, :2].to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.view_as_real(torch.complex(even, odd) * torch.complex(cosine, sine)).flatten(-2)  # [N, 2, heads, d]
    for cache, new in ((k_cache, turned[:, 1]), (v_cache, qkv[:, 2])):
        store(cache, position, new)
    return turned[:, 0].to(qkv.dtype).contiguous()


def store(cache: Tensor, position: int | Tensor, new: Tensor) -> None:
    """Write new `[N, heads, head_dim]` into one slot of a cache, clamped to its largest number if it is fp8."""
    if cache.element_size() == 1:
        largest = torch.finfo(cache.dtype).max  # beyond it PyTorch's cast gives NaN, and index_copy_ takes bytes only
        cache, new = cache.view(torch.uint8), new.float().clamp(-largest, largest).to(cache.dtype).view(torch.uint8)
    if isinstance(position, int):
        cache[:, :, position] = new
    else:
        cache.index_copy_(2, position.view(1), new[:, :, None].to(cache.dtype))


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
    query = q.to(dtype)[:, :, None] * q.shape[-1] ** -0.5  # [N, heads, 1, head_dim]
    if isinstance(position, int):  # then the entries past it need not be read
        keys, values = (cache[:, :, : position + 1].to(dtype) for cache in (k_cache, v_cache))
        future = None
    else:
        future = torch.arange(k_cache.shape[2], device=q.device) > position
        # Slots past the position may hold anything, NaN included, and 0 · NaN is NaN.
        keys, values = k_cache.to(dtype), v_cache.to(dtype).masked_fill(future[:, None], 0.0)
    with full_precision(q):
        scores = query @ keys.mT
        if future is not None:
            scores = scores.masked_fill(future, -torch.inf)
        if prefix_k is None:
            return (shares(scores) @ values)[:, :, 0].to(q.dtype)
        prefix_scores = in_groups(query, prefix_k.shape[0]) @ prefix_k.to(dtype).mT  # [P, heads, N/P, prefix_len]
        if prefix_mask is not None:
            prefix_scores = prefix_scores.masked_fill(~prefix_mask[:, None, None], -torch.inf)
        weights = shares(torch.cat([out_of_groups(prefix_scores), scores], dim=-1))
        prefix_weights, own_weights = weights.split([prefix_k.shape[2], scores.shape[-1]], dim=-1)
        shared = in_groups(prefix_weights, prefix_k.shape[0]) @ prefix_v.to(dtype)
        return (out_of_groups(shared) + own_weights @ values)[:, :, 0].to(q.dtype)


def shares(scores: Tensor) -> Tensor:
    """softmax over the last dimension; zeros where all of it is masked."""
    return scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)


def in_groups(x: Tensor, groups: int) -> Tensor:
    """`[N, heads, 1, ·]` → `[P, heads, N/P, ·]`: the sequences of a group as rows of one matrix."""
    return x[:, :, 0].unflatten(0, (groups, -1)).transpose(1, 2)


def out_of_groups(x: Tensor) -> Tensor:
    """The inverse of `in_groups`."""
    return x.transpose(1, 2).flatten(0, 1)[:, :, None]
