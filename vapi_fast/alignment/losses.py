"""What is minimised: VA-π's objective and its two baselines, one micro-batch each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vapi_fast import ops
from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.control import advantages_of
from vapi_fast.alignment.figures import figure_of
from vapi_fast.alignment.image_text import levels
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.reward_terms import LEVELS
from vapi_fast.alignment.rollout import Rollout, condition_of, roll_out, teacher_forced_hidden, token_logprobs
from vapi_fast.alignment.user_reward import user_rewards
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.models import Condition
from vapi_fast.runtime.clock import Clock


class Losses(NamedTuple):
    """A micro-batch's terms: `loss` (0-d, with its graph), the others 0-d or a row an image; and its rollouts."""

    terms: dict[str, Tensor]
    rollouts: Tensor  # int64 [b,G,T]; empty where nothing was sampled


class Judged(NamedTuple):
    """What rollouts are worth: the terms of their rewards, and the advantages that they are learned from, `[b,G]` or,
    with `credit_window`, `[b,G,T]`."""

    rewards: dict[str, Tensor]
    advantages: Tensor

    def take(self, rows: slice) -> Judged:
        return Judged({name: values[rows] for name, values in self.rewards.items()}, self.advantages[rows])


def vapi_loss(
    models: Models,
    config: AlignConfig,
    batch: ImageBatch,
    tokens: Tensor,
    seed: int,
    clock: Clock,
    judged: Judged | None = None,
) -> Losses:
    """The paper's objective, one micro-batch: one forward, G rollouts, group advantages, clipped policy loss, prior.

    With `config.second_forward` as it was released: the rollouts are of a forward without dropout, the loss of another
    one with it, so that ρ ≠ 1. Released it is one for each rollout; here it is one an image, its masks shared by the
    group, which leaves the expected gradient as it is.

    judged: of the same rollouts, where that is known already.
    """
    rollout = draw_rollouts(models, config, tokens, condition_of(batch), clock, seed=seed, sample_ids=batch.sample_ids)
    if judged is None:
        judged = judge(models, config, rollout.tokens, batch, seed, clock)
    terms = policy_terms(models, config, batch, tokens, rollout, judged.advantages, seed, clock)
    return Losses(terms | judged.rewards, rollout.tokens)


def judge(models: Models, config: AlignConfig, rollouts: Tensor, batch: ImageBatch, seed: int, clock: Clock) -> Judged:
    rewards = rewards_of(models, config, rollouts, batch, clock)
    with clock("loss"):
        return Judged(rewards, advantages_of(rewards, config, seed, batch.sample_ids))


def policy_terms(
    models: Models,
    config: AlignConfig,
    batch: ImageBatch,
    tokens: Tensor,
    rollout: Rollout,
    advantages: Tensor,
    seed: int | Tensor,
    clock: Clock,
) -> dict[str, Tensor]:
    """What is learned from rollouts and their advantages: of `Losses.terms` those that are no rewards."""
    draw = {"seed": seed, "sample_ids": batch.sample_ids}
    condition, hidden = condition_of(batch), rollout.hidden
    if config.second_forward:
        with clock("forward"):
            hidden = teacher_forced_hidden(models.generator, tokens, condition, config, training=True, **draw)
    with clock("loss"):
        loss = ops.policy_loss(
            **models.generator.head.operands(hidden),
            tokens=rollout.tokens,
            advantages=advantages,
            targets=tokens,
            old_logprobs=rollout.logprobs if config.off_policy else None,
            base_logprobs=base_logprobs(models, config, tokens, condition, rollout.tokens, **draw),
            clip_range=config.clip_range,
            prior_weight=config.prior_weight if config.prior == "ce" else 0.0,
            kl_weight=config.prior_weight if config.prior == "kl" else 0.0,
            temperature=config.temperature,
        )
    return {"loss": loss.loss, "cross_entropy": loss.prior, "kl": loss.kl, "clipped": loss.clip_fraction}


