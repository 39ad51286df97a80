"""RMSNorm, and GroupNorm with SiLU over channels-last maps. All bound by memory bandwidth.

| kernel                       | bytes moved (x: bytes of the input)              | FLOPs per element |
|------------------------------|--------------------------------------------------|-------------------|
| rms_norm_forward             | 2x (x read, y written)                           | 4                 |
| rms_norm_backward            | 3x (x and dy read, dx written)                   | 10                |
| group_norm_statistics        | x read                                           | 4                 |
| group_norm_finish            | partial sums only: 8·B·SPLITS·C                  | -                 |
| group_norm_silu_apply        | 2x                                               | 8                 |
| group_norm_silu_reduce       | 2x (x and dy read)                               | 20                |
| group_norm_silu_backward     | 3x (x and dy read, dx written)                   | 25                |
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward(x_ptr, weight_ptr, y_ptr, rows, D, stride_x, eps, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """y = cast(x / sqrt(mean x² + eps)) · weight for BLOCK_ROWS rows a program; y is contiguous `[rows, D]`."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    row = row.to(tl.int64)
    x = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    normed = (wide * rstd[:, None]).to(x.dtype).to(tl.float32)
    y = normed * weight[None, :]
    tl.store(y_ptr + row[:, None] * D + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    dweight_ptr,
    rows,
    D,
    stride_x,
    eps,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """dx, and each program's share of dweight (fp32 `[programs, D]`), over every programs-th block of rows."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    for start in range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        row = row.to(tl.int64)
        x = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)[:, None]
        normed = wide * rstd
        dweight += tl.sum(dy * normed.to(x.dtype).to(tl.float32), axis=0)
        dnormed = dy * weight[None, :]
        dx = rstd * (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / D)[:, None])
        tl.store(dx_ptr + row[:, None] * D + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + program.to(tl.int64) * D + column, dweight, mask=column < D)


@triton.jit
def channel_row(pointer, index, inside):
    """One fp32 number for each channel, as a row beside pixels: `[1, BLOCK_C]`."""
    return tl.load(pointer + index, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def before_silu(dy, x, mean, rstd, weight, bias):
    """x̂, and the gradient of SiLU's input h = x̂ · weight + bias."""
    normed = (x - mean) * rstd
    h = normed * weight + bias
    gate = tl.sigmoid(h)
    return normed, dy * gate * (1 + h * (1 - gate))


@triton.jit(do_not_specialize=["P", "pixels_per_split", "SPLITS"])
def group_norm_statistics(
    x_ptr, sums_ptr, P, pixels_per_split, SPLITS, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Σ(x − k) and Σ(x − k)² of every channel over one split of the P pixels: fp32 `[B, SPLITS, 2, C]`.

    k is the channel's first pixel: near the mean, so that the variance does not vanish in the difference of sums.
    """
    image, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    channel = tl.arange(0, BLOCK_C)
    base = x_ptr + image.to(tl.int64) * P * C
    shift = tl.load(base + channel, mask=channel < C, other=0.0).to(tl.float32)
    # A sum for each place of the tile: adding up its rows at every step would need a barrier.
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    last = tl.minimum(P, (split + 1) * pixels_per_split)
    for start in range(split * pixels_per_split, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = (pixel < last)[:, None] & (channel < C)[None, :]
        x = tl.load(base + pixel[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - shift[None, :], 0.0)
        total += centred
        squares += centred * centred
    out = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C + channel
    tl.store(out, tl.sum(total, axis=0), mask=channel < C)
    tl.store(out + C, tl.sum(squares, axis=0), mask=channel < C)


@triton.jit(do_not_specialize=["P", "SPLITS"])
def group_norm_finish(
    x_ptr,
    channel_bias_ptr,
    sums_ptr,
    mean_ptr,
    rstd_ptr,
    P,
    SPLITS,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of one group of one image, fp32 `[B, groups]`, from the channels' sums.

    The sums are those of x; the mean and variance are those of x + channel_bias, which moves whole channels.
    """
    image, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    size: tl.constexpr = C // GROUPS
    within = tl.arange(0, BLOCK_G)
    channel = group * size + within
    shift = tl.load(x_ptr + image.to(tl.int64) * P * C + channel, mask=within < size, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    squares = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, SPLITS, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        inside = (split < SPLITS)[:, None] & (within < size)[None, :]
        row = sums_ptr + (image.to(tl.int64) * SPLITS + split[:, None]) * 2 * C + channel[None, :]
        total += tl.sum(tl.load(row, mask=inside, other=0.0), axis=0)
        squares += tl.sum(tl.load(row + C, mask=inside, other=0.0), axis=0)
    channel_mean = shift + total / P
    if channel_bias_ptr is not None:
        channel_mean += tl.load(channel_bias_ptr + channel, mask=within < size, other=0.0).to(tl.float32)
    mean = tl.sum(tl.where(within < size, channel_mean, 0.0), axis=0) / size
    deviation = tl.where(within < size, channel_mean - mean, 0.0)
    variance = tl.sum((squares - total * (total / P)) / P + deviation * deviation, axis=0) / size
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), tl.rsqrt(tl.maximum(variance, 0.0) + eps))


@triton.jit(do_not_specialize=["P", "blocks"])
def group_norm_silu_apply(
    x_ptr,
    channel_bias_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    P,
    blocks,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = SiLU((x + channel_bias − mean) · rstd · weight + bias) for BLOCK_P pixels of one image, all channels."""
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = tl.arange(0, BLOCK_C)
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < P)[:, None] & (channel < C)[None, :]
    group = image * GROUPS + channel // (C // GROUPS)
    inside_c = channel < C
    mean = channel_row(mean_ptr, group, inside_c)
    scale = channel_row(rstd_ptr, group, inside_c) * channel_row(weight_ptr, channel, inside_c)
    bias = channel_row(bias_ptr, channel, inside_c)
    if channel_bias_ptr is not None:
        mean -= channel_row(channel_bias_ptr, channel, inside_c)
    offset = image.to(tl.int64) * P * C + pixel[:, None] * C + channel[None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    h = (x - mean) * scale + bias
    if SILU:
        h *= tl.sigmoid(h)
    tl.store(y_ptr + offset, h.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["P", "pixels_per_split", "SPLITS"])
def group_norm_silu_reduce(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    P,
    pixels_per_split,
    SPLITS,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Σ dh and Σ dh·x̂ of every channel over one split of the pixels: fp32 `[B, SPLITS, 2, C]`; h is SiLU's input."""
    image, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    channel = tl.arange(0, BLOCK_C)
    group = image * GROUPS + channel // (C // GROUPS)
    inside_c = channel < C
    mean = channel_row(mean_ptr, group, inside_c)
    rstd = channel_row(rstd_ptr, group, inside_c)
    weight = channel_row(weight_ptr, channel, inside_c)
    bias = channel_row(bias_ptr, channel, inside_c)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    last = tl.minimum(P, (split + 1) * pixels_per_split)
    for start in range(split * pixels_per_split, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = (pixel < last)[:, None] & (channel < C)[None, :]
        offset = image.to(tl.int64) * P * C + pixel[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        normed, dh = before_silu(dy, x, mean, rstd, weight, bias)
        total += dh
        products += dh * normed
    out = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C + channel
    tl.store(out, tl.sum(total, axis=0), mask=channel < C)
    tl.store(out + C, tl.sum(products, axis=0), mask=channel < C)


@triton.jit(do_not_specialize=["P", "blocks"])
def group_norm_silu_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dmean_ptr,
    dproduct_ptr,
    dx_ptr,
    P,
    blocks,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = rstd · (dh·w − mean(dh·w) − x̂ · mean(dh·w·x̂)); the two means of a group are fp32 `[B, groups]`."""
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = tl.arange(0, BLOCK_C)
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < P)[:, None] & (channel < C)[None, :]
    group = image * GROUPS + channel // (C // GROUPS)
    inside_c = channel < C
    mean = channel_row(mean_ptr, group, inside_c)
    rstd = channel_row(rstd_ptr, group, inside_c)
    dmean = channel_row(dmean_ptr, group, inside_c)
    dproduct = channel_row(dproduct_ptr, group, inside_c)
    weight = channel_row(weight_ptr, channel, inside_c)
    bias = channel_row(bias_ptr, channel, inside_c)
    offset = image.to(tl.int64) * P * C + pixel[:, None] * C + channel[None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    normed, dh = before_silu(dy, x, mean, rstd, weight, bias)
    dx = rstd * (dh * weight - dmean - normed * dproduct)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
