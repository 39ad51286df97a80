"""Rotary positions, SwiGLU, and a cache: filling it, and attention of one query a sequence. Memory bandwidth binds all.

| kernel                   | bytes moved (x: bytes of one input)                        | FLOPs per element           |
|--------------------------|------------------------------------------------------------|-----------------------------|
| rotary_2d                | 2x (x read, y written); the table comes from the cache     | 3                           |
| swiglu_forward           | 3x (gate and up read, y written)                           | 4, 1 exponential, 1 inverse |
| swiglu_backward          | 5x (dy, gate and up read, dgate and dup written)           | 9, 1 exponential, 1 inverse |
| append_to_cache          | 2x (qkv read; q, and a slot of keys and values, written)   | 2                           |
| decode_attention         | keys and values 0…position, each once                      | 2 a key's, 3 a value's      |
| decode_attention_prefix  | prefix keys and values, each once for BLOCK_Q of a group   | 2·BLOCK_Q in matrix units   |
| decode_attention_combine | partial results only: 4·pieces·(head_dim + 2) a query      | 3                           |

Predicted for an H100 with 3.0 TB/s, bf16: rotary_2d of 16 × 576 × 24 heads of 64, 57 MB, 0.019 ms; swiglu of 16 × 576
rows of 4096, 226 MB, 0.075 ms, its backward 377 MB, 0.126 ms; decode_attention of 256 × 24 heads of 64 at the last of
577 positions, 908 MB, 0.30 ms. Issuing the instructions (17, 25 and 35 an element, 13 a key's and its value's) takes
less than half of that.

append_to_cache of 256 sequences moves 4.7 MB, 0.002 ms: what counts is that generation launches it once a layer and
token, instead of two rotations and two copies. A cache of float8 halves what decode_attention moves.

decode_attention takes scores in base 2. What a program knows of a query is a *piece*: the largest score, the sum of
2^(score − largest) and the values weighted by the same, all fp32. Pieces are merged in an order that never changes.
"""

import triton
import triton.language as tl


