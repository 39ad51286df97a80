"""Drawing tokens by inverse CDF, with top-k and top-p. One row of logits a program; no gradients.

| kernel                    | bytes moved a row (x: those of a logit) | operations                                     |
|---------------------------|-----------------------------------------|------------------------------------------------|
| group_sample              | x·V read, 12·G written                  | per logit 1 exponential and about 6 others     |
| group_sample with filters | x·V read, 12·G written                  | as many, and 3 to 4 per logit and bit of a     |
|                           |                                         | search: 16 bits for bf16, 19 fp16, 32 fp32     |

Without filters it is bound by memory: at 9216 rows × V 16384 × bf16 on an H100, 302 MB or 0.10 ms at 3.0 TB/s; the
exponentials take 0.04 ms beside it. With filters it runs once a token of generation on few rows, one or two a
multiprocessor: its searches depend step by step on a reduction over the row, and latency and comparisons bound it.

The sums of the row's chunks (see `filters`) are kept, and a draw looks first for its chunk, then among the chunk's
logits, read again from the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .filters import chunk_starts, filter_bounds, filtered, tile_of, weights
from .head import head_operands, load_logits, logits_chunks
from .launch import check_dtypes, contiguous, launch, next_power_of_2, rows_of, seed_tensor
from .philox import GROUP_SAMPLE, random_words, uniform24

SETTINGS = {"BLOCK_V": 16384, "CHUNK": 128, "num_stages": 1}
ELEMENTS_PER_WARP, FILTERED_PER_WARP = 2048, 1024
MAX_BLOCK_G = 8  # rollouts that a program draws at a time
# Low bits that the fp32 form of a number of the dtype never uses.
UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["first_row", "T", "G", "top_k"])
def group_sample_kernel(
    logits_ptr,
    bias_ptr,
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
    """Tokens and log-probs of the G draws of one row of logits: row `first_row` + program of the B·T rows.

    From the softmax of what top-k (1 ≤ k ≤ V, if TOP_K) and then top-p (if TOP_P) keep of the row. tokens and logprobs
    are contiguous `[B, G, T]`.
    """
    FILTER: tl.constexpr = TOP_K or TOP_P
    CHUNKS: tl.constexpr = TILES * TILE_CHUNKS
    row_ptr = logits_ptr + tl.program_id(0).to(tl.int64) * stride_row
    scale = inverse_temperature * LOG2E

    only = load_logits(row_ptr, bias_ptr, chunk_starts(0, TILE_CHUNKS, CHUNK) + tl.arange(0, CHUNK)[None, :], V)
    peak = tl.max(only.to(tl.float32))
    for tile in range(1, TILES):
        x = tile_of(row_ptr, bias_ptr, only, tile, V, TILES, TILE_CHUNKS, CHUNK)
        peak = tl.maximum(peak, tl.max(x.to(tl.float32)))
    if FILTER:
        lowest, last = filter_bounds(
            row_ptr, bias_ptr, only, peak, scale, V, top_k, top_p, TOP_K, TOP_P, UNUSED_BITS, TILES, TILE_CHUNKS, CHUNK
        )

    # From here on sums are float64, of few terms. In fp32 the position of a boundary of the CDF would be uncertain by
    # 2⁻²⁴ of the total, as much as 1/1000 of a token of a vocabulary of 16384.
    sums = tl.zeros([TILES, TILE_CHUNKS], tl.float64)
    for tile in range(TILES):
        x = tile_of(row_ptr, bias_ptr, only, tile, V, TILES, TILE_CHUNKS, CHUNK)
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
        x = load_logits(row_ptr, bias_ptr, index, V)
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


class Draw(NamedTuple):
    """What the random numbers of a draw depend on, beside the position and rollout that are drawn."""

    seed: Tensor
    sample_ids: Tensor | None
    first_position: Tensor
    first_rollouts: Tensor | None


class Filters(NamedTuple):
    temperature: float
    top_k: int
    top_p: float


def draw_rows(
    logits: Tensor,
    bias: Tensor | None,
    first_row: int,
    tokens: Tensor,
    logprobs: Tensor,
    draw: Draw,
    filters: Filters,
) -> None:
    """Draw rows first_row… of B·T from their logits `[rows, V]`, into contiguous tokens and logprobs `[B, G, T]`."""
    rows, vocab_size = logits.shape
    _, group_size, length = tokens.shape
    temperature, top_k, top_p = filters
    by_k, by_p = 0 < top_k < vocab_size, top_p < 1
    chunk = SETTINGS["CHUNK"]
    chunks = next_power_of_2(triton.cdiv(vocab_size, chunk))
    tile_chunks = min(chunks, SETTINGS["BLOCK_V"] // chunk)
    per_warp = FILTERED_PER_WARP if by_k or by_p else ELEMENTS_PER_WARP
    sizes = (first_row, length, vocab_size, group_size, logits.stride(0))
    launch(
        group_sample_kernel,
        (rows,),
        logits,
        bias,
        *draw,
        tokens,
        logprobs,
        *sizes,
        1 / temperature,
        min(top_k, vocab_size) if by_k else 0,
        top_p if by_p else 1.0,
        TOP_K=by_k,
        TOP_P=by_p,
        UNUSED_BITS=UNUSED_BITS[logits.dtype] if by_k or by_p else 0,
        BLOCK_G=min(next_power_of_2(group_size), MAX_BLOCK_G),
        TILES=chunks // tile_chunks,
        TILE_CHUNKS=tile_chunks,
        CHUNK=chunk,
        num_warps=max(tile_chunks * chunk // per_warp, 1),
        num_stages=SETTINGS["num_stages"],
    )


def empty_draws(states: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs `[B, G, T]` for logits or hidden states `[B, T, ·]`."""
    shape = (states.shape[0], group_size, states.shape[1])
    return states.new_empty(shape, dtype=torch.int64), states.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("vapi_fast::group_sample", mutates_args=())
