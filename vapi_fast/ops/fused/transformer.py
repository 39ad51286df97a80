"""Rotary positions, SwiGLU and attention against a cache on Triton: launches, registration with PyTorch, gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vapi_fast.kernels import transformer as kernels

from .launch import CACHE_DTYPES, check_dtypes, launch, multiprocessors, next_power_of_2, seed_tensor, settings
from .normalization import rows_of

# Programs that attention is split into where there are few queries: about three times what runs at once, so that the
# last ones to finish do not leave much of the GPU idle.
PROGRAMS_PER_MULTIPROCESSOR = 16
MIN_DOT = 16  # the least size of a matrix that a dot takes


def tile_of(kernel: str, x: Tensor, columns: int) -> dict[str, int]:
    """A table's BLOCK_ELEMENTS, as rows of at most BLOCK_COLUMNS columns."""
    block = dict(settings(kernel, x))
    block["BLOCK_COLUMNS"] = min(next_power_of_2(columns), block["BLOCK_COLUMNS"])
    block["BLOCK_ROWS"] = max(block.pop("BLOCK_ELEMENTS") // block["BLOCK_COLUMNS"], 1)
    return block


def rotary_2d_forward(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    """x turned by the table's angles, or back (by the transposed rotation); contiguous."""
    batch, length, heads, head_dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.stride(3) != 1 or (heads > 1 and x.stride(2) != head_dim):  # a slice of a fused projection is taken as it is
        x = x.contiguous()
    columns = heads * head_dim
    block = tile_of("rotary_2d", x, columns)
    column_blocks = triton.cdiv(columns, block["BLOCK_COLUMNS"])
    launch(
        kernels.rotary_2d,
        (triton.cdiv(batch * length, block["BLOCK_ROWS"]) * column_blocks,),
        x,
        table.contiguous(),
        y,
        batch * length,
        length,
        columns,
        column_blocks,
        x.stride(0),
        x.stride(1),
        INVERSE=inverse,
        HEAD_DIM=head_dim,
        **block,
    )
    return y


rotary_2d_op = torch.library.custom_op("vapi_fast::rotary_2d", rotary_2d_forward, mutates_args=())


@rotary_2d_op.register_fake
def _(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rotary_2d_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, ctx.inverse = inputs
    ctx.save_for_backward(table)


def _rotary_2d_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return rotary_2d_op(dy, *ctx.saved_tensors, not ctx.inverse), None, None


rotary_2d_op.register_autograd(_rotary_2d_gradient, setup_context=_rotary_2d_context)


def rotary_2d(x: Tensor, table: Tensor) -> Tensor:
    """Rotation of interleaved pairs in one pass; see `vapi_fast.ops.rotary_2d`."""
    check_dtypes("rotary_2d", x=x, table=table)
    return rotary_2d_op(x, table, False)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = rows_of(gate), rows_of(up)
    rows, width = gate.shape
    block = tile_of("swiglu_forward", gate, width)
    column_blocks = triton.cdiv(width, block["BLOCK_COLUMNS"])
    launch(
        kernels.swiglu_forward,
        (triton.cdiv(rows, block["BLOCK_ROWS"]) * column_blocks,),
        gate,
        up,
        y,
        rows,
        width,
        column_blocks,
        gate.stride(0),
        up.stride(0),
        **block,
    )
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    dy, gate, up = rows_of(dy), rows_of(gate), rows_of(up)
    rows, width = gate.shape
    block = tile_of("swiglu_backward", gate, width)
    column_blocks = triton.cdiv(width, block["BLOCK_COLUMNS"])
    launch(
        kernels.swiglu_backward,
        (triton.cdiv(rows, block["BLOCK_ROWS"]) * column_blocks,),
        dy,
        gate,
        up,
        dgate,
        dup,
        rows,
        width,
        column_blocks,
        dy.stride(0),
        gate.stride(0),
        up.stride(0),
        **block,
    )
    return dgate, dup


swiglu_op = torch.library.custom_op("vapi_fast::swiglu", swiglu_forward, mutates_args=())
swiglu_backward_op = torch.library.custom_op("vapi_fast::swiglu_backward", swiglu_backward, mutates_args=())


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@swiglu_backward_op.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _swiglu_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward_op(dy, *ctx.saved_tensors)


swiglu_op.register_autograd(_swiglu_gradient, setup_context=_swiglu_context)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up in one pass; see `vapi_fast.ops.swiglu`."""
    check_dtypes("swiglu", gate=gate, up=up)
    return swiglu_op(gate, up)


def append_to_cache_forward(qkv: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor) -> Tensor:
    """Writes to the caches; returns the rotated queries."""
    sequences, _, heads, head_dim = qkv.shape
    q = torch.empty(sequences, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    columns, block = heads * head_dim, dict(settings("append_to_cache", qkv))
    block["BLOCK_COLUMNS"] = min(next_power_of_2(columns), block["BLOCK_COLUMNS"])
    column_blocks = triton.cdiv(columns, block["BLOCK_COLUMNS"])
    launch(
        kernels.append_to_cache,
        (sequences * column_blocks,),
        qkv.contiguous(),
        table.contiguous(),
        k_cache,
        v_cache,
        position,
        q,
        k_cache.shape[2],
        columns,
        column_blocks,
        *k_cache.stride(),
        *v_cache.stride(),
        HEAD_DIM=head_dim,
        LARGEST_K=largest_of(k_cache.dtype),
        LARGEST_V=largest_of(v_cache.dtype),
        **block,
    )
    return q


def largest_of(dtype: torch.dtype) -> float | None:
    """The largest number of a dtype without infinity."""
    return torch.finfo(dtype).max if dtype == torch.float8_e4m3fn else None


append_to_cache_op = torch.library.custom_op(
    "vapi_fast::append_to_cache", append_to_cache_forward, mutates_args=("k_cache", "v_cache")
)


@append_to_cache_op.register_fake
def _(qkv: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])


@torch.no_grad()
def append_to_cache(qkv: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor, position: int | Tensor) -> Tensor:
    """Rotation and storage in one launch; see `vapi_fast.ops.append_to_cache`."""
    check_dtypes("append_to_cache", qkv=qkv, table=table)
    check_dtypes("append_to_cache", CACHE_DTYPES, k_cache=k_cache, v_cache=v_cache)
    return append_to_cache_op(qkv, table, k_cache, v_cache, seed_tensor(position, qkv.device))


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


def splits_of(tiles: int, queries: int, device: torch.device) -> int:
    """Programs that share a query's (or block of queries') tiles of keys: more than one where queries are few."""
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device), max(queries, 1))
    return max(min(tiles, wanted), 1)


def decode_attention_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_mask: Tensor | None,
) -> Tensor:
    sequences, heads, head_dim = q.shape
    q, own = q.contiguous(), cache_of(k_cache, v_cache)
    out = torch.empty_like(q)
    slots, block_d = k_cache.shape[2], max(next_power_of_2(head_dim), MIN_DOT)
    block = dict(settings("decode_attention", k_cache))
    wide = max(k_cache.element_size() // 2, 1)  # a tile of fp32 takes the registers of two in 16 bits
    block_s = max(block.pop("BLOCK_ELEMENTS") // (wide * block_d), 1)
    combine = settings("decode_attention_combine", q)
    splits = splits_of(triton.cdiv(slots, block_s), sequences * heads, q.device)
    common = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_S": block_s, "BLOCK_PIECES": combine["BLOCK_PIECES"]}

    shared = None if prefix_k is None or prefix_k.shape[2] == 0 else cache_of(prefix_k, prefix_v)
    prefix = {} if shared is None else prefix_blocks(q, shared, block_d)
    prefix_pieces = prefix.get("splits", 0)
    pieces = new_pieces(prefix_pieces + (splits if splits > 1 else 0), q)
    scale = head_dim**-0.5 * math.log2(math.e)
    if shared is not None:
        launch_prefix(q, shared, prefix_mask, pieces, scale, **prefix)
    launch(
        kernels.decode_attention,
        (sequences * heads * splits,),
        q,
        own.keys,
        own.values,
        position,
        out,
        *pieces,
        sequences,
        heads,
        slots,
        splits,
        prefix_pieces,
        *own.strides,
        scale,
        WHOLE=splits == 1,
        UNIT=own.unit,
        STAGES=block["num_stages"],
        **common,
        **block,
    )
    if splits > 1:
        launch(
            kernels.decode_attention_combine,
            (sequences * heads,),
            position,
            out,
            *pieces,
            sequences * heads,
            slots,
            splits,
            prefix_pieces,
            **common | combine,
        )
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
    block = dict(settings("decode_attention_prefix", q)) | {"BLOCK_D": block_d}
    width = 4 if wide_dots(q, shared) else q.element_size()
    rows = max(block.pop("BLOCK_BYTES") // (width * block_d), MIN_DOT)
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
    launch(
        kernels.decode_attention_prefix,
        (groups * heads * query_blocks * splits,),
        q,
        shared.keys,
        shared.values,
        None if mask is None else mask.contiguous(),
        *pieces,
        sequences,
        heads,
        prefix_len,
        sequences // groups,
        query_blocks,
        splits,
        *shared.strides,
        scale,
        WIDE=wide_dots(q, shared),
        HEAD_DIM=head_dim,
        UNIT=shared.unit,
        **block,
    )


decode_attention_op = torch.library.custom_op("vapi_fast::decode_attention", decode_attention_forward, mutates_args=())


@decode_attention_op.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_mask: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape)


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
    """Attention that reads each key and value once; no gradients. See `vapi_fast.ops.decode_attention`."""
    check_dtypes("decode_attention", q=q, prefix_k=prefix_k, prefix_v=prefix_v)
    check_dtypes("decode_attention", CACHE_DTYPES, k_cache=k_cache, v_cache=v_cache)
    position = seed_tensor(position, q.device)
    return decode_attention_op(q, k_cache, v_cache, position, prefix_k, prefix_v, prefix_mask)
