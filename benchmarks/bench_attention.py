"""A decode step's attention: keys and values into the cache, and one query a sequence against it."""

from __future__ import annotations

import torch
from bench_rotary_swiglu import complex_rotation
from cases import Sizes
from operations import Operation, share, test_operation
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "test_operation"]


def rotate_and_store(
    qkv: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Into the caches' only slot, whose position is 0."""
    q, k, v = qkv[:, None].unbind(2)
    slot = position.view(1)
    k_cache[:, :, slot] = complex_rotation(k, table).transpose(1, 2)
    v_cache[:, :, slot] = v.transpose(1, 2)
    return complex_rotation(q, table)[:, 0], k_cache, v_cache


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache)[:, :, 0]


def attention_with_prefix(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, prefix_k: Tensor, prefix_v: Tensor
) -> Tensor:
    """The prefix beside each sequence's own entries, as a plain cache holds it."""
    rollouts = q.shape[0] // prefix_k.shape[0]
    k = torch.cat([prefix_k.repeat_interleave(rollouts, 0), k_cache], dim=2)
    v = torch.cat([prefix_v.repeat_interleave(rollouts, 0), v_cache], dim=2)
    return F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]


def attention_in_int8(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, k_scale: Tensor, v_scale: Tensor
) -> Tensor:
    """Keys and values multiplied out first."""
    k, v = ((cache * scale[..., None]).to(q.dtype) for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)))
    return attention(q, k, v, position)


def cache_bytes(s: Sizes, e: int, prefix: int) -> tuple[int, int]:
    entries = s.sequences * (s.tokens + 1) + s.sequences // s.group * prefix
    return 2 * e * s.heads * s.head_dim * (entries + s.sequences), 0


OPERATIONS = [
    Operation(
        "append_to_cache",
        ("complex numbers", rotate_and_store),
        lambda s, e: (6 * e * s.sequences * s.heads * s.head_dim, 0),
    ),
    Operation("decode_attention", ("SDPA", attention), lambda s, e: cache_bytes(s, e, 0), targets=share(0.75)),
    Operation(
        "decode_attention prefix",
        ("SDPA", attention_with_prefix),
        lambda s, e: cache_bytes(s, e, s.prefix),
        targets=share(0.75),
    ),
    Operation(
        "decode_attention int8",
        ("multiplied out, SDPA", attention_in_int8),
        lambda s, e: (
            2 * s.sequences * s.heads * ((s.tokens + 1) * (s.head_dim + 4) + e * s.head_dim),
            0,
        ),
        targets=share(0.75),
    ),
]
