"""Drawing tokens by inverse CDF, with top-k and top-p, and the corruption of a prefix. One row of logits a program.

| kernel                | bytes moved a row (x: those of a logit) | operations                                         |
|-----------------------|-----------------------------------------|----------------------------------------------------|
| group_sample          | x·V read, 12·G written                  | per logit 1 exponential and about 6 others         |
| filtered_group_sample | x·V read, 12·G written                  | as many, and 3 to 4 per logit and bit of a search: |
|                       |                                         | 16 bits for bf16, 19 for fp16, 32 for fp32         |
| noisy_prefix          | 16·(T − 1)                              | 100 per token (Philox)                             |

group_sample is bound by memory: at 9216 rows × V 16384 × bf16 on an H100, 302 MB or 0.10 ms at 3.0 TB/s; the
exponentials take 0.04 ms beside it. filtered_group_sample runs once a token of generation on few rows, one or two a
multiprocessor: its searches depend step by step on a reduction over the row, and latency and comparisons bound it.

The row is cut into chunks of CHUNK adjacent logits. Their sums are kept, and a draw looks first for its chunk, then
among the chunk's logits, read again from the cache. A tile is as many chunks as fit into registers: one holds the row
up to V = BLOCK_V, longer ones are read again, tile by tile, by every pass over the row.

No step needs a sort: a filter's threshold is found bit by bit from an integer that increases with the logit. Logits
are compared before they are divided by the temperature, which does not change their order.
"""

import triton
import triton.language as tl

from .philox import GROUP_SAMPLE, NOISY_PREFIX, random_words, uniform24

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_logits(row_ptr, index, V):
    return tl.load(row_ptr + index, mask=index < V, other=float("-inf"))


