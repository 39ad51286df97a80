"""Drawing of tokens and corruption of prefixes on Triton: launches, registration with PyTorch. No gradients."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from vapi_fast.kernels import sampling as kernels

from .head import head_operands, logits_chunks
from .launch import check_dtypes, launch, next_power_of_2, seed_tensor, settings
from .normalization import rows_of

# Low bits that the fp32 form of a number of the dtype never uses.
UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
# Rollouts that a program draws at a time.
MAX_BLOCK_G = 8


def draw_rows(
    logits: Tensor,
    first_row: int,
    tokens: Tensor,
    logprobs: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    first_position: Tensor,
    first_rollouts: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    """Draw rows first_row… of B·T from their logits `[rows, V]`, into contiguous tokens and logprobs `[B, G, T]`."""
    rows, vocab_size = logits.shape
    _, group_size, length = tokens.shape
    filters = {"TOP_K": 0 < top_k < vocab_size, "TOP_P": top_p < 1}
    kernel, bounds = kernels.group_sample, ()
    if any(filters.values()):
        kernel, bounds = kernels.filtered_group_sample, (min(top_k, vocab_size), top_p)
    block = dict(settings(kernel.__name__, logits))
    chunks = next_power_of_2(triton.cdiv(vocab_size, block["CHUNK"]))
    tile_chunks = min(chunks, block.pop("BLOCK_V") // block["CHUNK"])
    block["num_warps"] = max(tile_chunks * block["CHUNK"] // block.pop("ELEMENTS_PER_WARP"), 1)
    if bounds:
        block |= filters | {"UNUSED_BITS": UNUSED_BITS[logits.dtype]}
    launch(
        kernel,
        (rows,),
        logits,
        seed,
        None if sample_ids is None else sample_ids.contiguous(),
        first_position,
        None if first_rollouts is None else first_rollouts.contiguous(),
        tokens,
        logprobs,
        first_row,
        length,
        vocab_size,
        group_size,
        logits.stride(0),
        1 / temperature,
        *bounds,
        BLOCK_G=min(next_power_of_2(group_size), MAX_BLOCK_G),
        TILES=chunks // tile_chunks,
        TILE_CHUNKS=tile_chunks,
        **block,
    )


def group_sample_forward(
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
    batch, length, _ = logits.shape
    tokens = torch.empty(batch, group_size, length, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    where = seed, sample_ids, first_position, first_rollouts
    draw_rows(rows_of(logits), 0, tokens, logprobs, *where, temperature, top_k, top_p)
    return tokens, logprobs


def linear_group_sample_forward(
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
) -> tuple[Tensor, Tensor]:
    batch, length, _ = hidden.shape
    tokens = torch.empty(batch, group_size, length, dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(tokens.shape, dtype=torch.float32, device=hidden.device)
    where = seed, sample_ids, first_position, first_rollouts
    for first_row, logits in logits_chunks(*head_operands(hidden, weight)):
        draw_rows(logits, first_row, tokens, logprobs, *where, temperature, top_k, top_p)
    return tokens, logprobs


def noisy_prefix_forward(
    tokens: Tensor, noise_prob: float, vocab_size: int, seed: Tensor, sample_ids: Tensor | None
) -> Tensor:
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    prefix = torch.empty(batch, length, dtype=torch.int64, device=tokens.device)
    block = settings("noisy_prefix", tokens)
    launch(
        kernels.noisy_prefix,
        (triton.cdiv(prefix.numel(), block["BLOCK"]),),
        tokens,
        seed,
        None if sample_ids is None else sample_ids.contiguous(),
        prefix,
        math.ceil(noise_prob * 2**24),
        vocab_size,
        length,
        prefix.numel(),
        *tokens.stride(),
        **block,
    )
    return prefix


group_sample_op = torch.library.custom_op("vapi_fast::group_sample", group_sample_forward, mutates_args=())
linear_group_sample_op = torch.library.custom_op(
    "vapi_fast::linear_group_sample", linear_group_sample_forward, mutates_args=()
)
noisy_prefix_op = torch.library.custom_op("vapi_fast::noisy_prefix", noisy_prefix_forward, mutates_args=())


@group_sample_op.register_fake
def _(
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
    shape = (logits.shape[0], group_size, logits.shape[1])
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


@linear_group_sample_op.register_fake
def _(
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
) -> tuple[Tensor, Tensor]:
    shape = (hidden.shape[0], group_size, hidden.shape[1])
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=torch.float32)


@noisy_prefix_op.register_fake
def _(tokens: Tensor, noise_prob: float, vocab_size: int, seed: Tensor, sample_ids: Tensor | None) -> Tensor:
    return tokens.new_empty(tokens.shape[0], tokens.shape[1] - 1)


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
    filters = temperature, top_k, top_p
    return group_sample_op(logits, group_size, seed, sample_ids, *filters, first_position, first_rollouts)


@torch.no_grad()
def linear_group_sample(
    hidden: Tensor,
    weight: Tensor,
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
    """`group_sample` of a chunk of rows at a time, in fp32; see `vapi_fast.ops.linear_group_sample`."""
    check_dtypes("linear_group_sample", hidden=hidden, weight=weight)
    seed, first_position = (seed_tensor(value, hidden.device) for value in (seed, first_position))
    filters = temperature, top_k, top_p
    return linear_group_sample_op(
        hidden, weight, group_size, seed, sample_ids, *filters, first_position, first_rollouts
    )


def noisy_prefix(
    tokens: Tensor, noise_prob: float, vocab_size: int, *, seed: int | Tensor, sample_ids: Tensor | None = None
) -> Tensor:
    """Corruption of a prefix in one pass; see `vapi_fast.ops.noisy_prefix`."""
    return noisy_prefix_op(tokens, noise_prob, vocab_size, seed_tensor(seed, tokens.device), sample_ids)
