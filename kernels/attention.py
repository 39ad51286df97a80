"""A cache of keys and values: filling it, and attention of one query a sequence. Memory bandwidth binds all.

| kernel                   | bytes moved (x: bytes of one input)                        | FLOPs per element         |
|--------------------------|------------------------------------------------------------|---------------------------|
| append_to_cache          | 2x (qkv read; q, and a slot of keys and values, written)   | 2; in int8 5 more         |
| decode_attention         | keys and values 0…position, and scales of int8, each once  | 2 a key's, 3 a value's    |
| decode_attention_prefix  | prefix keys and values, each once for BLOCK_Q of a group   | 2·BLOCK_Q in matrix units |
| decode_attention_combine | partial results only: 4·pieces·(head_dim + 2) a query      | 3                         |

Predicted for an H100 with 3.0 TB/s, bf16: decode_attention of 256 × 24 heads of 64 at the last of 577 positions,
908 MB, 0.30 ms. Issuing the instructions (13 a key's and its value's) takes less than half of that.

append_to_cache of 256 sequences moves 4.7 MB, 0.002 ms: what counts is that generation launches it once a layer and
token, instead of two rotations and two copies.

A cache of float8 halves what decode_attention moves. One of int8 has a scale for each slot and head beside it, 1 / 127
of the greatest magnitude there. Scales multiply scores and weights, not elements, and are in fp32: that has the range
of whatever is stored, and its 4 bytes are the least that an asynchronous copy moves, so that they are fetched ahead as
keys and values are, where 16 bits would be loaded when they are wanted, to save 3 % of the bytes. So a head of 64 takes
68 bytes in place of 128, the above 482 MB and 0.16 ms; 11 instructions a key's and its value's (fp8: 10) are half of
that.

decode_attention takes scores in base 2. What a program knows of a query is a *piece*: the largest score, the sum of
2^(score − largest) and the values weighted by the same, all fp32. Pieces are merged in an order that never changes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vapi_fast.reference.attention import LARGEST_INT8

from .launch import (
    CACHE_DTYPES,
    MIN_DOT,
    check_dtypes,
    contiguous,
    launch,
    multiprocessors,
    next_power_of_2,
    seed_tensor,
)

APPEND = {"num_warps": 4, "num_stages": 1}
APPEND_COLUMNS = 512  # of a program
OWN = {"num_warps": 4, "num_stages": 3}
OWN_ELEMENTS = 4096  # of a tile of keys in 16 bits
PREFIX = {"num_warps": 4, "num_stages": 2}
PREFIX_BYTES = 8192  # of an operand of the prefix's products
COMBINE = {"BLOCK_PIECES": 16, "num_warps": 1, "num_stages": 1}
# Programs that attention is split into where there are few queries: about three times what runs at once, so that the
# last ones to finish do not leave much of the GPU idle.
PROGRAMS_PER_MULTIPROCESSOR = 16


@triton.jit
def turned(x, turn):
    """The pairs of each row times their cosines and sines `[1, columns]`, which lie as the pairs do."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    cosine, sine = tl.split(tl.reshape(turn, [1, x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(even * cosine - odd * sine, odd * cosine + even * sine), x.shape)


