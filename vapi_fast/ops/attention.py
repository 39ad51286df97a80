"""A cache of keys and values: filling it, and attention of one query a sequence against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import implementation
from .checks import ArgumentChecks, described

EIGHT_BITS = (torch.float8_e4m3fn, torch.int8)


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
    """Rotate the queries and keys of one new position of each sequence; store its keys and values in the cache.

    Args:
        qkv: floating `[N, 3, heads, head_dim]`, queries, keys and values before the rotation.
        table: floating `[S, head_dim / 2, 2]`, rows of `rotary_2d_table`, one for each slot of the cache.
        k_cache, v_cache: floating `[N, heads, S, head_dim]`, written in place. Numbers beyond the largest of
            float8_e4m3fn are stored as the largest. Or int8, with scales.
        position: the slot, in [0, S): an int, or a 0-d int64 tensor (range not checked: the nearest slot is taken).
        k_scale, v_scale: floating `[N, heads, S]`, written in place: an int8 cache has a scale for each slot and head,
            1 / 127 of the greatest magnitude there, and the nearest multiples of it; others have none. Where there is a
            NaN or an infinity, the scale is one.

    Returns:
        the rotated queries `[N, heads, head_dim]` in qkv's dtype, contiguous. No gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    """
    checks = ArgumentChecks("append_to_cache")
    checks.floating("qkv", qkv, "N 3 heads head_dim")
    checks.floating("table", table, "S pairs 2")
    check_cache(checks, k_cache, v_cache, k_scale, v_scale)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache), ("k_scale", k_scale), ("v_scale", v_scale)):
        if cache is not None:
            checks.written(name, cache)
    checks.not_empty("qkv", "head_dim")
    checks.not_empty("k_cache", "S")
    if qkv.shape[1] != 3:
        raise ValueError(f"append_to_cache: qkv must be floating [N, 3, heads, head_dim], got {described(qkv)}")
    if table.shape[1:] != (qkv.shape[-1] // 2, 2) or qkv.shape[-1] % 2:
        raise ValueError(
            f"append_to_cache: table must be [S, head_dim / 2, 2] for qkv with head_dim={qkv.shape[-1]}, got "
            f"{described(table)}"
        )
    checks.slot(position, "k_cache", k_cache.shape[2])
    return implementation(qkv).append_to_cache(qkv, table, k_cache, v_cache, position, k_scale=k_scale, v_scale=v_scale)


def check_cache(
    checks: ArgumentChecks, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """Keys and values in a floating dtype, float8_e4m3fn or int8: then with scales, and only then."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.floating(name, cache, "N heads S head_dim", beside=EIGHT_BITS)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    if len({cache.dtype == torch.int8 for cache in (k_cache, v_cache)} | {x is not None for x in scales.values()}) > 1:
        got = ", ".join(described(x) for x in (k_cache, v_cache, *scales.values()))
        raise ValueError(
            f"{checks.operation}: k_scale and v_scale must be given with k_cache and v_cache in int8, and only then, "
            f"got {got}"
        )
    for name, scale in scales.items():
        if scale is not None:
            checks.floating(name, scale, "N heads S")


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
    """Attention of one query per sequence against its group's shared prefix and its own cache.

    softmax(q·kᵀ / sqrt(head_dim)) · v over the prefix's keys (where the mask allows) and own entries 0…position.

    Args:
        q: floating `[N, heads, head_dim]`, N ≥ 1.
        k_cache, v_cache: floating `[N, heads, S, head_dim]`, the sequences' own entries; those past `position` are
            ignored, whatever they hold. float8_e4m3fn or int8 too, for a cache of half the size.
        position: index of the last valid own entry, in [0, S): an int, or a 0-d int64 tensor (range not checked).
        k_scale, v_scale: floating `[N, heads, S]`, what an int8 cache is to be multiplied by; of no other cache.
        prefix_k, prefix_v: floating `[P, heads, prefix_len, head_dim]`, one prefix for each of P groups; sequences
            n·N/P … (n+1)·N/P − 1 belong to group n. Both or neither.
        prefix_mask: bool `[P, prefix_len]`, False at prefix positions to leave out; default all True.

    Returns:
        `[N, heads, head_dim]` in q's dtype, computed in fp32 (float64 for float64); zeros where there is no entry.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    """
    checks = ArgumentChecks("decode_attention")
    checks.floating("q", q, "N heads head_dim")
    checks.not_empty("q", "N", "heads", "head_dim")
    check_cache(checks, k_cache, v_cache, k_scale, v_scale)
    if (prefix_k is None) != (prefix_v is None) or (prefix_mask is not None and prefix_k is None):
        raise ValueError("decode_attention: prefix_k and prefix_v must be given together, prefix_mask only with them")
    if prefix_k is not None:
        checks.floating("prefix_k", prefix_k, "P heads prefix_len head_dim")
        checks.floating("prefix_v", prefix_v, "P heads prefix_len head_dim")
        checks.not_empty("prefix_k", "P")
        if q.shape[0] % prefix_k.shape[0]:
            raise ValueError(
                f"decode_attention: q's N={q.shape[0]} must be a multiple of prefix_k's P={prefix_k.shape[0]}"
            )
    if prefix_mask is not None:
        checks.booleans("prefix_mask", prefix_mask, "P prefix_len")
    checks.slot(position, "k_cache", k_cache.shape[2])
    return implementation(q).decode_attention(
        q,
        k_cache,
        v_cache,
        position,
        k_scale=k_scale,
        v_scale=v_scale,
        prefix_k=prefix_k,
        prefix_v=prefix_v,
        prefix_mask=prefix_mask,
    )
