"""Top-k and top-p over a row of logits, for the kernels that draw from it.

The row is cut into chunks of CHUNK adjacent logits. A tile is as many chunks as fit into registers: one holds the row
up to V = BLOCK_V, longer ones are read again, tile by tile, by every pass over the row.

No step needs a sort: a filter's threshold is found bit by bit from an integer that increases with the logit. Logits
are compared before they are divided by the temperature, which does not change their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .head import load_logits


@triton.jit
def chunk_starts(tile, TILE_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Indices in the row at which one tile's chunks start, `[TILE_CHUNKS, 1]`."""
    return ((tile * TILE_CHUNKS + tl.arange(0, TILE_CHUNKS)) * CHUNK)[:, None]


@triton.jit
def tile_of(row_ptr, bias_ptr, only, tile, V, TILES: tl.constexpr, TILE_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Logits of one tile, `[TILE_CHUNKS, CHUNK]`; from registers where `only` it is the whole row."""
    x = only
    if TILES > 1:
        index = chunk_starts(tile, TILE_CHUNKS, CHUNK) + tl.arange(0, CHUNK)[None, :]
        x = load_logits(row_ptr, bias_ptr, index, V)
    return x


@triton.jit
def weights(x, peak, scale):
    """Probabilities up to a factor: 1 for the largest logit. NaN if the largest is infinite, or x is NaN."""
    return tl.exp2((x.to(tl.float32) - peak) * scale)


@triton.jit
def key_value(key, UNUSED_BITS: tl.constexpr):
    """The number of a key, a uint32 that increases with the number. Keys of NaN give the infinity beside them.

    UNUSED_BITS: low bits that are 0 in every logit, as an fp32 number, because of their own dtype.
    """
    key = tl.minimum(tl.maximum(key, 0x007FFFFF), 0xFF800000)
    negative = (key | ((1 << UNUSED_BITS) - 1)) ^ 0xFFFFFFFF
    return tl.where(key < 0x80000000, negative, key ^ 0x80000000).to(tl.float32, bitcast=True)


@triton.jit
def count_from(row_ptr, bias_ptr, only, lowest, V, TILES: tl.constexpr, TILE_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """How many logits of the row are at least `lowest`."""
    count = 0.0
    for tile in range(TILES):
        x = tile_of(row_ptr, bias_ptr, only, tile, V, TILES, TILE_CHUNKS, CHUNK)
        count += tl.sum(tl.where(x.to(tl.float32) >= lowest, 1.0, 0.0))
    return count


@triton.jit
def weight_from(
    row_ptr, bias_ptr, only, lowest, peak, scale, V, TILES: tl.constexpr, TILE_CHUNKS: tl.constexpr, CHUNK: tl.constexpr
):
    """Sum of the weights of the row's logits that are at least `lowest`.

    It never grows with `lowest`, in floating point either: the terms are added in the same order for any `lowest`.
    """
    total = 0.0
    for tile in range(TILES):
        x = tile_of(row_ptr, bias_ptr, only, tile, V, TILES, TILE_CHUNKS, CHUNK)
        total += tl.sum(tl.where(x.to(tl.float32) >= lowest, weights(x, peak, scale), 0.0))
    return total


@triton.jit
def tied_chunks(row_ptr, bias_ptr, only, value, V, TILES: tl.constexpr, TILE_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """How many logits in each chunk of the row are equal to `value`."""
    counts = tl.zeros([TILES, TILE_CHUNKS], tl.float32)
    for tile in range(TILES):
        x = tile_of(row_ptr, bias_ptr, only, tile, V, TILES, TILE_CHUNKS, CHUNK)
        tied = tl.sum(tl.where(x.to(tl.float32) == value, 1.0, 0.0), axis=1)
        counts = tl.where(tl.arange(0, TILES)[:, None] == tile, tied[None, :], counts)
    return tl.reshape(counts, [TILES * TILE_CHUNKS])


@triton.jit
def index_of_tie(row_ptr, bias_ptr, counts, number, value, V, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Index in the row of the number-th (from 1) logit equal to `value`, given how many there are in each chunk."""
    chunks = tl.arange(0, CHUNKS)
    reached = tl.cumsum(counts, axis=0)
    chunk = tl.min(tl.where(reached >= number, chunks, CHUNKS - 1), axis=0)
    within = number - tl.sum(tl.where(chunks == chunk, reached - counts, 0.0), axis=0)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    tied = load_logits(row_ptr, bias_ptr, index, V).to(tl.float32) == value
    return tl.min(tl.where(tied & (tl.cumsum(tied.to(tl.float32), axis=0) == within), index, V), axis=0)


@triton.jit
def filter_bounds(
    row_ptr,
    bias_ptr,
    only,
    peak,
    scale,
    V,
    top_k,
    top_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What a filter keeps: the logits above `lowest`, and of those equal to it the indices up to `last`."""
    lowest = tl.full([], float("-inf"), tl.float32)
    last = tl.cast(V, tl.int32)
    one = tl.full([], 1, tl.uint32)
    if TOP_K:
        # The largest number that at least k logits reach. Where exactly k do, the ones to keep are found.
        key = one - 1
        bit = 31
        while bit >= UNUSED_BITS:
            candidate = key_value(key | (one << bit), UNUSED_BITS)
            count = count_from(row_ptr, bias_ptr, only, candidate, V, TILES, TILE_CHUNKS, CHUNK)
            key = tl.where(count >= top_k, key | (one << bit), key)
            bit = tl.where(count == top_k, -1, bit - 1)
        lowest = key_value(key, UNUSED_BITS)
    if TOP_P:
        # The largest number that more than the asked share of the weight reaches: the logit of the last token kept.
        wanted = top_p * weight_from(row_ptr, bias_ptr, only, lowest, peak, scale, V, TILES, TILE_CHUNKS, CHUNK)
        above = 0.0  # weight of the next larger number, and of all beyond it
        key = one - 1
        bit = 31
        while bit >= UNUSED_BITS:
            candidate = tl.maximum(key_value(key | (one << bit), UNUSED_BITS), lowest)
            weight = weight_from(row_ptr, bias_ptr, only, candidate, peak, scale, V, TILES, TILE_CHUNKS, CHUNK)
            above = tl.where(weight > wanted, above, weight)
            key = tl.where(weight > wanted, key | (one << bit), key)
            bit -= 1
        if key > 0:  # else the share is all of the weight, or NaN
            lowest = key_value(key, UNUSED_BITS)
            counts = tied_chunks(row_ptr, bias_ptr, only, lowest, V, TILES, TILE_CHUNKS, CHUNK)
            # As few of the ties as make the weight exceed the share, at least one.
            number = tl.maximum(tl.floor((wanted - above) / weights(lowest, peak, scale)) + 1.0, 1.0)
            if number < tl.sum(counts, axis=0):
                last = index_of_tie(row_ptr, bias_ptr, counts, number, lowest, V, TILES * TILE_CHUNKS, CHUNK)
    return lowest, last


@triton.jit
def filtered(weight, x, start, lowest, last, CHUNK: tl.constexpr):
    """The weights `[chunks, CHUNK]` of what is kept, 0 for the rest. NaN stays NaN, so that no filter hides it.

    start: indices at which the chunks start, `[chunks, 1]`. Whole indices of a tile would take too many registers.
    """
    x = x.to(tl.float32)
    early = tl.arange(0, CHUNK)[None, :] <= last - start
    return tl.where((x > lowest) | ((x == lowest) & early) | (weight != weight), weight, 0.0)
