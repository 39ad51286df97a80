"""Perceptual and squared distances of image groups to their reference image. All bound by memory bandwidth.

| kernel         | bytes moved (a: bytes of the group's maps, b: of the reference's)    | FLOPs per element of a |
|----------------|----------------------------------------------------------------------|------------------------|
| lpips_forward  | a + b                                                                | 7                      |
| lpips_backward | 2a + b for the gradient to a, a + 2b for that to b, 2a + 2b for both | 15                     |
| mse_forward    | a + b                                                                | 3                      |
| mse_backward   | as lpips_backward                                                    | 3                      |
| row_sums       | partial sums only: 4 bytes for each 4096 elements of a               | -                      |

A program holds one tile of the reference in registers while the group's tiles go by, the next STAGES − 1 of them under
way. Sums over pixels leave it as one partial sum a rollout. `row_sums` adds these up, in an order that depends on
neither the batch nor the group: a rollout's distance is the same bit for bit in any company.

The LPIPS kernels are launched without contraction to fused multiply-adds: a·s − b̂ with b̂ rounded and a·s not would
give equal features a distance.
"""

import triton
import triton.language as tl

CHANNEL_EPS = tl.constexpr(1e-10)


@triton.jit
def inverse_norm(x):
    """1 / (|x| + eps) and |x| of each row of fp32 `[pixels, channels]`."""
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    return 1.0 / (norm + CHANNEL_EPS), norm


