"""The vector quantizer's codebook: nearest code, and entries of given codes.

n latents or indices; V codes of C numbers. z and e: bytes of a latent's number and of a codebook entry's. Instructions
are counted in the machine code for sm_90, C = 8.

| kernel           | bytes moved                           | instructions                               |
|------------------|---------------------------------------|--------------------------------------------|
| unit_tiles       | (z + 4)·n·C, again (e + 4)·V·C        | 3 a number                                 |
| nearest_code     | 4·V·C a block of latents, from the L2 | 20 a pair of latent and code (2·C + 3 + 1) |
| nearest_entry    | 8·n a split, (2·z + e)·n·C            | 10 a number                                |
| unit_backward    | 3·z·n·C, or (4 + 2·e)·V·C             | 10 a number                                |
| codebook_gather  | 8·n + 2·e·n·C                         | 5 a number                                 |
| codebook_scatter | 8·n + e·n·C, atomics on 4·n·C         | 3 a number                                 |

nearest_code is bound by the rate at which instructions issue, 28.7 T/s on an H100 (132 multiprocessors, 128 lanes,
1.7 GHz), not by memory; predicted with 85 % of it, n = 9216, V = 16384: 0.105 ms of instructions, 0.12 ms in all. The
distances stay in registers. |e|² − 2 z·e would take half the instructions, but its rounding grows with |e|², not with
the distance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import channel_blocks, check_dtypes, launch, next_power_of_2, rows_of

UNIT_TILES = {"num_warps": 4, "num_stages": 1}
NEAREST_CODE = {"BLOCK_ROWS": 32, "BLOCK_V": 128, "num_warps": 8, "num_stages": 1}
CODES_PER_SPLIT = 2048
NEAREST_ENTRY = {"BLOCK_ELEMENTS": 512, "num_warps": 2, "num_stages": 1}
ROWS = {"BLOCK_ELEMENTS": 1024, "num_warps": 4, "num_stages": 1}  # of the kernels with one pass over rows
UNIT_EPS = tl.constexpr(1e-12)  # of torch.nn.functional.normalize
# Up to so many channels a distance is written out, and the latents stay in registers, which suffice for no more.
MAX_UNROLLED = tl.constexpr(8)


@triton.jit
def unit_rows(x):
    """Rows of fp32 `[n, C]` divided by max(|x|, eps), and that divisor `[n, 1]`."""
    divisor = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), UNIT_EPS, propagate_nan=tl.PropagateNan.ALL)[:, None]
    return x / divisor, divisor


@triton.jit
def load_rows(x_ptr, row, rows, C, BLOCK_C: tl.constexpr):
    """Rows of a contiguous `[rows, C]` as fp32, 0 outside; their offsets, and what of them is inside."""
    channel = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    offset = row.to(tl.int64)[:, None] * C + channel[None, :]
    return tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32), offset, inside


@triton.jit
def unit_tiles_kernel(
    x_ptr,
    tiles_ptr,
    invalid_ptr,
    rows,
    C,
    PADDING: tl.constexpr,
    L2_NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows of `[rows, C]`, of unit length if L2_NORM, as fp32 tiles `[blocks, C, BLOCK_ROWS]`, PADDING after the last.

    invalid int32 `[blocks]`: the first row of each block that has a NaN then, or `rows`.
    """
    block = tl.program_id(0)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_C)
    x, _, _ = load_rows(x_ptr, row, rows, C, BLOCK_C)
    if L2_NORM:
        x, _ = unit_rows(x)
    tile = tl.where((row < rows)[:, None], x, PADDING)
    offset = channel[None, :] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    tl.store(tiles_ptr + block.to(tl.int64) * C * BLOCK_ROWS + offset, tile, mask=(channel < C)[None, :])
    invalid = tl.max((x != x).to(tl.int32), axis=1) > 0
    tl.store(invalid_ptr + block, tl.min(tl.where(invalid, row, rows), axis=0))


