"""Objectives of the alignment: the policy loss with its prior, and next-token cross-entropy."""

from __future__ import annotations

from torch import Tensor

from vapi_fast.reference import PolicyLoss

from .backends import implementation
from .checks import ArgumentChecks


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
    """VA-π's objective for G rollouts of each image from one pass of the LM head.

    loss = mean max(−A·ρ, −A·clip(ρ, 1−ε, 1+ε)) + prior_weight · CE(logits, targets) + kl_weight · mean(e^d − d − 1),
    with ρ = exp(logπ_θ(x) − logπ_old(x)) and d = logπ_base(x) − logπ_θ(x) of the sampled tokens x. The log-probs are
    those at `temperature`, unfiltered; the prior is that of the untempered logits (arXiv 2512.19680, section 3).

    Args:
        hidden: floating `[B, T, D]`, the hidden states that predict each token.
        weight: floating `[V, D]`, the LM head, V ≤ 65536.
        tokens: int64 `[B, G, T]`, the rollouts.
        advantages: floating `[B, G]`, or `[B, G, T]` a token, as `group_advantages` gives them (clipped there).
        targets: int64 `[B, T]`, the image's own tokens.
        bias: floating `[V]`, added to the logits, where the head has one.
        old_logprobs: floating `[B, G, T]` of the policy that drew; None means this one: ρ = 1 with its gradient.
        base_logprobs: floating `[B, G, T]` of the frozen base model; needed when kl_weight > 0.
        clip_range: ε ≥ 0. prior_weight: β ≥ 0. kl_weight: κ ≥ 0. temperature: > 0.

    Returns:
        PolicyLoss of 0-d tensors, fp32 (float64 for float64): `loss` carries the gradient to hidden, weight and
        bias; the other terms are detached. `prior` is reported also when its weight is 0; `kl` is 0 without
        base_logprobs.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, or without any token.
    """
    checks = ArgumentChecks("policy_loss")
    _check_head(checks, hidden, weight, bias)
    checks.integers("tokens", tokens, "B G T")
    checks.not_empty("tokens", "G")
    checks.floating("advantages", advantages, _rollout_dims(advantages))
    checks.integers("targets", targets, "B T")
    if old_logprobs is not None:
        checks.floating("old_logprobs", old_logprobs, "B G T")
    if base_logprobs is not None:
        checks.floating("base_logprobs", base_logprobs, "B G T")
    checks.not_negative("clip_range", clip_range)
    checks.not_negative("prior_weight", prior_weight)
    checks.not_negative("kl_weight", kl_weight)
    checks.positive("temperature", temperature)
    if kl_weight > 0 and base_logprobs is None:
        raise ValueError(
            f"policy_loss: base_logprobs must be floating [B, G, T] when kl_weight={kl_weight} > 0, got None"
        )
    checks.token_range("tokens", tokens, weight.shape[0])
    checks.token_range("targets", targets, weight.shape[0])
    return implementation(hidden).policy_loss(
        hidden,
        weight,
        tokens,
        advantages,
        targets,
        bias=bias,
        old_logprobs=old_logprobs,
        base_logprobs=base_logprobs,
        clip_range=clip_range,
        prior_weight=prior_weight,
        kl_weight=kl_weight,
        temperature=temperature,
    )


def _rollout_dims(values: object) -> str:
    """Of a number a rollout, or one a token of it."""
    return "B G T" if isinstance(values, Tensor) and values.ndim == 3 else "B G"


def _check_head(checks: ArgumentChecks, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.floating("hidden", hidden, "B T D")
    checks.not_empty("hidden", "B", "T", "D")
    checks.floating("weight", weight, "V D")
    checks.vocabulary("weight")
    if bias is not None:
        checks.floating("bias", bias, "V")


def group_advantages(rewards: Tensor, *, eps: float = 1e-8, clip: float = 5.0) -> Tensor:
    """Advantages within each group: (r − mean) / (std + eps), clipped to ±clip, std unbiased.

    rewards floating `[B, G]`, G ≥ 1 → `[B, G]`, fp32 (float64 for float64), without gradient; or `[B, G, T]`, each
    token's own → `[B, G, T]`: the mean is that of the group at each position, std the root of the variance's mean over
    the positions, so that where rollouts are worth nearly the same, advantages are small. A group of one, or of equal
    rewards, has advantages of zero; a NaN reward makes its whole group NaN. eps > 0, clip > 0.
    Raises TypeError or ValueError for an argument of the wrong type, shape or range.
    """
    checks = ArgumentChecks("group_advantages")
    checks.floating("rewards", rewards, _rollout_dims(rewards))
    checks.not_empty("rewards", "G")
    checks.positive("eps", eps)
    checks.positive("clip", clip)
    return implementation(rewards).group_advantages(rewards, eps=eps, clip=clip)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Mean next-token cross-entropy of the logits hidden·weightᵀ + bias, in nats.

    hidden floating `[B, T, D]`, weight floating `[V, D]`, targets int64 `[B, T]`, bias floating `[V]` or None → 0-d,
    fp32 (float64 for float64), with gradients to hidden, weight and bias. Raises TypeError or ValueError for an
    argument of the wrong type, shape, device or range, or without any token.
    """
    checks = ArgumentChecks("linear_cross_entropy")
    _check_head(checks, hidden, weight, bias)
    checks.integers("targets", targets, "B T")
    checks.token_range("targets", targets, weight.shape[0])
    return implementation(hidden).linear_cross_entropy(hidden, weight, targets, bias=bias)
