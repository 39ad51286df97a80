"""Drawing groups of tokens from teacher-forced logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .filters import filter_logits
from .head import head_logits
from .philox import GROUP_SAMPLE, MASK, default_sample_ids, philox, seed_key, uniform24
from .precision import accumulation_dtype


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
    bias: Tensor | None = None,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    first_position: int | Tensor = 0,
    first_rollouts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`group_sample` of the logits hidden·weightᵀ + bias; see `vapi_fast.ops.linear_group_sample`."""
    draw = {"seed": seed, "sample_ids": sample_ids, "first_position": first_position, "first_rollouts": first_rollouts}
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return group_sample(head_logits(hidden, weight, bias), group_size, **draw, **filters)
