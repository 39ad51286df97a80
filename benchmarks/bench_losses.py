"""Losses from the head's weight and hidden states, without logits, and a group's advantages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from operations import BOTH, Operation, test_operation, wide
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "test_operation"]


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    targets: Tensor,
    old: Tensor | None = None,
    base: Tensor | None = None,
    *,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """Loss, policy, prior, KL, ratio and clipped share, from logits in the head's own precision."""
    logits = wide(F.linear(hidden, weight))
    tempered = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    chosen = tempered.gather(-1, tokens.transpose(1, 2)).transpose(1, 2)
    ratio = (chosen - (chosen.detach() if old is None else old)).exp()
    policy = torch.maximum(-advantages[..., None] * ratio, -advantages[..., None] * ratio.clamp(0.8, 1.2)).mean()
    logprobs = tempered if temperature == 1 else logits.log_softmax(-1)
    prior = -logprobs.gather(-1, targets[..., None]).mean()
    kl = policy.new_zeros(()) if base is None else ((base - chosen).exp() - (base - chosen) - 1).mean()
    loss = policy + 0.1 * prior + (kl_weight * kl if kl_weight else 0)
    clipped = ((ratio - 1).abs() > 0.2).to(ratio.dtype)
    return loss, *(term.detach() for term in (policy, prior, kl, ratio.mean(), clipped.mean()))


def off_policy_loss(*inputs: Tensor) -> tuple[Tensor, ...]:
    return policy_loss(*inputs, kl_weight=0.1, temperature=0.9)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten())


def standardized(rewards: Tensor) -> Tensor:
    return ((rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-8)).clamp(-5, 5)


def liger_grpo(hidden: Tensor, weight: Tensor, tokens: Tensor, advantages: Tensor, targets: Tensor) -> Tensor:
    """Without the prior; every rollout brings its own copy of the hidden states."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo")
    sequences = tokens.flatten(0, 1)
    repeated = hidden.repeat_interleave(tokens.shape[1], 0)
    return loss(repeated, weight, sequences, torch.ones_like(sequences), advantages.flatten())[0]


def liger_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())


def of_head(name: str, plain: Callable[..., Any], **options: Any) -> Operation:
    return Operation(
        name,
        ("own precision", plain),
        lambda s, e: (e * s.width * (s.rows + s.vocabulary), 2 * e * s.width * (s.rows + s.vocabulary)),
        lambda s: (s.gemm, 2 * s.gemm),
        **options,
    )


OPERATIONS = [
    of_head("policy_loss", policy_loss, liger=liger_grpo, targets={BOTH: [("gemms", 1.6), ("memory", 0.15)]}),
    of_head("policy_loss off-policy", off_policy_loss, forward=False),
    of_head("linear_cross_entropy", cross_entropy, liger=liger_cross_entropy),
    Operation("group_advantages", ("mean and std", standardized), lambda s, e: (8 * s.images * s.group, 0)),
]
