"""Drawing tokens: groups of rollouts from teacher-forced logits, and the corruption of their context."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .philox import GROUP_SAMPLE, MASK, NOISY_PREFIX, default_sample_ids, philox, seed_key, uniform24
from .precision import accumulation_dtype, head_logits


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Top-k, then top-p, as LlamaGen samples: removed logits become −inf.

    Top-k removes what is strictly below the k-th largest logit, so ties stay. Top-p keeps the shortest prefix of the
    descending order whose probability exceeds top_p, at least one token; among equal logits the lower index goes first.
    """
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        exceeded = ordered.softmax(-1).cumsum(-1) > top_p
        first_kept = torch.zeros_like(exceeded[..., :1])
        removed = torch.cat([first_kept, exceeded[..., :-1]], dim=-1)
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -math.inf)
    return logits


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
    """G independent draws per position by inverse CDF in vocabulary order; see `vapi_fast.ops.group_sample`."""
    batch, length, vocab_size = logits.shape
    logits = filter_logits(logits.to(accumulation_dtype(logits)) / temperature, top_k, top_p)
    logprobs = logits.log_softmax(-1)
    cdf = logprobs.exp().cumsum(-1)

    rollouts = torch.arange(group_size, device=logits.device)
    if first_rollouts is not None:
        rollouts = (rollouts + first_rollouts[:, None, None]) & MASK
    counter = (
        torch.arange(length, device=logits.device)[:, None] + first_position,
        rollouts,
        default_sample_ids(batch, sample_ids, logits.device)[:, None, None],
        GROUP_SAMPLE,
    )
    uniform = uniform24(philox(counter, seed_key(seed))[0], cdf.dtype)  # [B, T, G]
    # First index whose cumulative probability exceeds u·total. It has a probability, as the sum grows there, and it
    # exists, as u ≤ 1 − 2⁻²⁴ leaves u·total below the total after rounding too; only NaN needs the clamp.
    tokens = torch.searchsorted(cdf, uniform * cdf[..., -1:], right=True).clamp(max=vocab_size - 1)
    return tokens.transpose(1, 2).contiguous(), logprobs.gather(-1, tokens).transpose(1, 2).contiguous()


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
    """`group_sample` of the logits hidden·weightᵀ; see `vapi_fast.ops.linear_group_sample`."""
    return group_sample(
        head_logits(hidden, weight),
        group_size,
        seed=seed,
        sample_ids=sample_ids,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        first_position=first_position,
        first_rollouts=first_rollouts,
    )


def noisy_prefix(
    tokens: Tensor, noise_prob: float, vocab_size: int, *, seed: int | Tensor, sample_ids: Tensor | None = None
) -> Tensor:
    """Input tokens, each replaced with probability ξ by a random one; see `vapi_fast.ops.noisy_prefix`."""
    inputs = tokens[:, :-1]
    positions = torch.arange(inputs.shape[1], device=tokens.device)
    ids = default_sample_ids(tokens.shape[0], sample_ids, tokens.device)[:, None]
    choice, replacement, _, _ = philox((positions, 0, ids, NOISY_PREFIX), seed_key(seed))
    # u < ξ for u = k·2⁻²⁴ is k < ⌈ξ·2²⁴⌉: an integer comparison is the same on every backend.
    replaced = (choice >> 8) < math.ceil(noise_prob * 2**24)
    # (x·V) >> 32 maps a word to 0…V−1. The product of two words may pass 2⁶³; the mask drops the sign extension.
    return torch.where(replaced, ((replacement * vocab_size) >> 32) & MASK, inputs)