@triton.jit(do_not_specialize=["P", "G", "blocks", "splits", "rollouts", "stride_partial"])
def lpips_forward(
    a_ptr,
    b_ptr,
    weight_ptr,
    partial_ptr,
    P,
    C,
    G,
    blocks,
    splits,
    rollouts,
    stride_partial,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Σ_pixels Σ_c w (â − b̂)² / P over one block of pixels, for `rollouts` of an image's G: fp32 `[B·G, blocks]`.

    a is `[B·G, P, C]`, b `[B, P, C]`; rows of the result are `stride_partial` apart.
    """
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    image, block = (tile // blocks).to(tl.int64), tile % blocks
    first, last = split * rollouts, tl.minimum(G, (split + 1) * rollouts)
    channel = tl.arange(0, BLOCK_C)
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < P)[:, None] & (channel < C)[None, :]
    # Offset within a map: the block's as one 64-bit number, the elements' in 32 bits.
    start = block.to(tl.int64) * BLOCK_P * C
    within = tl.arange(0, BLOCK_P)[:, None] * C + channel[None, :]
    b = tl.load(b_ptr + image * P * C + start + within, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    scale_b, _ = inverse_norm(b)
    unit_b = b * scale_b[:, None]
    for rollout in tl.range(first, last, num_stages=STAGES):
        row = image * G + rollout
        a = tl.load(a_ptr + row * P * C + start + within, mask=inside, other=0.0).to(tl.float32)
        scale_a, _ = inverse_norm(a)
        difference = a * scale_a[:, None] - unit_b
        total = tl.sum(tl.sum(weight * difference * difference, axis=1), axis=0) / P
        tl.store(partial_ptr + row * stride_partial + block, total)


@triton.jit(do_not_specialize=["P", "G", "blocks", "splits", "rollouts"])
def lpips_backward(
    ddistance_ptr,
    a_ptr,
    b_ptr,
    weight_ptr,
    da_ptr,
    db_ptr,
    dweight_ptr,
    P,
    C,
    G,
    blocks,
    splits,
    rollouts,
    NEEDS_A: tl.constexpr,
    NEEDS_B: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """da, db and each program's share of dweight (fp32 `[programs, C]`), those needed; db needs splits = 1.

    With n = |a|, s = 1 / (n + eps), â = s·a and h = ∂d/∂â: da = s (h − â (â·h) / (s·n)), and s·h where n = 0.
    """
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    image, block = (tile // blocks).to(tl.int64), tile % blocks
    first, last = split * rollouts, tl.minimum(G, (split + 1) * rollouts)
    channel = tl.arange(0, BLOCK_C)
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < P)[:, None] & (channel < C)[None, :]
    # Offset within a map: the block's as one 64-bit number, the elements' in 32 bits.
    start = block.to(tl.int64) * BLOCK_P * C
    within = tl.arange(0, BLOCK_P)[:, None] * C + channel[None, :]
    b = tl.load(b_ptr + image * P * C + start + within, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    scale_b, norm_b = inverse_norm(b)
    unit_b = b * scale_b[:, None]
    if NEEDS_B:
        dunit_b = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if NEEDS_WEIGHT:
        squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for rollout in tl.range(first, last, num_stages=STAGES):
        row = image * G + rollout
        a = tl.load(a_ptr + row * P * C + start + within, mask=inside, other=0.0).to(tl.float32)
        ddistance = tl.load(ddistance_ptr + row) / P
        scale_a, norm_a = inverse_norm(a)
        unit_a = a * scale_a[:, None]
        difference = unit_a - unit_b
        if NEEDS_WEIGHT:
            squares += ddistance * difference * difference
        if NEEDS_A or NEEDS_B:
            dunit = (2.0 * ddistance) * weight * difference
        if NEEDS_A:
            da = through_norm(dunit, unit_a, scale_a, norm_a)
            out = da_ptr + row * P * C + start + within
            tl.store(out, da.to(da_ptr.dtype.element_ty), mask=inside)
        if NEEDS_B:
            dunit_b -= dunit
    if NEEDS_B:
        db = through_norm(dunit_b, unit_b, scale_b, norm_b)
        tl.store(db_ptr + image * P * C + start + within, db.to(db_ptr.dtype.element_ty), mask=inside)
    if NEEDS_WEIGHT:
        out = dweight_ptr + tl.program_id(0).to(tl.int64) * C + channel
        tl.store(out, tl.sum(squares, axis=0), mask=channel < C)


@triton.jit
def through_norm(dunit, unit, scale, norm):
    """Gradient to x from that to x̂ = x · scale, scale = 1 / (norm + eps)."""
    along = tl.sum(unit * dunit, axis=1) / tl.where(norm == 0.0, 1.0, scale * norm)
    return scale[:, None] * (dunit - unit * along[:, None])


@triton.jit(do_not_specialize=["G", "blocks", "splits", "rollouts"])
def mse_forward(a_ptr, b_ptr, partial_ptr, N, G, blocks, splits, rollouts, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Σ (a − b)² / N over one block of an image's N elements, for `rollouts` of its G: fp32 `[B·G, blocks]`."""
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    image, block = (tile // blocks).to(tl.int64), tile % blocks
    first, last = split * rollouts, tl.minimum(G, (split + 1) * rollouts)
    start, within = block.to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    inside = within < N - start
    b = tl.load(b_ptr + image * N + start + within, mask=inside, other=0.0).to(tl.float32)
    for rollout in tl.range(first, last, num_stages=STAGES):
        row = image * G + rollout
        a = tl.load(a_ptr + row * N + start + within, mask=inside, other=0.0).to(tl.float32)
        difference = a - b
        total = tl.sum(difference * difference, axis=0) / N
        tl.store(partial_ptr + row * blocks + block, total)


@triton.jit(do_not_specialize=["G", "blocks", "splits", "rollouts"])
def mse_backward(
    derror_ptr,
    a_ptr,
    b_ptr,
    da_ptr,
    db_ptr,
    N,
    G,
    blocks,
    splits,
    rollouts,
    NEEDS_A: tl.constexpr,
    NEEDS_B: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """da = 2 (a − b) · derror / N, and db = −Σ_g da, those needed; db needs splits = 1."""
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    image, block = (tile // blocks).to(tl.int64), tile % blocks
    first, last = split * rollouts, tl.minimum(G, (split + 1) * rollouts)
    start, within = block.to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    inside = within < N - start
    b = tl.load(b_ptr + image * N + start + within, mask=inside, other=0.0).to(tl.float32)
    if NEEDS_B:
        db = tl.zeros([BLOCK], tl.float32)
    for rollout in tl.range(first, last, num_stages=STAGES):
        row = image * G + rollout
        a = tl.load(a_ptr + row * N + start + within, mask=inside, other=0.0).to(tl.float32)
        da = (2.0 * tl.load(derror_ptr + row) / N) * (a - b)
        if NEEDS_A:
            tl.store(da_ptr + row * N + start + within, da.to(da_ptr.dtype.element_ty), mask=inside)
        if NEEDS_B:
            db -= da
    if NEEDS_B:
        tl.store(db_ptr + image * N + start + within, db.to(db_ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_sums(x_ptr, sum_ptr, columns, BLOCK: tl.constexpr):
    """Sum of each row of fp32 `[rows, columns]`."""
    row = x_ptr + tl.program_id(0).to(tl.int64) * columns
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.load(row + column, mask=column < columns, other=0.0)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total, axis=0))