@triton.jit
def add_squared_difference(distance, latents_ptr, codes_ptr, channel, BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr):
    latent = tl.load(latents_ptr + channel * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
    code = tl.load(codes_ptr + channel * BLOCK_V + tl.arange(0, BLOCK_V))
    difference = latent[:, None] - code[None, :]
    return distance + difference * difference


@triton.jit
def nearest_code_kernel(
    latents_ptr,
    codes_ptr,
    distances_ptr,
    indices_ptr,
    rows,
    blocks,
    tiles,
    tiles_per_split,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Least |z − e|² of each latent over one split of the codes, and its lowest index: `[splits, rows]`.

    latents fp32 `[blocks, C, BLOCK_ROWS]`, codes fp32 `[tiles, C, BLOCK_V]` with ∞ for codes beyond the last. A NaN
    distance is never the least; where all are, or are infinite, the index is 0.
    """
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    latents_ptr += block.to(tl.int64) * C * BLOCK_ROWS
    least = tl.full([BLOCK_ROWS, BLOCK_V], float("inf"), tl.float32)
    nearest = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.int32)
    for tile in range(split * tiles_per_split, tl.minimum(tiles, (split + 1) * tiles_per_split)):
        tile_ptr = codes_ptr + tl.cast(tile, tl.int64) * C * BLOCK_V
        distance = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.float32)
        if C <= MAX_UNROLLED:
            for channel in tl.static_range(C):
                distance = add_squared_difference(distance, latents_ptr, tile_ptr, channel, BLOCK_ROWS, BLOCK_V)
        else:
            for channel in range(C):
                distance = add_squared_difference(distance, latents_ptr, tile_ptr, channel, BLOCK_ROWS, BLOCK_V)
        closer = distance < least
        least = tl.where(closer, distance, least)
        nearest = tl.where(closer, (tile * BLOCK_V + tl.arange(0, BLOCK_V))[None, :], nearest)
    distance = tl.min(least, axis=1)
    index = tl.min(tl.where(least == distance[:, None], nearest, 2147483647), axis=1)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = split.to(tl.int64) * rows + row
    tl.store(distances_ptr + out, distance, mask=row < rows)
    tl.store(indices_ptr + out, index, mask=row < rows)


@triton.jit
def nearest_entry_kernel(
    z_ptr,
    codebook_ptr,
    distances_ptr,
    indices_ptr,
    invalid_ptr,
    z_q_ptr,
    out_ptr,
    rows,
    V,
    C,
    splits,
    blocks,
    L2_NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
):
    """The nearest code of each latent out of all splits, and its entry; a NaN code is nearest to every latent."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    least = tl.full([BLOCK_ROWS], float("inf"), tl.float32)
    index = tl.zeros([BLOCK_ROWS], tl.int32)
    for split in range(splits):
        offset = tl.cast(split, tl.int64) * rows + row
        distance = tl.load(distances_ptr + offset, mask=row < rows, other=float("inf"))
        closer = distance < least
        index = tl.where(closer, tl.load(indices_ptr + offset, mask=row < rows, other=0), index)
        least = tl.where(closer, distance, least)
    block = tl.arange(0, BLOCK_BLOCKS)
    invalid = tl.min(tl.load(invalid_ptr + block, mask=block < blocks, other=2147483647), axis=0)
    index = tl.where(invalid < V, invalid, index)
    tl.store(out_ptr + row, index.to(tl.int64), mask=row < rows)

    z, offset, inside = load_rows(z_ptr, row, rows, C, BLOCK_C)
    entry, _, _ = load_rows(codebook_ptr, index, V, C, BLOCK_C)
    if L2_NORM:
        z, _ = unit_rows(z)
        entry, _ = unit_rows(entry)
    # z − z: 0, or NaN where z has no value.
    tl.store(z_q_ptr + offset, (entry + (z - z)).to(z_q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def unit_backward_kernel(dunit_ptr, x_ptr, dx_ptr, rows, C, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """dx of x̂ = x / max(|x|, eps): (dx̂ − x̂ (x̂·dx̂)) / |x|, and dx̂ / eps where |x| < eps; `[rows, C]`."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    x, offset, inside = load_rows(x_ptr, row, rows, C, BLOCK_C)
    dunit, _, _ = load_rows(dunit_ptr, row, rows, C, BLOCK_C)
    unit, divisor = unit_rows(x)
    along = tl.sum(unit * dunit, axis=1)[:, None]
    dx = (dunit - tl.where(divisor == UNIT_EPS, 0.0, unit * along)) / divisor
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def codebook_gather_kernel(
    indices_ptr,
    codebook_ptr,
    entries_ptr,
    rows,
    V,
    C,
    L2_NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Entries `[rows, C]` of the codes in indices `[rows]`; NaN for an index outside 0…V−1, which reads nothing."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    index = tl.load(indices_ptr + row, mask=row < rows, other=0)
    known = ((index >= 0) & (index < V))[:, None]
    entry = tl.load(codebook_ptr + index[:, None] * C + channel[None, :], mask=inside & known, other=0.0)
    entry = entry.to(tl.float32)
    if L2_NORM:
        entry, _ = unit_rows(entry)
    entry = tl.where(known, entry, float("nan"))
    offset = row.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(entries_ptr + offset, entry.to(entries_ptr.dtype.element_ty), mask=inside)


@triton.jit
def codebook_scatter_kernel(
    dentries_ptr, indices_ptr, sums_ptr, rows, V, C, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Add the gradients `[rows, C]` of each code's entries to sums, fp32 `[V, C]`, in no certain order."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dentries, _, inside = load_rows(dentries_ptr, row, rows, C, BLOCK_C)
    index = tl.load(indices_ptr + row, mask=row < rows, other=-1)[:, None]
    target = sums_ptr + index * C + tl.arange(0, BLOCK_C)[None, :]
    tl.atomic_add(target, dentries, mask=inside & (index >= 0) & (index < V), sem="relaxed")


def code_splits(codes_per_split: int, block_v: int, vocab_size: int) -> tuple[int, int]:
    """Programs that share the codes of a block of rows, and the codes of each: a multiple of block_v."""
    codes = triton.cdiv(codes_per_split, block_v) * block_v
    return triton.cdiv(vocab_size, codes), codes


def unit_tiles(rows: Tensor, l2_norm: bool, block_rows: int, padding: float) -> tuple[Tensor, Tensor]:
    """Rows of `[n, C]` as fp32 tiles `[blocks, C, block_rows]`; the first row with a NaN of each block, or n."""
    count, channels = rows.shape
    blocks = triton.cdiv(count, block_rows)
    tiles = rows.new_empty(blocks, channels, block_rows, dtype=torch.float32)
    invalid = rows.new_empty(blocks, dtype=torch.int32)
    constants = {"PADDING": padding, "L2_NORM": l2_norm, "BLOCK_ROWS": block_rows, **UNIT_TILES}
    constants["BLOCK_C"] = next_power_of_2(channels)
    launch(unit_tiles_kernel, (blocks,), rows, tiles, invalid, count, channels, **constants)
    return tiles, invalid


def launch_rows(
    kernel: Any, count: int, channels: int, *arguments: Any, settings: dict[str, int] = ROWS, **constants: Any
) -> None:
    """Launch a kernel with one pass over `count` rows of all channels."""
    block = channel_blocks(settings, channels, "BLOCK_ROWS")
    launch(kernel, (triton.cdiv(count, block["BLOCK_ROWS"]),), *arguments, **constants, **block)


@torch.library.custom_op("vapi_fast::vq_lookup", mutates_args=())
def vq_lookup_op(z: Tensor, codebook: Tensor, l2_norm: bool) -> tuple[Tensor, Tensor]:
    rows, codebook = rows_of(z).contiguous(), codebook.contiguous()
    (count, channels), vocab_size = rows.shape, len(codebook)
    z_q, indices = empty_codes(z)

    block_v = NEAREST_CODE["BLOCK_V"]
    splits, codes_per_split = code_splits(CODES_PER_SPLIT, block_v, vocab_size)
    latents, _ = unit_tiles(rows, l2_norm, NEAREST_CODE["BLOCK_ROWS"], 0.0)
    codes, invalid = unit_tiles(codebook, l2_norm, block_v, math.inf)
    distances = z.new_empty(splits, count, dtype=torch.float32)
    nearest = z.new_empty(splits, count, dtype=torch.int32)
    sizes = (count, len(latents), len(codes), codes_per_split // block_v)
    grid = (len(latents) * splits,)
    launch(nearest_code_kernel, grid, latents, codes, distances, nearest, *sizes, C=channels, **NEAREST_CODE)
    tensors = (rows, codebook, distances, nearest, invalid, z_q, indices)
    sizes = (count, vocab_size, channels, splits, len(invalid))
    constants = {"L2_NORM": l2_norm, "BLOCK_BLOCKS": next_power_of_2(len(invalid))}
    launch_rows(nearest_entry_kernel, count, channels, *tensors, *sizes, settings=NEAREST_ENTRY, **constants)
    return z_q, indices


def empty_codes(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=torch.int64)


def unit_backward(dunit: Tensor, x: Tensor) -> Tensor:
    """Gradient of vectors `[..., C]` from that of the vectors scaled to unit length."""
    rows, dx = rows_of(x).contiguous(), x.new_empty(x.shape)
    launch_rows(unit_backward_kernel, *rows.shape, dunit.contiguous(), rows, dx, *rows.shape)
    return dx


unit_backward_op = torch.library.custom_op("vapi_fast::unit_backward", unit_backward, mutates_args=())


@torch.library.custom_op("vapi_fast::codebook_lookup", mutates_args=())
def codebook_lookup_op(indices: Tensor, codebook: Tensor, l2_norm: bool) -> Tensor:
    count, (vocab_size, channels) = indices.numel(), codebook.shape
    entries = codebook.new_empty(*indices.shape, channels)
    tensors, sizes = (indices.contiguous(), codebook.contiguous(), entries), (count, vocab_size, channels)
    launch_rows(codebook_gather_kernel, count, channels, *tensors, *sizes, L2_NORM=l2_norm)
    return entries


@torch.library.custom_op("vapi_fast::codebook_lookup_backward", mutates_args=())
def codebook_lookup_backward_op(dentries: Tensor, indices: Tensor, codebook: Tensor, l2_norm: bool) -> Tensor:
    count, (vocab_size, channels) = indices.numel(), codebook.shape
    sums = codebook.new_zeros(codebook.shape, dtype=torch.float32)
    tensors, sizes = (dentries.contiguous(), indices.contiguous(), sums), (count, vocab_size, channels)
    launch_rows(codebook_scatter_kernel, count, channels, *tensors, *sizes)
    return unit_backward(sums, codebook) if l2_norm else sums.to(codebook.dtype)


vq_lookup_op.register_fake(lambda z, codebook, l2_norm: empty_codes(z))
unit_backward_op.register_fake(lambda dunit, x: x.new_empty(x.shape))
codebook_lookup_op.register_fake(
    lambda indices, codebook, l2_norm: codebook.new_empty(*indices.shape, codebook.shape[1])
)
codebook_lookup_backward_op.register_fake(
    lambda dentries, indices, codebook, l2_norm: codebook.new_empty(codebook.shape)
)


def _vq_lookup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, _, ctx.l2_norm = inputs
    ctx.save_for_backward(z)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _vq_lookup_gradient(ctx: Any, dz_q: Tensor, _: None) -> tuple[Tensor, None, None]:
    return unit_backward_op(dz_q, *ctx.saved_tensors) if ctx.l2_norm else dz_q, None, None


def _codebook_lookup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, codebook, ctx.l2_norm = inputs
    ctx.save_for_backward(indices, codebook)


def _codebook_lookup_gradient(ctx: Any, dentries: Tensor) -> tuple[None, Tensor, None]:
    return None, codebook_lookup_backward_op(dentries, *ctx.saved_tensors, ctx.l2_norm), None


vq_lookup_op.register_autograd(_vq_lookup_gradient, setup_context=_vq_lookup_context)
codebook_lookup_op.register_autograd(_codebook_lookup_gradient, setup_context=_codebook_lookup_context)


def vq_lookup(z: Tensor, codebook: Tensor, *, l2_norm: bool = True) -> tuple[Tensor, Tensor]:
    """Nearest codes without the distances in memory; see `vapi_fast.ops.vq_lookup`."""
    check_dtypes("vq_lookup", z=z, codebook=codebook)
    return vq_lookup_op(z, codebook, l2_norm)


def codebook_lookup(indices: Tensor, codebook: Tensor, *, l2_norm: bool = True) -> Tensor:
    """Entries gathered and normalised in one pass; see `vapi_fast.ops.codebook_lookup`.

    An index outside 0…V−1 gives NaN. The gradient is added up by atomics: repeated, it may differ by rounding.
    """
    check_dtypes("codebook_lookup", codebook=codebook)
    return codebook_lookup_op(indices, codebook, l2_norm)