def draw_rollouts(
    models: Models, config: AlignConfig, tokens: Tensor, condition: Condition, clock: Clock, **draw: Any
) -> Rollout:
    """The rollouts of a micro-batch; with a gradient where the loss comes of their own forward."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not config.second_forward):
        training = not config.second_forward
        return roll_out(models.generator, tokens, condition, config, training=training, clock=clock, **draw)


@torch.no_grad()
def judge_step(
    models: Models, config: AlignConfig, batch: ImageBatch, tokens: Tensor, seed: int, clock: Clock
) -> Judged:
    """Judge all rollouts of this rank before any is learned from: a forward more, for advantages of the whole step."""
    parts = []
    for start in range(0, len(tokens), config.micro_batch):
        rows = slice(start, start + config.micro_batch)
        part = batch.take(rows)
        draw = {"seed": seed, "sample_ids": part.sample_ids}
        rollout = draw_rollouts(models, config, tokens[rows], condition_of(part), clock, **draw)
        parts.append(rewards_of(models, config, rollout.tokens, part, clock))
    rewards = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    with clock("loss"):
        return Judged(rewards, advantages_of(rewards, config, seed, batch.sample_ids))


def rewards_of(
    models: Models, config: AlignConfig, rollouts: Tensor, batch: ImageBatch, clock: Clock
) -> dict[str, Tensor]:
    """Terms `[b,G]` of rollouts `[b,G,T]`: `reward`, and where the pixels' is in it, `mse` and `lpips`.

    Where `--reward` names some, `reward` is their weighted sum, and each is there under its `figure_of`. With
    `config.credit_window` they are the tokens', `[b,G,T]`, whose means are the rollouts'.
    """
    if config.reward is None:
        reward = models.reward.score(rollouts, batch.images, clock, by_token=config.credit_window is not None)
        return {"reward": reward.total, "mse": reward.mse, "lpips": reward.lpips}
    with clock("decode"):
        decoded = models.codec.decode(rollouts.flatten(0, 1))
    found, cosines = {}, {}
    for term in config.reward_terms:
        if term.name == "pixel":
            reward = models.reward.compared(decoded.unflatten(0, rollouts.shape[:2]), batch.images, clock)
            found |= {figure_of(term): reward.total, "mse": reward.mse, "lpips": reward.lpips}
            continue
        with clock("reward"), torch.no_grad():
            images, labels = decoded.float().clamp(-1, 1), batch.labels.repeat_interleave(rollouts.shape[1])
            if term.is_users:
                read = models.caption_of
                values = user_rewards(term.name, images, labels if read is None else [*map(read, labels.tolist())])
            elif term.network is None:
                logits = models.reward.lpips.features_and_logits(images)[1]
                values = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
            else:
                if term.network not in cosines:
                    cosines[term.network] = models.networks[term.network](images, labels)
                values = cosines[term.network]
                values = levels(values) if term.name.endswith(LEVELS) else values
        found[figure_of(term)] = values.view(rollouts.shape[:2])
    return {"reward": sum(term.weight * found[figure_of(term)] for term in config.reward_terms)} | found


def base_logprobs(
    models: Models, config: AlignConfig, tokens: Tensor, condition: Condition, rollouts: Tensor, **draw: Any
) -> Tensor | None:
    """Log-probs `[b,G,T]` of the rollouts under the frozen base model, if the prior needs them."""
    if config.prior != "kl":
        return None
    with torch.no_grad():
        hidden = teacher_forced_hidden(models.base, tokens, condition, config, **draw)
    return token_logprobs(hidden, models.base.head, rollouts, config.temperature)


def ste_loss(models: Models, config: AlignConfig, batch: ImageBatch, tokens: Tensor, seed: int, clock: Clock) -> Losses:
    """Straight-through baseline: MSE + LPIPS of a hard Gumbel-softmax draw, back-propagated to the logits."""
    draw = {"seed": seed, "sample_ids": batch.sample_ids}
    with clock("forward"):
        hidden = teacher_forced_hidden(models.generator, tokens, condition_of(batch), config, training=True, **draw)
    with clock("sample"):
        logits = models.generator.head.logits(hidden).float() / config.temperature
        codebook = models.tokenizer.codebook(normalised=config.codes == "normalised")
        embeddings, _ = ops.straight_through_lookup(logits, codebook, tau=1.0, **draw)
    with clock("decode"):
        decoded = models.tokenizer.decode_embeddings(embeddings)
    with clock("lpips"):
        reward = models.reward.compare(decoded, batch.images)
    with clock("loss"):
        prior = ops.linear_cross_entropy(**models.generator.head.operands(hidden), targets=tokens)
        loss = -reward.total.mean() + config.prior_weight * prior
    distances = {"reward": reward.total, "mse": reward.mse, "lpips": reward.lpips}
    return Losses({"loss": loss, **distances, "cross_entropy": prior}, tokens[:, :0])


def ntp_loss(
    models: Models, config: AlignConfig, batch: ImageBatch, tokens: Tensor, seed: int | Tensor, clock: Clock
) -> Losses:
    """Next-token prediction alone, on the same images: what the prior does without a reward."""
    draw = {"seed": seed, "sample_ids": batch.sample_ids}
    with clock("forward"):
        hidden = teacher_forced_hidden(models.generator, tokens, condition_of(batch), config, training=True, **draw)
    with clock("loss"):
        loss = ops.linear_cross_entropy(**models.generator.head.operands(hidden), targets=tokens)
    return Losses({"loss": loss, "cross_entropy": loss}, tokens[:, :0])


LOSSES: dict[str, Callable[..., Losses]] = {"vapi": vapi_loss, "ste": ste_loss, "ntp": ntp_loss}
