"""The vector quantizer's codebook: nearest code, entries of given codes, and the straight-through draw.

n latents, indices or rows of logits; V codes of C numbers. z, e and l: bytes of a latent's number, of a codebook
entry's and of a logit. Instructions are counted in the machine code for sm_90, C = 8.

| kernel                    | bytes moved                           | instructions                               |
|---------------------------|---------------------------------------|--------------------------------------------|
| unit_tiles                | (z + 4)·n·C, again (e + 4)·V·C        | 3 a number                                 |
| nearest_code              | 4·V·C a block of latents, from the L2 | 20 a pair of latent and code (2·C + 3 + 1) |
| nearest_entry             | 8·n a split, (2·z + e)·n·C            | 10 a number                                |
| unit_backward             | 3·z·n·C, or (4 + 2·e)·V·C             | 10 a number                                |
| codebook_gather           | 8·n + 2·e·n·C                         | 5 a number                                 |
| codebook_scatter          | 8·n + e·n·C, atomics on 4·n·C         | 3 a number                                 |
| straight_through_forward  | l·n·V                                 | 42 a logit, 47 in fp32                     |
| straight_through_finish   | 4·(C + 3)·n a split                   | 42 a logit of BLOCK_V a row                |
| straight_through_backward | 2·l·n·V                               | 48 a logit, 53 in fp32; ∇codebook 6 more   |

The three with n·V of something are bound by the rate at which instructions issue, 28.7 T/s on an H100 (132
multiprocessors, 128 lanes, 1.7 GHz), not by memory; predicted with 85 % of it, n = 9216, V = 16384:
- nearest_code 0.105 ms of instructions, 0.12 ms in all. The distances stay in registers. |e|² − 2 z·e would take half
  the instructions, but its rounding grows with |e|², not with the distance.
- straight_through_forward 0.22 ms of instructions, 0.26 ms in all; the bf16 logits' 302 MB alone take 0.10 ms.
- straight_through_backward 0.25 ms of instructions, 0.30 ms in all; logits and gradient alone 0.20 ms.
Per logit, the noise takes 29: Philox 15, a uniform number 4, two logarithms 10. Neither noise nor softmax is ever
stored; the backward draws the same noise again.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .philox import GUMBEL, open_uniform23, random_words

UNIT_EPS = tl.constexpr(1e-12)  # of torch.nn.functional.normalize
LN2 = tl.constexpr(0.6931471805599453)
# Up to so many channels a distance is written out, and the latents stay in registers, which suffice for no more.
MAX_UNROLLED = tl.constexpr(8)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
def unit_tiles(
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
def nearest_code(
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
def nearest_entry(
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
def unit_backward(dunit_ptr, x_ptr, dx_ptr, rows, C, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """dx of x̂ = x / max(|x|, eps): (dx̂ − x̂ (x̂·dx̂)) / |x|, and dx̂ / eps where |x| < eps; `[rows, C]`."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    x, offset, inside = load_rows(x_ptr, row, rows, C, BLOCK_C)
    dunit, _, _ = load_rows(dunit_ptr, row, rows, C, BLOCK_C)
    unit, divisor = unit_rows(x)
    along = tl.sum(unit * dunit, axis=1)[:, None]
    dx = (dunit - tl.where(divisor == UNIT_EPS, 0.0, unit * along)) / divisor
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def codebook_gather(
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
def codebook_scatter(dentries_ptr, indices_ptr, sums_ptr, rows, V, C, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Add the gradients `[rows, C]` of each code's entries to sums, fp32 `[V, C]`, in no certain order."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dentries, _, inside = load_rows(dentries_ptr, row, rows, C, BLOCK_C)
    index = tl.load(indices_ptr + row, mask=row < rows, other=-1)[:, None]
    target = sums_ptr + index * C + tl.arange(0, BLOCK_C)[None, :]
    tl.atomic_add(target, dentries, mask=inside & (index >= 0) & (index < V), sem="relaxed")


@triton.jit
def hardware_log2(x):
    """log₂ x by the special function unit: wrong by 2⁻²² at most between ½ and 2, by 2⁻²² of itself elsewhere.

    tl.log2, which is wrong by one unit in the last place at most, takes 28 instructions.
    """
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def log_gumbel(word):
    """log₂(−log₂ u) with u = open_uniform23(word), to 10⁻⁶, or 2⁻²² of itself where that is more.

    For u near 1, where the largest noise comes from, the hardware's logarithm is too coarse. There −log₂(1 − w) is
    w times a polynomial: the minimax one of degree 5 for w ≤ ¼, wrong by 4·10⁻⁸ of it at most.
    """
    u = open_uniform23(word)
    w = 1.0 - u
    series = 0.20762554 + w * 0.49022423
    series = 0.37192596 + w * series
    series = 0.48021064 + w * series
    series = 0.72136267 + w * series
    series = 1.44269498 + w * series
    return hardware_log2(tl.where(u > 0.75, w * series, -hardware_log2(u)))


@triton.jit
def perturbed_logits(row_ptr, first, position, sample_id, seed, V, BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Logits plus Gumbel noise, less the constant −log log 2, of BLOCK_V codes from `first`, a multiple of 4.

    row_ptr, position and sample_id `[BLOCK_ROWS, 1]`, first a number or one a row → `[BLOCK_ROWS, BLOCK_V]`, −∞
    beyond V.
    """
    # One call of the generator for four adjacent codes: its word v % 4 is code v's.
    quad = first // 4 + tl.arange(0, BLOCK_V // 4)[None, :]
    word0, word1, word2, word3 = random_words(seed, position, quad, sample_id, GUMBEL)
    words = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), [BLOCK_ROWS, BLOCK_V])
    code = first + tl.arange(0, BLOCK_V)[None, :]
    logits = tl.load(row_ptr + code, mask=code < V, other=float("-inf")).to(tl.float32)
    return logits - LN2 * log_gumbel(words)


@triton.jit
def upper_bits(x):
    """x cut off to the 11 significant bits that the matrix units take; of the rest they take the next 11."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def dot_fp32(a, b, sums, EXACT_A: tl.constexpr):
    """sums + a · b with fp32 operands, a of 11 bits unless EXACT_A.

    The same three products as input_precision "tf32x3", without its care for infinities, which costs 3 instructions
    for each number of an operand or of the result: here infinite operands make NaN.
    """
    upper_b = upper_bits(b)
    if EXACT_A:
        upper_a = upper_bits(a)
        sums = tl.dot(a - upper_a, upper_b, sums, input_precision="tf32")
        a = upper_a
    sums = tl.dot(a, b - upper_b, sums, input_precision="tf32")
    return tl.dot(a, upper_b, sums, input_precision="tf32")


@triton.jit
def row_context(logits_ptr, sample_ids_ptr, row, T, stride_row):
    """Of rows of the logits `[B·T, V]`: where they start, their position and their sample id, each `[rows, 1]`."""
    image = row // T
    sample_id = image.to(tl.int64)
    if sample_ids_ptr is not None:
        sample_id = tl.load(sample_ids_ptr + image)
    return (logits_ptr + row.to(tl.int64) * stride_row)[:, None], (row % T)[:, None], sample_id[:, None]


@triton.jit
def finite_shift(maximum):
    """What to subtract before an exponential: the maximum, or 0 for −∞, which is no NaN then."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def straight_through_forward(
    logits_ptr,
    codebook_ptr,
    seed_ptr,
    sample_ids_ptr,
    maximum_ptr,
    first_ptr,
    total_ptr,
    sums_ptr,
    rows,
    T,
    V,
    C,
    stride_row,
    scale,
    splits,
    codes_per_split,
    SOFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of one split of the codes: the largest perturbed logit x, where the block of codes with it starts, and softmax.

    maximum fp32 and first int32 `[splits, rows]`; with w = 2^((x − maximum) · scale), scale = log₂(e) / τ: total = Σ w
    `[splits, rows]` and sums = Σ w · entry `[splits, rows, C]`, fp32. Without SOFT, total is 1, or NaN if an x is.
    """
    block, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ptr, position, sample_id = row_context(logits_ptr, sample_ids_ptr, tl.minimum(row, rows - 1), T, stride_row)
    seed = tl.load(seed_ptr)
    channel = tl.arange(0, BLOCK_C)
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    first = tl.zeros([BLOCK_ROWS], tl.int32)
    if SOFT:
        sums = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    else:
        invalid = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.int1)
    for start in range(split * codes_per_split, tl.minimum(V, (split + 1) * codes_per_split), BLOCK_V):
        x = perturbed_logits(row_ptr, start, position, sample_id, seed, V, BLOCK_ROWS, BLOCK_V)
        peak = tl.max(x, axis=1)
        first = tl.where(peak > maximum, start, first)
        higher = tl.maximum(maximum, peak)
        if SOFT:
            shift = finite_shift(higher)
            weight = tl.exp2((x - shift[:, None]) * scale)
            sums *= tl.exp2((maximum - shift) * scale)[:, None]
            code = start + tl.arange(0, BLOCK_V)
            inside = (code < V)[:, None] & (channel < C)[None, :]
            entry = tl.load(codebook_ptr + code[:, None] * C + channel[None, :], mask=inside, other=0.0)
            # A 1 after each entry's last number: that column of the product is Σ w.
            entry = tl.where(channel[None, :] == C, 1.0, entry.to(tl.float32))
            # Of a 16-bit logit's weight 11 bits are enough: Σ w counts it rounded alike. Entries must be exact, as the
            # gradient is made of their differences.
            sums = dot_fp32(weight, entry, sums, logits_ptr.dtype.element_ty == tl.float32)
        else:
            invalid |= x != x
        maximum = higher
    out = tl.cast(split, tl.int64) * rows + row
    tl.store(maximum_ptr + out, maximum, mask=row < rows)
    tl.store(first_ptr + out, first, mask=row < rows)
    if SOFT:
        valid = (row < rows)[:, None]
        tl.store(sums_ptr + out[:, None] * C + channel[None, :], sums, mask=valid & (channel < C)[None, :])
        tl.store(total_ptr + out[:, None] + 0 * channel[None, :], sums, mask=valid & (channel == C)[None, :])
    else:
        total = tl.where(tl.max(invalid.to(tl.int32), axis=1) > 0, float("nan"), 1.0)
        tl.store(total_ptr + out, total, mask=row < rows)


@triton.jit
def straight_through_finish(
    logits_ptr,
    codebook_ptr,
    seed_ptr,
    sample_ids_ptr,
    maximum_ptr,
    first_ptr,
    total_ptr,
    sums_ptr,
    z_q_ptr,
    indices_ptr,
    statistics_ptr,
    soft_ptr,
    rows,
    T,
    V,
    C,
    stride_row,
    scale,
    splits,
    SOFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The code with the largest perturbed logit x, its entry, and with SOFT the softmax's mean entry and statistics.

    statistics fp32 `[2, rows]`: x's maximum and log₂ Σ w. BLOCK_V is that of straight_through_forward.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    first = tl.zeros([BLOCK_ROWS], tl.int32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    soft = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for split in range(splits):
        offset = tl.cast(split, tl.int64) * rows + row
        peak = tl.load(maximum_ptr + offset, mask=row < rows, other=0.0)
        first = tl.where(peak > maximum, tl.load(first_ptr + offset, mask=row < rows, other=0), first)
        higher = tl.maximum(maximum, peak)
        shift = finite_shift(higher)
        decay, growth = tl.exp2((maximum - shift) * scale), tl.exp2((peak - shift) * scale)
        total = total * decay + growth * tl.load(total_ptr + offset, mask=row < rows, other=1.0)
        if SOFT:
            sums = tl.load(sums_ptr + offset[:, None] * C + channel[None, :], mask=inside, other=0.0)
            soft = soft * decay[:, None] + growth[:, None] * sums
        maximum = higher
    # 0, or NaN where there is no softmax: with NaN or +∞ the total is NaN, of nothing but −∞ it is 0.
    log_total = tl.log2(total)
    valid = log_total - log_total

    some = tl.minimum(row, rows - 1)
    row_ptr, position, sample_id = row_context(logits_ptr, sample_ids_ptr, some, T, stride_row)
    seed = tl.load(seed_ptr)
    x = perturbed_logits(row_ptr, first[:, None], position, sample_id, seed, V, BLOCK_ROWS, BLOCK_V)
    index = tl.minimum(first + tl.argmax(x, axis=1, tie_break_left=True), V - 1)
    tl.store(indices_ptr + row, index.to(tl.int64), mask=row < rows)
    entry, _, _ = load_rows(codebook_ptr, index, V, C, BLOCK_C)
    offset = row.to(tl.int64)[:, None] * C + channel[None, :]
    if SOFT:
        soft = soft / total[:, None] + valid[:, None]
        entry += soft - soft
        tl.store(soft_ptr + offset, soft, mask=inside)
        tl.store(statistics_ptr + row, maximum, mask=row < rows)
        tl.store(statistics_ptr + rows + row, log_total, mask=row < rows)
    else:
        entry += valid[:, None]
    tl.store(z_q_ptr + offset, entry.to(z_q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def straight_through_backward(
    dz_ptr,
    logits_ptr,
    codebook_ptr,
    seed_ptr,
    sample_ids_ptr,
    statistics_ptr,
    mean_ptr,
    dlogits_ptr,
    dcodebook_ptr,
    rows,
    T,
    V,
    C,
    stride_row,
    scale,
    inverse_tau,
    v_blocks,
    rows_per_split,
    NEEDS_LOGITS: tl.constexpr,
    NEEDS_CODEBOOK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dlogits = y (e·dz − soft·dz) / τ for BLOCK_V codes and one split of the rows; y is the softmax.

    dz `[rows, C]`, mean = soft·dz / τ fp32 `[rows]`. dcodebook fp32 `[splits, V, C]` is this split's Σ y dz.
    """
    v_block, split = tl.program_id(0) % v_blocks, tl.program_id(0) // v_blocks
    start = v_block * BLOCK_V
    code = start + tl.arange(0, BLOCK_V)
    channel = tl.arange(0, BLOCK_C)
    inside = (code < V)[:, None] & (channel < C)[None, :]
    offset = code[:, None] * C + channel[None, :]
    entry = tl.load(codebook_ptr + offset, mask=inside, other=0.0).to(tl.float32) * inverse_tau
    seed = tl.load(seed_ptr)
    if NEEDS_CODEBOOK:
        dcodebook = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    for first_row in range(split * rows_per_split, tl.minimum(rows, (split + 1) * rows_per_split), BLOCK_ROWS):
        row = first_row + tl.arange(0, BLOCK_ROWS)
        some = tl.minimum(row, rows - 1)
        row_ptr, position, sample_id = row_context(logits_ptr, sample_ids_ptr, some, T, stride_row)
        x = perturbed_logits(row_ptr, start, position, sample_id, seed, V, BLOCK_ROWS, BLOCK_V)
        maximum, log_total = tl.load(statistics_ptr + some), tl.load(statistics_ptr + rows + some)
        y = tl.exp2((x - maximum[:, None]) * scale - log_total[:, None])
        dz, _, _ = load_rows(dz_ptr, row, rows, C, BLOCK_C)
        if NEEDS_LOGITS:
            along = dot_fp32(dz, tl.trans(entry), tl.zeros([BLOCK_ROWS, BLOCK_V], tl.float32), True)
            dlogits = y * (along - tl.load(mean_ptr + some)[:, None])
            out = dlogits_ptr + row.to(tl.int64)[:, None] * V + code[None, :]
            valid = (row < rows)[:, None] & (code < V)[None, :]
            tl.store(out, dlogits.to(dlogits_ptr.dtype.element_ty), mask=valid)
        if NEEDS_CODEBOOK:
            dcodebook = dot_fp32(tl.trans(y), dz, dcodebook, logits_ptr.dtype.element_ty == tl.float32)
    if NEEDS_CODEBOOK:
        tl.store(dcodebook_ptr + tl.cast(split, tl.int64) * V * C + offset, dcodebook, mask=inside)