@triton.jit
def chunk_starts(tile, TILE_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Indices in the row at which one tile's chunks start, `[TILE_CHUNKS, 1]`."""
    return ((tile * TILE_CHUNKS + tl.arange(0, TILE_CHUNKS)) * CHUNK)[:, None]


@triton.jit
def tile_of(row_ptr, only, tile, V, TILES: tl.constexpr, TILE_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Logits of one tile, `[TILE_CHUNKS, CHUNK]`; from registers where `only` it is the whole row."""
    x = only
    if TILES > 1:
        index = chunk_starts(tile, TILE_CHUNKS, CHUNK) + tl.arange(0, CHUNK)[None, :]
        x = load_logits(row_ptr, index, V)
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
def count_from(row_ptr, only, lowest, V, TILES: tl.constexpr, TILE_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """How many logits of the row are at least `lowest`."""
    count = 0.0
    for tile in range(TILES):
        x = tile_of(row_ptr, only, tile, V, TILES, TILE_CHUNKS, CHUNK)
        count += tl.sum(tl.where(x.to(tl.float32) >= lowest, 1.0, 0.0))
    return count


@triton.jit
def weight_from(
    row_ptr, only, lowest, peak, scale, V, TILES: tl.constexpr, TILE_CHUNKS: tl.constexpr, CHUNK: tl.constexpr
):
    """Sum of the weights of the row's logits that are at least `lowest`.

    It never grows with `lowest`, in floating point either: the terms are added in the same order for any `lowest`.
    """
    total = 0.0
    for tile in range(TILES):
        x = tile_of(row_ptr, only, tile, V, TILES, TILE_CHUNKS, CHUNK)
        total += tl.sum(tl.where(x.to(tl.float32) >= lowest, weights(x, peak, scale), 0.0))
    return total


@triton.jit
def tied_chunks(row_ptr, only, value, V, TILES: tl.constexpr, TILE_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """How many logits in each chunk of the row are equal to `value`."""
    counts = tl.zeros([TILES, TILE_CHUNKS], tl.float32)
    for tile in range(TILES):
        x = tile_of(row_ptr, only, tile, V, TILES, TILE_CHUNKS, CHUNK)
        tied = tl.sum(tl.where(x.to(tl.float32) == value, 1.0, 0.0), axis=1)
        counts = tl.where(tl.arange(0, TILES)[:, None] == tile, tied[None, :], counts)
    return tl.reshape(counts, [TILES * TILE_CHUNKS])


@triton.jit
def index_of_tie(row_ptr, counts, number, value, V, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Index in the row of the number-th (from 1) logit equal to `value`, given how many there are in each chunk."""
    chunks = tl.arange(0, CHUNKS)
    reached = tl.cumsum(counts, axis=0)
    chunk = tl.min(tl.where(reached >= number, chunks, CHUNKS - 1), axis=0)
    within = number - tl.sum(tl.where(chunks == chunk, reached - counts, 0.0), axis=0)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    tied = load_logits(row_ptr, index, V).to(tl.float32) == value
    return tl.min(tl.where(tied & (tl.cumsum(tied.to(tl.float32), axis=0) == within), index, V), axis=0)


@triton.jit
def filter_bounds(
    row_ptr,
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
            count = count_from(row_ptr, only, candidate, V, TILES, TILE_CHUNKS, CHUNK)
            key = tl.where(count >= top_k, key | (one << bit), key)
            bit = tl.where(count == top_k, -1, bit - 1)
        lowest = key_value(key, UNUSED_BITS)
    if TOP_P:
        # The largest number that more than the asked share of the weight reaches: the logit of the last token kept.
        wanted = top_p * weight_from(row_ptr, only, lowest, peak, scale, V, TILES, TILE_CHUNKS, CHUNK)
        above = 0.0  # weight of the next larger number, and of all beyond it
        key = one - 1
        bit = 31
        while bit >= UNUSED_BITS:
            candidate = tl.maximum(key_value(key | (one << bit), UNUSED_BITS), lowest)
            weight = weight_from(row_ptr, only, candidate, peak, scale, V, TILES, TILE_CHUNKS, CHUNK)
            above = tl.where(weight > wanted, above, weight)
            key = tl.where(weight > wanted, key | (one << bit), key)
            bit -= 1
        if key > 0:  # else the share is all of the weight, or NaN
            lowest = key_value(key, UNUSED_BITS)
            counts = tied_chunks(row_ptr, only, lowest, V, TILES, TILE_CHUNKS, CHUNK)
            # As few of the ties as make the weight exceed the share, at least one.
            number = tl.maximum(tl.floor((wanted - above) / weights(lowest, peak, scale)) + 1.0, 1.0)
            if number < tl.sum(counts, axis=0):
                last = index_of_tie(row_ptr, counts, number, lowest, V, TILES * TILE_CHUNKS, CHUNK)
    return lowest, last


@triton.jit
def filtered(weight, x, start, lowest, last, CHUNK: tl.constexpr):
    """The weights `[chunks, CHUNK]` of what is kept, 0 for the rest. NaN stays NaN, so that no filter hides it.

    start: indices at which the chunks start, `[chunks, 1]`. Whole indices of a tile would take too many registers.
    """
    x = x.to(tl.float32)
    early = tl.arange(0, CHUNK)[None, :] <= last - start
    return tl.where((x > lowest) | ((x == lowest) & early) | (weight != weight), weight, 0.0)


@triton.jit
def draw_row(
    logits_ptr,
    seed_ptr,
    sample_ids_ptr,
    first_position_ptr,
    first_rollouts_ptr,
    tokens_ptr,
    logprobs_ptr,
    first_row,
    T,
    V,
    G,
    stride_row,
    inverse_temperature,
    top_k,
    top_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TILES: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Tokens and log-probs of the G draws of one row of logits: row `first_row` + program of the B·T rows."""
    FILTER: tl.constexpr = TOP_K or TOP_P
    CHUNKS: tl.constexpr = TILES * TILE_CHUNKS
    row_ptr = logits_ptr + tl.program_id(0).to(tl.int64) * stride_row
    scale = inverse_temperature * LOG2E

    only = load_logits(row_ptr, chunk_starts(0, TILE_CHUNKS, CHUNK) + tl.arange(0, CHUNK)[None, :], V)
    peak = tl.max(only.to(tl.float32))
    for tile in range(1, TILES):
        x = tile_of(row_ptr, only, tile, V, TILES, TILE_CHUNKS, CHUNK)
        peak = tl.maximum(peak, tl.max(x.to(tl.float32)))
    if FILTER:
        lowest, last = filter_bounds(
            row_ptr, only, peak, scale, V, top_k, top_p, TOP_K, TOP_P, UNUSED_BITS, TILES, TILE_CHUNKS, CHUNK
        )

    # From here on sums are float64, of few terms. In fp32 the position of a boundary of the CDF would be uncertain by
    # 2⁻²⁴ of the total, as much as 1/1000 of a token of a vocabulary of 16384.
    sums = tl.zeros([TILES, TILE_CHUNKS], tl.float64)
    for tile in range(TILES):
        x = tile_of(row_ptr, only, tile, V, TILES, TILE_CHUNKS, CHUNK)
        weight = weights(x, peak, scale)
        if FILTER:
            weight = filtered(weight, x, chunk_starts(tile, TILE_CHUNKS, CHUNK), lowest, last, CHUNK)
        here = tl.arange(0, TILES)[:, None] == tile
        sums = tl.where(here, tl.sum(weight, axis=1).to(tl.float64)[None, :], sums)
    sums = tl.reshape(sums, [CHUNKS])
    reached = tl.cumsum(sums, axis=0)
    possible_chunk = sums > 0
    # Rounding may differ from element to element of a cumulative sum: the total that a draw is a share of is taken
    # where a draw can end, so that each finds a chunk with a probability.
    total = tl.max(tl.where(possible_chunk, reached, 0.0), axis=0)
    log_total = tl.log(tl.sum(sums, axis=0).to(tl.float32))  # NaN if any weight is

    row = first_row + tl.program_id(0)
    image, t = row // T, row % T
    sample_id = image.to(tl.int64)
    if sample_ids_ptr is not None:
        sample_id = tl.load(sample_ids_ptr + image)
    seed = tl.load(seed_ptr)
    position = tl.load(first_position_ptr) + t
    chunks = tl.arange(0, CHUNKS)[None, :]
    for first_draw in range(0, G, BLOCK_G):
        draw = first_draw + tl.arange(0, BLOCK_G)
        rollout = draw
        if first_rollouts_ptr is not None:
            rollout = draw + tl.load(first_rollouts_ptr + image)
        word, _, _, _ = random_words(seed, position, rollout, sample_id, GROUP_SAMPLE)
        target = uniform24(word).to(tl.float64) * total
        beyond = possible_chunk[None, :] & (reached[None, :] > target[:, None])
        chunk = tl.min(tl.where(beyond, chunks, CHUNKS), axis=1)
        chunk = tl.where(chunk < CHUNKS, chunk, 0)  # only a row of NaN has none
        before = tl.sum(tl.where(chunks == chunk[:, None], (reached - sums)[None, :], 0.0), axis=1)

        index = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        x = load_logits(row_ptr, index, V)
        weight = weights(x, peak, scale)
        if FILTER:
            weight = filtered(weight, x, chunk[:, None] * CHUNK, lowest, last, CHUNK)
        possible = weight > 0
        beyond = possible & (tl.cumsum(weight, axis=1) > (target - before).to(tl.float32)[:, None])
        token = tl.min(tl.where(beyond, index, V), axis=1)
        # The chunk's sum here may be rounded below the one above: then the draw is the chunk's last possible token.
        token = tl.where(token < V, token, tl.max(tl.where(possible, index, 0), axis=1))
        drawn = tl.sum(tl.where(index == token[:, None], x.to(tl.float32), 0.0), axis=1)

        out = (image.to(tl.int64) * G + draw) * T + t
        tl.store(tokens_ptr + out, token.to(tl.int64), mask=draw < G)
        tl.store(logprobs_ptr + out, (drawn - peak) * inverse_temperature - log_total, mask=draw < G)


@triton.jit(do_not_specialize=["first_row", "T", "G"])
def group_sample(
    logits_ptr,
    seed_ptr,
    sample_ids_ptr,
    first_position_ptr,
    first_rollouts_ptr,
    tokens_ptr,
    logprobs_ptr,
    first_row,
    T,
    V,
    G,
    stride_row,
    inverse_temperature,
    BLOCK_G: tl.constexpr,
    TILES: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Draws from the softmax of the whole row; see `draw_row`. tokens and logprobs are contiguous `[B, G, T]`."""
    draw_row(
        logits_ptr,
        seed_ptr,
        sample_ids_ptr,
        first_position_ptr,
        first_rollouts_ptr,
        tokens_ptr,
        logprobs_ptr,
        first_row,
        T,
        V,
        G,
        stride_row,
        inverse_temperature,
        0,
        1.0,
        False,
        False,
        0,
        BLOCK_G,
        TILES,
        TILE_CHUNKS,
        CHUNK,
    )


@triton.jit(do_not_specialize=["first_row", "T", "G", "top_k"])
def filtered_group_sample(
    logits_ptr,
    seed_ptr,
    sample_ids_ptr,
    first_position_ptr,
    first_rollouts_ptr,
    tokens_ptr,
    logprobs_ptr,
    first_row,
    T,
    V,
    G,
    stride_row,
    inverse_temperature,
    top_k,
    top_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TILES: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Draws from the softmax of what top-k (1 ≤ k ≤ V) and then top-p keep of the row; see `draw_row`."""
    draw_row(
        logits_ptr,
        seed_ptr,
        sample_ids_ptr,
        first_position_ptr,
        first_rollouts_ptr,
        tokens_ptr,
        logprobs_ptr,
        first_row,
        T,
        V,
        G,
        stride_row,
        inverse_temperature,
        top_k,
        top_p,
        TOP_K,
        TOP_P,
        UNUSED_BITS,
        BLOCK_G,
        TILES,
        TILE_CHUNKS,
        CHUNK,
    )


@triton.jit(do_not_specialize=["threshold", "vocab_size", "length", "size"])
def noisy_prefix(
    tokens_ptr,
    seed_ptr,
    sample_ids_ptr,
    prefix_ptr,
    threshold,
    vocab_size,
    length,
    size,
    stride_b,
    stride_t,
    BLOCK: tl.constexpr,
):
    """prefix, contiguous `[B, length]`: each token replaced where the 24-bit uniform is below `threshold`."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    image, t = offset // length, offset % length
    sample_id = image
    if sample_ids_ptr is not None:
        sample_id = tl.load(sample_ids_ptr + image, mask=inside, other=0)
    choice, replacement, _, _ = random_words(tl.load(seed_ptr), t, 0, sample_id, NOISY_PREFIX)
    token = tl.load(tokens_ptr + image * stride_b + t * stride_t, mask=inside, other=0)
    random_token = tl.umulhi(replacement, tl.cast(vocab_size, tl.uint32)).to(tl.int64)
    tl.store(prefix_ptr + offset, tl.where((choice >> 8) < threshold, random_token, token), mask=inside)