@triton.jit
def store_rows(x, row_ptr, columns, inside, scale_ptr, scales, kept, LARGEST: tl.constexpr):
    """Rows into a cache at `row_ptr + columns`; the kept ones' scales, if there are any, at `scale_ptr + scales`.

    LARGEST: what larger numbers become, where the cache's dtype has no infinity. NaN stays NaN; a row with a NaN or an
    infinity has a scale that is one.
    """
    if scale_ptr is not None:
        bits = tl.abs(x).to(tl.int32, bitcast=True)  # they have the magnitudes' order, and NaN above all
        scale = (tl.max(bits, axis=1).to(tl.float32, bitcast=True) / LARGEST).to(scale_ptr.dtype.element_ty)
        tl.store(scale_ptr + scales, scale, mask=kept)
        x = x / tl.where(scale == 0, 1.0, scale.to(tl.float32))[:, None]  # as it is stored
    if LARGEST is not None:
        x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    if scale_ptr is not None:
        x = tl.where(x == x, tl.floor(x + 0.5), 0.0)
    tl.store(row_ptr + columns, x.to(row_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S", "heads", "head_blocks"])
def append_to_cache_kernel(
    qkv_ptr,
    table_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    q_ptr,
    k_scale_ptr,
    v_scale_ptr,
    S,
    heads,
    head_blocks,
    stride_kn,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vn,
    stride_vh,
    stride_vs,
    stride_vd,
    stride_ksn,
    stride_ksh,
    stride_kss,
    stride_vsn,
    stride_vsh,
    stride_vss,
    HEAD_DIM: tl.constexpr,
    LARGEST_K: tl.constexpr,
    LARGEST_V: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of one sequence's heads: q rotated, k rotated and v into slot `position`, with their scales if any.

    qkv is contiguous `[N, 3, heads, head_dim]`, q `[N, heads, head_dim]`, the table `[S, head_dim / 2, 2]`.
    """
    row = (tl.program_id(0) // head_blocks).to(tl.int64)
    head, column = (tl.program_id(0) % head_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_D)
    slot = tl.minimum(tl.maximum(tl.load(position_ptr), 0), S - 1)  # never outside of the cache
    kept = head < heads
    inside = kept[:, None] & (column < HEAD_DIM)[None, :]
    place = head[:, None] * HEAD_DIM + column[None, :]
    from_row, columns = qkv_ptr + row * 3 * heads * HEAD_DIM + place, heads * HEAD_DIM
    turn = tl.load(table_ptr + slot * HEAD_DIM + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    q = turned(tl.load(from_row, mask=inside, other=0.0).to(tl.float32), turn)
    k = turned(tl.load(from_row + columns, mask=inside, other=0.0).to(tl.float32), turn)
    v = tl.load(from_row + 2 * columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(q_ptr + row * columns + place, q.to(q_ptr.dtype.element_ty), mask=inside)
    to_k, to_v = k_ptr + row * stride_kn + slot * stride_ks, v_ptr + row * stride_vn + slot * stride_vs
    k_columns = head[:, None] * stride_kh + column[None, :] * stride_kd
    v_columns = head[:, None] * stride_vh + column[None, :] * stride_vd
    k_scales = None if k_scale_ptr is None else row * stride_ksn + slot * stride_kss + head * stride_ksh
    v_scales = None if v_scale_ptr is None else row * stride_vsn + slot * stride_vss + head * stride_vsh
    store_rows(k, to_k, k_columns, inside, k_scale_ptr, k_scales, kept, LARGEST_K)
    store_rows(v, to_v, v_columns, inside, v_scale_ptr, v_scales, kept, LARGEST_V)


@triton.jit
def finite(maximum):
    """A maximum to subtract: 0 where there was no score above −∞, as −∞ − −∞ is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def merge_pieces(
    maximum,
    total,
    weighted,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    query,
    queries,
    pieces,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    """A query's piece together with its first `pieces` stored ones, `[pieces, queries]` (· head_dim)."""
    column = tl.arange(0, BLOCK_D)
    for first in range(0, pieces, BLOCK_PIECES):
        piece = first + tl.arange(0, BLOCK_PIECES)
        row = piece.to(tl.int64) * queries + query
        inside = (piece < pieces)[:, None] & (column < HEAD_DIM)[None, :]
        maxima = tl.load(maximum_ptr + row, mask=piece < pieces, other=float("-inf"))
        totals = tl.load(total_ptr + row, mask=piece < pieces, other=0.0)
        values = tl.load(weighted_ptr + row[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0.0)
        largest = tl.maximum(maximum, tl.max(maxima, axis=0))
        own, theirs = tl.exp2(maximum - finite(largest)), tl.exp2(maxima - finite(largest))
        total = total * own + tl.sum(totals * theirs, axis=0)
        weighted = weighted * own + tl.sum(values * theirs[:, None], axis=0)
        maximum = largest
    return maximum, total, weighted


@triton.jit
def tiles_of_split(position, S, splits, BLOCK_S: tl.constexpr):
    """Number of entries 0…position, and of tiles of BLOCK_S that each split of them has."""
    entries = tl.minimum(position + 1, S).to(tl.int32)
    return entries, tl.cdiv(tl.cdiv(entries, BLOCK_S), splits)


STRIDES = ["stride_n", "stride_h", "stride_s", "stride_scale_n", "stride_scale_h"]  # not of the scales' slots: it is 1


@triton.jit(do_not_specialize=["N", "heads", "S", "splits", "prefix_pieces", *STRIDES])
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    out_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    k_scale_ptr,
    v_scale_ptr,
    N,
    heads,
    S,
    splits,
    prefix_pieces,
    stride_n,
    stride_h,
    stride_s,
    stride_scale_n,
    stride_scale_h,
    stride_scale_s,
    scale,
    WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One query against one split of its own entries 0…position, all of them if WHOLE.

    The splits share the entries evenly, whatever the position. WHOLE merges the prefix's pieces, if any, and stores
    the query's output; else the result is piece `prefix_pieces + split`. Strides are in multiples of UNIT elements, so
    that the compiler knows how the rows are aligned; those of the scales are in elements. scale includes log2 e.

    Each of the BLOCK_S slots of a tile has a softmax of its own, so that nothing is exchanged between threads but the
    sums of one key's products, until the slots are merged at the end.
    """
    split, query = tl.program_id(0) % splits, tl.program_id(0) // splits
    entries, tiles = tiles_of_split(tl.load(position_ptr), S, splits, BLOCK_S)
    first = split * tiles * BLOCK_S
    last = tl.minimum(entries, first + tiles * BLOCK_S)
    if not WHOLE:  # noqa: SIM102 - known when it is compiled, unlike the other condition
        if first >= entries:
            return
    column = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + query.to(tl.int64) * HEAD_DIM + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
    sequence, head = (query // heads).to(tl.int64), (query % heads).to(tl.int64)
    base = sequence * stride_n * UNIT + head * stride_h * UNIT
    if k_scale_ptr is not None:
        k_scale_ptr += sequence * stride_scale_n + head * stride_scale_h
    if v_scale_ptr is not None:
        v_scale_ptr += sequence * stride_scale_n + head * stride_scale_h
    maximum = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    weighted = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in tl.range(first, last, BLOCK_S, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_S)
        inside = (slot < last)[:, None] & (column < HEAD_DIM)[None, :]
        offset = base + slot.to(tl.int64)[:, None] * stride_s * UNIT + column[None, :]
        k = tl.load(k_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        scales = None if k_scale_ptr is None else slot.to(tl.int64) * stride_scale_s
        score = tl.sum(k * q[None, :], axis=1) * scale
        if k_scale_ptr is not None:
            score *= tl.load(k_scale_ptr + scales, mask=slot < last, other=0.0).to(tl.float32)
        score = tl.where(slot < last, score, float("-inf"))
        largest = tl.maximum(maximum, score)
        fade, weight = tl.exp2(maximum - finite(largest)), tl.exp2(score - finite(largest))
        total = total * fade + weight
        if v_scale_ptr is not None:
            weight *= tl.load(v_scale_ptr + scales, mask=slot < last, other=0.0).to(tl.float32)
        weighted = weighted * fade[:, None] + weight[:, None] * v
        maximum = largest

    largest = tl.max(maximum, axis=0)
    fade = tl.exp2(maximum - finite(largest))
    total = tl.sum(total * fade, axis=0)
    weighted = tl.sum(weighted * fade[:, None], axis=0)
    if WHOLE:
        if maximum_ptr is not None:
            largest, total, weighted = merge_pieces(
                largest,
                total,
                weighted,
                maximum_ptr,
                total_ptr,
                weighted_ptr,
                query,
                N * heads,
                prefix_pieces,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_PIECES,
            )
        out = out_ptr + query.to(tl.int64) * HEAD_DIM + column
        tl.store(
            out, (weighted / tl.where(total == 0, 1.0, total)).to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM
        )
    else:
        row = (prefix_pieces + split).to(tl.int64) * N * heads + query
        tl.store(maximum_ptr + row, largest)
        tl.store(total_ptr + row, total)
        tl.store(weighted_ptr + row * HEAD_DIM + column, weighted, mask=column < HEAD_DIM)


@triton.jit(
    do_not_specialize=["heads", "L", "group_size", "query_blocks", "splits", "stride_n", "stride_h", "stride_l"]
)
def decode_attention_prefix_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    N,
    heads,
    L,
    group_size,
    query_blocks,
    splits,
    stride_n,
    stride_h,
    stride_l,
    scale,
    WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Up to BLOCK_Q queries of a group, the rows of the dots, against one split of their prefix: piece `split`.

    k and v are `[P, heads, L, head_dim]`, strides in multiples of UNIT elements; mask (or None) is contiguous `[P, L]`.
    What it leaves out is not read. WIDE: operands become fp32, as where q and the prefix differ in dtype. scale
    includes log2 e.
    """
    split, rest = tl.program_id(0) % splits, tl.program_id(0) // splits
    block, rest = rest % query_blocks, rest // query_blocks
    head, group = rest % heads, (rest // heads).to(tl.int64)
    within = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = tl.arange(0, BLOCK_D)
    query = (group * group_size + within) * heads + head
    stored = (within < group_size)[:, None] & (column < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + query[:, None] * HEAD_DIM + column[None, :], mask=stored, other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    base = group * stride_n * UNIT + head.to(tl.int64) * stride_h * UNIT
    tiles = tl.cdiv(tl.cdiv(L, BLOCK_L), splits)
    first = split * tiles * BLOCK_L
    last = tl.minimum(L, first + tiles * BLOCK_L)
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    weighted = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_L):
        slot = start + tl.arange(0, BLOCK_L)
        kept = slot < last
        if mask_ptr is not None:
            kept = kept & tl.load(mask_ptr + group * L + slot, mask=kept, other=0).to(tl.int1)
        inside = kept[:, None] & (column < HEAD_DIM)[None, :]
        offset = base + slot.to(tl.int64)[:, None] * stride_l * UNIT + column[None, :]
        k = tl.load(k_ptr + offset, mask=inside, other=0.0).to(q.dtype)
        v = tl.load(v_ptr + offset, mask=inside, other=0.0).to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale  # 16-bit operands disregard the precision
        score = tl.where(kept[None, :], score, float("-inf"))
        largest = tl.maximum(maximum, tl.max(score, axis=1))
        fade = tl.exp2(maximum - finite(largest))
        weight = tl.exp2(score - finite(largest)[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        weighted = tl.dot(weight.to(q.dtype), v, weighted * fade[:, None], input_precision="tf32x3")
        maximum = largest
    row = split.to(tl.int64) * N * heads + query
    tl.store(maximum_ptr + row, maximum, mask=within < group_size)
    tl.store(total_ptr + row, total, mask=within < group_size)
    tl.store(weighted_ptr + row[:, None] * HEAD_DIM + column[None, :], weighted, mask=stored)


@triton.jit(do_not_specialize=["queries", "S", "splits", "prefix_pieces"])
def decode_attention_combine_kernel(
    position_ptr,
    out_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    queries,
    S,
    splits,
    prefix_pieces,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    """A query's output from the pieces of its prefix and of those splits of its own entries that had any."""
    entries, tiles = tiles_of_split(tl.load(position_ptr), S, splits, BLOCK_S)
    pieces = prefix_pieces + tl.cdiv(entries, tl.maximum(tiles, 1) * BLOCK_S)
    column = tl.arange(0, BLOCK_D)
    query = tl.program_id(0)
    _, total, weighted = merge_pieces(
        tl.full([], float("-inf"), tl.float32),
        tl.full([], 0.0, tl.float32),
        tl.zeros([BLOCK_D], tl.float32),
        maximum_ptr,
        total_ptr,
        weighted_ptr,
        query,
        queries,
        pieces,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_PIECES,
    )
    out = out_ptr + query.to(tl.int64) * HEAD_DIM + column
    tl.store(out, (weighted / tl.where(total == 0, 1.0, total)).to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)


@torch.library.custom_op("vapi_fast::append_to_cache", mutates_args=("k_cache", "v_cache", "k_scale", "v_scale"))
def append_to_cache_op(
    qkv: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """Writes to the caches and their scales; returns the rotated queries."""
    sequences, _, heads, head_dim = qkv.shape
    q, block_d = qkv.new_empty(sequences, heads, head_dim), next_power_of_2(head_dim)
    block_heads = min(next_power_of_2(heads), max(APPEND_COLUMNS // block_d, 1))
    head_blocks = triton.cdiv(heads, block_heads)
    tensors = (qkv.contiguous(), table.contiguous(), k_cache, v_cache, position, q, k_scale, v_scale)
    strides = (*k_cache.stride(), *v_cache.stride(), *strides_of(k_scale), *strides_of(v_scale))
    constants = {"LARGEST_K": largest_of(k_cache.dtype), "LARGEST_V": largest_of(v_cache.dtype), **APPEND}
    constants |= {"HEAD_DIM": head_dim, "BLOCK_HEADS": block_heads, "BLOCK_D": block_d}
    grid = (sequences * head_blocks,)
    launch(append_to_cache_kernel, grid, *tensors, k_cache.shape[2], heads, head_blocks, *strides, **constants)
    return q


def largest_of(dtype: torch.dtype) -> float | None:
    """The largest number of a dtype without infinity that is stored in it."""
    return {torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max, torch.int8: LARGEST_INT8}.get(dtype)


def strides_of(scale: Tensor | None) -> tuple[int | None, ...]:
    return (None,) * 3 if scale is None else scale.stride()


append_to_cache_op.register_fake(lambda qkv, *_: qkv.new_empty(qkv.shape[0], *qkv.shape[2:]))


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
    """Rotation and storage in one launch; see `vapi_fast.ops.append_to_cache`."""
    check_dtypes("append_to_cache", qkv=qkv, table=table, k_scale=k_scale, v_scale=v_scale)
    check_dtypes("append_to_cache", CACHE_DTYPES, k_cache=k_cache, v_cache=v_cache)
    return append_to_cache_op(qkv, table, k_cache, v_cache, seed_tensor(position, qkv.device), k_scale, v_scale)


class Cache(NamedTuple):
    """Keys and values `[·, heads, slots, head_dim]` whose elements lie the same way; strides in units of `unit`."""

    keys: Tensor
    values: Tensor
    strides: tuple[int, ...]
    unit: int


class Pieces(NamedTuple):
    """Attention of each of the N · heads queries to parts of its keys, not yet divided by the total; fp32."""

    maximum: Tensor | None  # [pieces, queries]
    total: Tensor | None  # [pieces, queries]
    weighted: Tensor | None  # [pieces, queries, head_dim]


def cache_of(keys: Tensor, values: Tensor) -> Cache:
    """A copy only where the elements of a row are not adjacent, or keys and values lie differently."""
    if keys.stride(3) != 1 or keys.stride() != values.stride():
        keys, values = keys.contiguous(), values.contiguous()
    unit = math.gcd(MIN_DOT, keys.shape[3], *keys.stride()[:3])
    return Cache(keys, values, tuple(stride // unit for stride in keys.stride()[:3]), unit)


def scales_of(k_scale: Tensor | None, v_scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Copies only where they lie differently."""
    if k_scale is not None and k_scale.stride() != v_scale.stride():
        return k_scale.contiguous(), v_scale.contiguous()
    return k_scale, v_scale


def splits_of(tiles: int, queries: int, device: torch.device) -> int:
    """Programs that share a query's (or block of queries') tiles of keys: more than one where queries are few."""
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device), max(queries, 1))
    return max(min(tiles, wanted), 1)


@torch.library.custom_op("vapi_fast::decode_attention", mutates_args=())
def decode_attention_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_mask: Tensor | None,
) -> Tensor:
    sequences, heads, head_dim = q.shape
    q, own, queries = q.contiguous(), cache_of(k_cache, v_cache), sequences * heads
    out = torch.empty_like(q)
    slots, block_d = k_cache.shape[2], max(next_power_of_2(head_dim), MIN_DOT)
    wide = max(k_cache.element_size() // 2, 1)  # a tile of fp32 takes the registers of two in 16 bits
    block_s = max(OWN_ELEMENTS // (wide * block_d), 1)
    splits = splits_of(triton.cdiv(slots, block_s), queries, q.device)
    common = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_S": block_s, "BLOCK_PIECES": COMBINE["BLOCK_PIECES"]}

    shared = None if prefix_k is None or prefix_k.shape[2] == 0 else cache_of(prefix_k, prefix_v)
    prefix = {} if shared is None else prefix_blocks(q, shared, block_d)
    prefix_pieces = prefix.get("splits", 0)
    pieces = new_pieces(prefix_pieces + (splits if splits > 1 else 0), q)
    scale = head_dim**-0.5 * math.log2(math.e)
    if shared is not None:
        launch_prefix(q, shared, prefix_mask, pieces, scale, **prefix)
    scales = scales_of(k_scale, v_scale)
    tensors = (q, own.keys, own.values, position, out, *pieces, *scales)
    sizes = (sequences, heads, slots, splits, prefix_pieces, *own.strides, *strides_of(scales[0]))
    constants = {"WHOLE": splits == 1, "UNIT": own.unit, "STAGES": OWN["num_stages"], **common, **OWN}
    launch(decode_attention_kernel, (queries * splits,), *tensors, *sizes, scale, **constants)
    if splits > 1:
        sizes = (queries, slots, splits, prefix_pieces)
        launch(decode_attention_combine_kernel, (queries,), position, out, *pieces, *sizes, **common | COMBINE)
    return out


def new_pieces(pieces: int, q: Tensor) -> Pieces:
    if pieces == 0:
        return Pieces(None, None, None)
    sequences, heads, head_dim = q.shape
    maximum, total = torch.empty(2, pieces, sequences * heads, dtype=torch.float32, device=q.device).unbind(0)
    return Pieces(maximum, total, torch.empty(*maximum.shape, head_dim, dtype=torch.float32, device=q.device))


def prefix_blocks(q: Tensor, shared: Cache, block_d: int) -> dict[str, int]:
    """How the prefix kernel divides its work: `splits` of the prefix, `query_blocks` of a group, and its settings."""
    groups, heads, prefix_len, _ = shared.keys.shape
    group_size = q.shape[0] // groups
    block = PREFIX | {"BLOCK_D": block_d}
    width = 4 if wide_dots(q, shared) else q.element_size()
    rows = max(PREFIX_BYTES // (width * block_d), MIN_DOT)
    for name, size in (("BLOCK_Q", group_size), ("BLOCK_L", prefix_len)):
        block[name] = min(max(next_power_of_2(size), MIN_DOT), rows)
    query_blocks = triton.cdiv(group_size, block["BLOCK_Q"])
    splits = splits_of(triton.cdiv(prefix_len, block["BLOCK_L"]), groups * heads * query_blocks, q.device)
    return block | {"query_blocks": query_blocks, "splits": splits}


def wide_dots(q: Tensor, shared: Cache) -> bool:
    """Whether operands become fp32: if their dtypes differ, and bfloat16 ones where the kernel is interpreted.

    Triton's interpreter would multiply the bits of bfloat16 numbers instead of their values.
    """
    return not q.dtype == shared.keys.dtype == shared.values.dtype or (q.is_cpu and q.dtype == torch.bfloat16)


def launch_prefix(
    q: Tensor,
    shared: Cache,
    mask: Tensor | None,
    pieces: Pieces,
    scale: float,
    query_blocks: int,
    splits: int,
    **block: int,
) -> None:
    sequences, heads, head_dim = q.shape
    groups, _, prefix_len, _ = shared.keys.shape
    tensors = (q, shared.keys, shared.values, contiguous(mask), *pieces)
    sizes = (sequences, heads, prefix_len, sequences // groups, query_blocks, splits, *shared.strides)
    constants = {"WIDE": wide_dots(q, shared), "HEAD_DIM": head_dim, "UNIT": shared.unit, **block}
    grid = (groups * heads * query_blocks * splits,)
    launch(decode_attention_prefix_kernel, grid, *tensors, *sizes, scale, **constants)


decode_attention_op.register_fake(lambda q, *_: q.new_empty(q.shape))


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
    """Attention that reads each key and value once; no gradients. See `vapi_fast.ops.decode_attention`."""
    check_dtypes("decode_attention", q=q, k_scale=k_scale, v_scale=v_scale, prefix_k=prefix_k, prefix_v=prefix_v)
    check_dtypes("decode_attention", CACHE_DTYPES, k_cache=k_cache, v_cache=v_cache)
    position = seed_tensor(position, q.device)
    return decode_attention_op(q, k_cache, v_cache, position, k_scale, v_scale, prefix_k, prefix_v, prefix_mask)
