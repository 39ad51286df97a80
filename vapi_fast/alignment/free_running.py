"""Free-running GRPO: rollouts sampled from the class alone, as AR-GRPO does; the baseline to VA-π's teacher forcing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vapi_fast import ops
from vapi_fast.alignment.config import AlignConfig, RolloutOptions
from vapi_fast.alignment.control import advantages_of
from vapi_fast.alignment.figures import mean_terms, metrics_of, non_finite
from vapi_fast.alignment.losses import Losses, base_logprobs, ntp_loss, rewards_of
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.rollout import condition_of, teacher_forced_hidden, weights_of_step
from vapi_fast.alignment.step import Gradients
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.generation.sequences import Generation, sample_groups
from vapi_fast.models import Condition
from vapi_fast.runtime.clock import Clock
from vapi_fast.runtime.distributed import reduce_at, whole_copy


class Sequences(NamedTuple):
    """N sampled sequences, each the context of its own training forward."""

    tokens: Tensor  # int64 [N,T]
    sample_ids: Tensor  # int64 [N], of their own: dropout's masks are drawn for each
    advantages: Tensor  # [N]
    logprobs: Tensor  # float32 [N,T], of the distribution drawn from


def accumulate_free_gradients(
    models: Models, config: AlignConfig, batch: ImageBatch, seed: int, clock: Clock
) -> Gradients:
    """In the place of `accumulate_gradients`: G sequences for each image's class, scored, and learned from.

    A sequence's reward is `config.reward`'s, or its distance from the image whose class it was drawn for. The
    cross-entropy prior is that of the images' own tokens, in a forward of their own.
    """
    with clock("encode"):
        tokens = models.codec.encode(batch.images)
    with clock("sample"):
        drawn = draw(models, config, batch, seed)
    rewards = rewards_of(models, config, drawn.tokens, batch, clock)
    image = torch.arange(len(tokens), device=tokens.device).repeat_interleave(config.group_size)
    rollouts = torch.arange(config.group_size, device=tokens.device)
    condition = condition_of(batch).take(image)
    advantages = advantages_of(rewards, config, seed, batch.sample_ids).flatten()
    ids = config.batch_size + (batch.sample_ids[:, None] * config.group_size + rollouts).flatten()  # the images' before
    sequences = Sequences(drawn.tokens.flatten(0, 1), ids, advantages, drawn.logprobs.flatten(0, 1))

    micro_batches = [("policy", rows) for rows in split(len(sequences.tokens), config.micro_batch)]
    if config.prior == "ce" and config.prior_weight:
        micro_batches += [("prior", rows) for rows in split(len(tokens), config.micro_batch)]
    sums = {name: torch.zeros((), device=tokens.device) for name in ("loss", "cross_entropy", "kl", "clipped")}
    with weights_of_step(models.generator):
        for index, (term, rows) in enumerate(micro_batches):
            reduce_at(models.generator, last=index + 1 == len(micro_batches))
            if term == "policy":
                part = Sequences(*(value[rows] for value in sequences))
                losses = sequence_loss(models, config, part, condition.take(rows), seed, clock)
                weight = share = (rows.stop - rows.start) / (config.batch_size * config.group_size)
            else:
                losses = ntp_loss(models, config, batch.take(rows), tokens[rows], seed, clock)
                share = (rows.stop - rows.start) / config.batch_size
                weight = config.prior_weight * share
            with clock("backward"):
                (losses.terms["loss"] * weight).backward()
            sums["loss"] += weight * losses.terms["loss"].detach()
            for name in ("cross_entropy", "kl", "clipped"):
                if name in losses.terms:
                    sums[name] += share * losses.terms[name].detach()
    share = len(tokens) / config.batch_size
    metrics = metrics_of(config)
    means = mean_terms(sums | {name: share * value.mean() for name, value in rewards.items()}, metrics)
    bad = non_finite(sums | rewards, len(tokens), metrics)
    return Gradients(means, bad, tokens, drawn.tokens, rewards["reward"])


@torch.no_grad()
def draw(models: Models, config: RolloutOptions, batch: ImageBatch, seed: int) -> Generation:
    """`config.group_size` sequences for each image's class, guided by `config.rollout_cfg_scale`."""
    generator, condition = whole_copy(models.generator), condition_of(batch)
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=batch.images.is_cuda):
        return sample_groups(
            generator,
            condition.rows,
            condition_mask=condition.mask,
            group_size=config.group_size,
            seed=seed,
            sample_ids=batch.sample_ids,
            cfg_scale=config.rollout_cfg_scale,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )


def split(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def sequence_loss(
    models: Models, config: AlignConfig, sequences: Sequences, condition: Condition, seed: int, clock: Clock
) -> Losses:
    """Clipped policy loss of sampled sequences, each in its own context, and the KL term.

    Under guidance the sequences are another distribution's; as in AR-GRPO the ratio is still the model's own to itself.
    """
    tokens, rollouts = sequences.tokens, sequences.tokens[:, None]
    context = {"seed": seed, "sample_ids": sequences.sample_ids}
    with clock("forward"):
        hidden = teacher_forced_hidden(models.generator, tokens, condition, config, training=True, **context)
    with clock("loss"):
        loss = ops.policy_loss(
            **models.generator.head.operands(hidden),
            tokens=rollouts,
            advantages=sequences.advantages[:, None],
            targets=tokens,
            old_logprobs=sequences.logprobs[:, None] if config.off_policy else None,
            base_logprobs=base_logprobs(models, config, tokens, condition, rollouts, **context),
            clip_range=config.clip_range,
            prior_weight=0.0,
            kl_weight=config.prior_weight if config.prior == "kl" else 0.0,
            temperature=config.temperature,
        )
    return Losses({"loss": loss.loss, "kl": loss.kl, "clipped": loss.clip_fraction}, rollouts)
