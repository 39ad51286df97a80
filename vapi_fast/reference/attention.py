"""A cache of keys and values: filling it, and attention of one query a sequence against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import accumulation_dtype, full_precision

LARGEST_INT8 = 127.0  # −128 stays unused, so that a number and its negative are rounded alike


@torch.no_grad()
def append_to_cache(
    qkv: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int | Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """A new position's queries rotated, its keys and values stored; see `vapi_fast.ops.append_to_cache`."""
    dtype = accumulation_dtype(qkv)
    if isinstance(position, Tensor):
        position = position.clamp(0, len(table) - 1)
    row = table[position] if isinstance(position, int) else table.index_select(0, position.view(1))[0]
    cosine, sine = row.to(dtype).unbind(-1)
    even, odd = qkv[:, :2].to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.view_as_real(torch.complex(even, odd) * torch.complex(cosine, sine)).flatten(-2)  # [N, 2, heads, d]
    for cache, new, scale in ((k_cache, turned[:, 1], k_scale), (v_cache, qkv[:, 2].to(dtype), v_scale)):
        store(cache, position, new, scale)
    return turned[:, 0].to(qkv.dtype).contiguous()


def store(cache: Tensor, position: int | Tensor, new: Tensor, scale: Tensor | None = None) -> None:
    """Write new `[N, heads, head_dim]` into one slot of a cache, and its scales into theirs.

    With a scale as whole numbers of it, without one clamped to the cache's largest number if it is fp8.
    """
    if scale is not None:
        new, steps = in_steps(new, scale.dtype)
        put(scale, position, steps)
    elif cache.element_size() == 1:
        largest = torch.finfo(cache.dtype).max  # beyond it PyTorch's cast gives NaN, and index_copy_ takes bytes only
        cache, new = cache.view(torch.uint8), new.float().clamp(-largest, largest).to(cache.dtype).view(torch.uint8)
    put(cache, position, new)


def in_steps(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x `[..., head_dim]` as int8 multiples of a step, and the step `[...]`: 1 / 127 of a row's greatest magnitude.

    The step of a row with a NaN or an infinity is one too, so that all of the row is NaN when it is read.
    """
    step = (x.abs().amax(-1) / LARGEST_INT8).to(dtype)
    whole = x / torch.where(step == 0, 1.0, step.to(x.dtype))[..., None]  # of the step as it is stored
    return (whole.clamp(-LARGEST_INT8, LARGEST_INT8) + 0.5).floor().nan_to_num(0.0).to(torch.int8), step


def put(cache: Tensor, position: int | Tensor, new: Tensor) -> None:
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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_mask: Tensor | None = None,
) -> Tensor:
    """One query per sequence against shared prefix and own cache; see `vapi_fast.ops.decode_attention`."""
    dtype = accumulation_dtype(q)
    query = q.to(dtype)[:, :, None] * q.shape[-1] ** -0.5  # [N, heads, 1, head_dim]
    slots = position + 1 if isinstance(position, int) else k_cache.shape[2]  # entries past an int need not be read
    keys, values = (
        cache[:, :, :slots].to(dtype) if scale is None else cache[:, :, :slots] * scale[:, :, :slots, None].to(dtype)
        for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
    )
    future = None
    if not isinstance(position, int):
        future = torch.arange(slots, device=q.device) > position
        values = values.masked_fill(future[:, None], 0.0)  # they may hold anything, NaN included, and 0 · NaN is NaN
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
