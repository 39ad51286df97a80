"""The straight-through draw: hard Gumbel-softmax code embedding, whose gradient is that of the soft one.

n rows of V logits of l bytes; codes of C numbers. Instructions are counted in the machine code for sm_90, C = 8.

| kernel                    | bytes moved         | instructions                             |
|---------------------------|---------------------|------------------------------------------|
| straight_through_forward  | l·n·V               | 42 a logit, 47 in fp32                   |
| straight_through_finish   | 4·(C + 3)·n a split | 42 a logit of BLOCK_V a row              |
| straight_through_backward | 2·l·n·V             | 48 a logit, 53 in fp32; ∇codebook 6 more |

forward and backward are bound by the rate at which instructions issue, 28.7 T/s on an H100 (132 multiprocessors, 128
lanes, 1.7 GHz), not by memory; predicted with 85 % of it, n = 9216, V = 16384:
- straight_through_forward 0.22 ms of instructions, 0.26 ms in all; the bf16 logits' 302 MB alone take 0.10 ms.
- straight_through_backward 0.25 ms of instructions, 0.30 ms in all; logits and gradient alone 0.20 ms.
Per logit, the noise takes 29: Philox 15, a uniform number 4, two logarithms 10. Neither noise nor softmax is ever
stored; the backward draws the same noise again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .codebook import code_splits, load_rows
from .launch import MIN_DOT, check_dtypes, contiguous, launch, next_power_of_2, rows_of, seed_tensor
from .philox import GUMBEL, open_uniform23, random_words

FORWARD = {"BLOCK_ROWS": 64, "BLOCK_V": 64, "num_warps": 4, "num_stages": 1}
CODES_PER_SPLIT = 1024
FINISH = {"BLOCK_ROWS": 16, "num_warps": 4, "num_stages": 1}
BACKWARD = {"BLOCK_ROWS": 64, "BLOCK_V": 64, "num_warps": 4, "num_stages": 1}
ROWS_PER_SPLIT = 1024
MAX_OPERAND = 4096  # numbers of a matrix product's operand that has the channels: more do not fit, with C large
LOG2E = math.log2(math.e)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
def straight_through_forward_kernel(
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
def straight_through_finish_kernel(
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
def straight_through_backward_kernel(
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


def dot_blocks(settings: dict[str, int], channels: int) -> dict[str, int]:
    """A kernel's blocks of rows and of codes, smaller ones where channels are many, and all channels."""
    block_c = next_power_of_2(max(channels, MIN_DOT))
    most = max(MAX_OPERAND // block_c, MIN_DOT)
    return settings | {"BLOCK_C": block_c} | {name: min(settings[name], most) for name in ("BLOCK_ROWS", "BLOCK_V")}


@torch.library.custom_op("vapi_fast::straight_through_lookup", mutates_args=())
def straight_through_lookup_op(
    logits: Tensor, codebook: Tensor, seed: Tensor, sample_ids: Tensor | None, tau: float, soft: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z_q and indices; with `soft` also the softmax's statistics `[2, B·T]` and mean entries `[B·T, C]`."""
    (_, length, vocab_size), channels = logits.shape, codebook.shape[1]
    rows = rows_of(logits)
    results = empty_results(logits, codebook, soft)

    block = dot_blocks(FORWARD, channels + 1)  # one more for the sum of the weights
    splits, codes_per_split = code_splits(CODES_PER_SPLIT, block["BLOCK_V"], vocab_size)
    maximum, total = logits.new_empty(2, splits, len(rows), dtype=torch.float32)
    first = logits.new_empty(splits, len(rows), dtype=torch.int32)
    sums = logits.new_empty(splits, len(rows), channels if soft else 0, dtype=torch.float32)
    inputs = (rows, codebook.contiguous(), seed, contiguous(sample_ids))
    parts = (maximum, first, total, sums)
    sizes = (len(rows), length, vocab_size, channels, rows.stride(0), LOG2E / tau, splits)
    grid = (triton.cdiv(len(rows), block["BLOCK_ROWS"]) * splits,)
    launch(straight_through_forward_kernel, grid, *inputs, *parts, *sizes, codes_per_split, SOFT=soft, **block)
    grid = (triton.cdiv(len(rows), FINISH["BLOCK_ROWS"]),)
    constants = {"SOFT": soft, "BLOCK_V": block["BLOCK_V"], "BLOCK_C": block["BLOCK_C"], **FINISH}
    launch(straight_through_finish_kernel, grid, *inputs, *parts, *results, *sizes, **constants)
    return results


def empty_results(logits: Tensor, codebook: Tensor, soft: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z_q, indices, statistics and mean entries, before they are known."""
    (batch, length, _), channels = logits.shape, codebook.shape[1]
    rows = batch * length if soft else 0
    z_q, indices = codebook.new_empty(batch, length, channels), logits.new_empty(batch, length, dtype=torch.int64)
    statistics, mean_entry = (logits.new_empty(shape, dtype=torch.float32) for shape in ((2, rows), (rows, channels)))
    return z_q, indices, statistics, mean_entry


@torch.library.custom_op("vapi_fast::straight_through_lookup_backward", mutates_args=())
def straight_through_lookup_backward_op(
    dz: Tensor,
    logits: Tensor,
    codebook: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    statistics: Tensor,
    mean_entry: Tensor,
    tau: float,
    needs_logits: bool,
    needs_codebook: bool,
) -> list[Tensor]:
    """Gradients to logits and to the codebook, as far as needed, in this order."""
    (vocab_size, channels), rows = codebook.shape, rows_of(logits)
    dz = dz.reshape(-1, channels).contiguous()
    block = dot_blocks(BACKWARD, channels)
    rows_per_split = triton.cdiv(ROWS_PER_SPLIT, block["BLOCK_ROWS"]) * block["BLOCK_ROWS"]
    splits, v_blocks = triton.cdiv(len(rows), rows_per_split), triton.cdiv(vocab_size, block["BLOCK_V"])
    dlogits = logits.new_empty(logits.shape) if needs_logits else None
    shares = logits.new_empty(splits, vocab_size, channels, dtype=torch.float32) if needs_codebook else None
    mean = (mean_entry * dz).sum(-1) / tau
    tensors = (dz, rows, codebook.contiguous(), seed, contiguous(sample_ids), statistics, mean, dlogits, shares)
    sizes = (len(rows), logits.shape[1], vocab_size, channels, rows.stride(0), LOG2E / tau, 1 / tau)
    constants = {"NEEDS_LOGITS": needs_logits, "NEEDS_CODEBOOK": needs_codebook, **block}
    grid = (splits * v_blocks,)
    launch(straight_through_backward_kernel, grid, *tensors, *sizes, v_blocks, rows_per_split, **constants)
    dcodebook = shares.sum(0).to(codebook.dtype) if needs_codebook else None
    return [gradient for gradient in (dlogits, dcodebook) if gradient is not None]


@straight_through_lookup_op.register_fake
def _(logits: Tensor, codebook: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_results(logits, codebook, soft=options[-1])


@straight_through_lookup_backward_op.register_fake
def _(dz: Tensor, logits: Tensor, codebook: Tensor, *options: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, needed in zip((logits, codebook), options[-2:], strict=True) if needed]


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.tau, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dz: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    gradients = iter(straight_through_lookup_backward_op(dz, *ctx.saved_tensors, ctx.tau, *needs))
    return *(next(gradients) if need else None for need in needs), None, None, None, None


straight_through_lookup_op.register_autograd(_gradient, setup_context=_context)


def straight_through_lookup(
    logits: Tensor, codebook: Tensor, *, tau: float, seed: int | Tensor, sample_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw and softmax from one read of the logits; see `vapi_fast.ops.straight_through_lookup`."""
    check_dtypes("straight_through_lookup", logits=logits, codebook=codebook)
    soft = torch.is_grad_enabled() and (logits.requires_grad or codebook.requires_grad)
    seed = seed_tensor(seed, logits.device)
    return straight_through_lookup_op(logits, codebook, seed, sample_ids, float(tau), soft)[:2]
