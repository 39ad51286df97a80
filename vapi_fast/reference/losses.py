"""Objectives of the alignment: the policy loss with its prior, and next-token cross-entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .head import head_logits
from .precision import accumulation_dtype


class PolicyLoss(NamedTuple):
    """Terms of the objective, all 0-d. Gradients flow through `loss` alone; the others are detached, for reporting.

    loss: policy + prior_weight · prior + kl_weight · kl, to minimise.
    policy: clipped policy-gradient term. prior: cross-entropy of the true tokens, in nats. kl: mean of exp(d) − d − 1.
    ratio: mean of ρ = π_θ / π_old. clip_fraction: share of tokens with |ρ − 1| > clip_range.
    """

    loss: Tensor
    policy: Tensor
    prior: Tensor
    kl: Tensor
    ratio: Tensor
    clip_fraction: Tensor


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    base_logprobs: Tensor | None = None,
    clip_range: float = 0.2,
    prior_weight: float = 0.1,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
) -> PolicyLoss:
    """Objective of the whole group from one pass of the head; see `vapi_fast.ops.policy_loss`."""
    logits = head_logits(hidden, weight, bias)
    group_size = tokens.shape[1]
    # One gather for the G rollouts and the true tokens, so that the backward scatters once into [B, T, V].
    chosen = logits.gather(-1, torch.cat([tokens, targets[:, None]], dim=1).transpose(1, 2))  # [B, T, G + 1]
    normaliser = logits.logsumexp(-1, keepdim=True)
    tempered = normaliser if temperature == 1 else (logits / temperature).logsumexp(-1, keepdim=True)
    new = (chosen[..., :group_size] / temperature - tempered).transpose(1, 2)  # [B, G, T]
    prior = (normaliser - chosen[..., group_size:]).mean()

    old = new.detach() if old_logprobs is None else old_logprobs.detach().to(new.dtype)
    ratio = (new - old).exp()
    advantages = advantages.detach().to(new.dtype)
    if advantages.ndim == 2:  # one for all tokens of a rollout
        advantages = advantages[..., None]
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped).mean()  # sequences are equally long
    loss = policy
    if prior_weight:
        loss = loss + prior_weight * prior
    kl = new.new_zeros(())
    if base_logprobs is not None:
        difference = base_logprobs.detach().to(new.dtype) - new
        kl = (difference.exp() - difference - 1).mean()
    if kl_weight:
        loss = loss + kl_weight * kl
    clip_fraction = ((ratio - 1).abs() > clip_range).to(new.dtype).mean()
    report = (policy, prior, kl, ratio.mean(), clip_fraction)
    return PolicyLoss(loss, *(term.detach() for term in report))


@torch.no_grad()
def group_advantages(rewards: Tensor, *, eps: float = 1e-8, clip: float = 5.0) -> Tensor:
    """Advantages of each group of rollouts; see `vapi_fast.ops.group_advantages`."""
    # In float64: rewards that are all equal give advantages of zero. In float32 their mean may be one rounding step
    # off, which a standard deviation of the same size, against eps, would turn into advantages of order one.
    centred = rewards.double() - rewards.double().mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True).div(max(rewards.shape[1] - 1, 1))
    spread = variance.mean(-1, keepdim=True).sqrt()  # over the positions, if there are any
    return (centred / (spread + eps)).clamp(-clip, clip).to(accumulation_dtype(rewards))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Mean next-token cross-entropy; see `vapi_fast.ops.linear_cross_entropy`."""
    return F.cross_entropy(head_logits(hidden, weight, bias).flatten(0, 1), targets.flatten())