def group_sample_op(
    logits: Tensor,
    group_size: int,
    seed: Tensor,
    sample_ids: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    first_position: Tensor,
    first_rollouts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tokens, logprobs = empty_draws(logits, group_size)
    draw = Draw(seed, contiguous(sample_ids), first_position, contiguous(first_rollouts))
    draw_rows(rows_of(logits), None, 0, tokens, logprobs, draw, Filters(temperature, top_k, top_p))
    return tokens, logprobs


@torch.library.custom_op("vapi_fast::linear_group_sample", mutates_args=())
def linear_group_sample_op(
    hidden: Tensor,
    weight: Tensor,
    group_size: int,
    seed: Tensor,
    sample_ids: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    first_position: Tensor,
    first_rollouts: Tensor | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tokens, logprobs = empty_draws(hidden, group_size)
    draw = Draw(seed, contiguous(sample_ids), first_position, contiguous(first_rollouts))
    bias = contiguous(bias)
    for first_row, logits in logits_chunks(*head_operands(hidden, weight)):
        draw_rows(logits, bias, first_row, tokens, logprobs, draw, Filters(temperature, top_k, top_p))
    return tokens, logprobs


group_sample_op.register_fake(lambda logits, group_size, *_: empty_draws(logits, group_size))
linear_group_sample_op.register_fake(lambda hidden, weight, group_size, *_: empty_draws(hidden, group_size))


@torch.no_grad()
def group_sample(
    logits: Tensor,
    group_size: int,
    *,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    first_position: int | Tensor = 0,
    first_rollouts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """G draws a row from one read of the logits; see `vapi_fast.ops.group_sample`."""
    check_dtypes("group_sample", logits=logits)
    seed, first_position = (seed_tensor(value, logits.device) for value in (seed, first_position))
    filters = Filters(temperature, top_k, top_p)
    return group_sample_op(logits, group_size, seed, sample_ids, *filters, first_position, first_rollouts)


@torch.no_grad()
def linear_group_sample(
    hidden: Tensor,
    weight: Tensor,
    group_size: int,
    *,
    bias: Tensor | None = None,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    first_position: int | Tensor = 0,
    first_rollouts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`group_sample` of a chunk of rows at a time, in fp32; see `vapi_fast.ops.linear_group_sample`."""
    check_dtypes("linear_group_sample", hidden=hidden, weight=weight, bias=bias)
    seed, first_position = (seed_tensor(value, hidden.device) for value in (seed, first_position))
    filters = Filters(temperature, top_k, top_p)
    return linear_group_sample_op(
        hidden, weight, group_size, seed, sample_ids, *filters, first_position, first_rollouts, bias
    )