@triton.jit
def even_and_odd(x):
    """The elements at even and at odd columns of `[rows, columns]`."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit(do_not_specialize=["rows", "T", "column_blocks"])
def rotary_2d(
    x_ptr,
    table_ptr,
    y_ptr,
    rows,
    T,
    columns,
    column_blocks,
    stride_b,
    stride_t,
    INVERSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Each pair of a row (image and position) of heads · head_dim columns turned by its position's angle, or back.

    Heads are adjacent in x; y is contiguous; the table is `[T, head_dim / 2, 2]`, a cosine and a sine for each pair.
    """
    row = (tl.program_id(0) // column_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    image, t = (row // T).to(tl.int64), row % T
    from_row = image * stride_b + t.to(tl.int64) * stride_t
    x = tl.load(x_ptr + from_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    turn = tl.load(table_ptr + t[:, None] * HEAD_DIM + (column % HEAD_DIM)[None, :], mask=inside, other=0.0)
    even, odd = even_and_odd(x)
    cosine, sine = even_and_odd(turn.to(tl.float32))
    if INVERSE:
        sine = -sine
    y = tl.reshape(tl.join(even * cosine - odd * sine, odd * cosine + even * sine), [BLOCK_ROWS, BLOCK_COLUMNS])
    to_row = row.to(tl.int64) * columns
    tl.store(y_ptr + to_row[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def turned(x, turn):
    """The pairs of a vector times its cosines and sines, which lie as the pairs do."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))
    cosine, sine = tl.split(tl.reshape(turn, [x.shape[0] // 2, 2]))
    return tl.reshape(tl.join(even * cosine - odd * sine, odd * cosine + even * sine), [x.shape[0]])


@triton.jit
def to_dtype(x, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """x in a dtype; LARGEST: what larger numbers become, where the dtype has no infinity. NaN stays NaN."""
    if LARGEST is not None:
        x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    return x.to(dtype)


@triton.jit(do_not_specialize=["S", "column_blocks"])
def append_to_cache(
    qkv_ptr,
    table_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    q_ptr,
    S,
    columns,
    column_blocks,
    stride_kn,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vn,
    stride_vh,
    stride_vs,
    stride_vd,
    HEAD_DIM: tl.constexpr,
    LARGEST_K: tl.constexpr,
    LARGEST_V: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Of one sequence's heads · head_dim columns, a block: q rotated, k rotated and v into slot `position`.

    qkv is contiguous `[N, 3, columns]`, q `[N, columns]`, the table `[S, head_dim / 2, 2]`.
    """
    row = (tl.program_id(0) // column_blocks).to(tl.int64)
    column = (tl.program_id(0) % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    slot = tl.minimum(tl.maximum(tl.load(position_ptr), 0), S - 1)  # never outside of the cache
    inside = column < columns
    from_row = qkv_ptr + row * 3 * columns + column
    head, within = column // HEAD_DIM, column % HEAD_DIM
    turn = tl.load(table_ptr + slot * HEAD_DIM + within, mask=inside, other=0.0).to(tl.float32)
    q = turned(tl.load(from_row, mask=inside, other=0.0).to(tl.float32), turn)
    k = turned(tl.load(from_row + columns, mask=inside, other=0.0).to(tl.float32), turn)
    v = tl.load(from_row + 2 * columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(q_ptr + row * columns + column, q.to(q_ptr.dtype.element_ty), mask=inside)
    to_k = k_ptr + row * stride_kn + slot * stride_ks + head * stride_kh + within * stride_kd
    to_v = v_ptr + row * stride_vn + slot * stride_vs + head * stride_vh + within * stride_vd
    tl.store(to_k, to_dtype(k, k_ptr.dtype.element_ty, LARGEST_K), mask=inside)
    tl.store(to_v, to_dtype(v, v_ptr.dtype.element_ty, LARGEST_V), mask=inside)


@triton.jit
def tile_of_rows(rows, D, column_blocks, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Rows `[BLOCK_ROWS, 1]`, columns `[1, BLOCK_COLUMNS]` and mask of this program's tile of `[rows, D]`."""
    row = (tl.program_id(0) // column_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    return row.to(tl.int64)[:, None], column[None, :], inside


@triton.jit(do_not_specialize=["rows", "column_blocks"])
def swiglu_forward(
    gate_ptr,
    up_ptr,
    y_ptr,
    rows,
    D,
    column_blocks,
    stride_gate,
    stride_up,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """y = gate · sigmoid(gate) · up for a tile; y is contiguous `[rows, D]`."""
    row, column, inside = tile_of_rows(rows, D, column_blocks, BLOCK_ROWS, BLOCK_COLUMNS)
    gate = tl.load(gate_ptr + row * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * D + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "column_blocks"])
def swiglu_backward(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    rows,
    D,
    column_blocks,
    stride_dy,
    stride_gate,
    stride_up,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dgate and dup, contiguous `[rows, D]`, for a tile."""
    row, column, inside = tile_of_rows(rows, D, column_blocks, BLOCK_ROWS, BLOCK_COLUMNS)
    dy = tl.load(dy_ptr + row * stride_dy + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate = dy * up * share * (1 + gate * (1 - share))
    dup = dy * gate * share
    tl.store(dgate_ptr + row * D + column, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * D + column, dup.to(dup_ptr.dtype.element_ty), mask=inside)


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


@triton.jit(do_not_specialize=["N", "heads", "S", "splits", "prefix_pieces", "stride_n", "stride_h", "stride_s"])
def decode_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    out_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    N,
    heads,
    S,
    splits,
    prefix_pieces,
    stride_n,
    stride_h,
    stride_s,
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
    that the compiler knows how the rows are aligned. scale includes log2 e.

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
    base = (query // heads).to(tl.int64) * stride_n * UNIT + (query % heads).to(tl.int64) * stride_h * UNIT
    maximum = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    weighted = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in tl.range(first, last, BLOCK_S, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_S)
        inside = (slot < last)[:, None] & (column < HEAD_DIM)[None, :]
        offset = base + slot.to(tl.int64)[:, None] * stride_s * UNIT + column[None, :]
        k = tl.load(k_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        score = tl.where(slot < last, tl.sum(k * q[None, :], axis=1) * scale, float("-inf"))
        largest = tl.maximum(maximum, score)
        fade, weight = tl.exp2(maximum - finite(largest)), tl.exp2(score - finite(largest))
        total = total * fade + weight
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
        tl.store(out, (weighted / total).to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)
    else:
        row = (prefix_pieces + split).to(tl.int64) * N * heads + query
        tl.store(maximum_ptr + row, largest)
        tl.store(total_ptr + row, total)
        tl.store(weighted_ptr + row * HEAD_DIM + column, weighted, mask=column < HEAD_DIM)


@triton.jit(
    do_not_specialize=["heads", "L", "group_size", "query_blocks", "splits", "stride_n", "stride_h", "stride_l"]
)
def decode_attention_prefix(
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
def decode_attention_combine(
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
    tl.store(out, (weighted / total).to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)
