"""VA-π alignment: batch → loss → update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vapi_fast import ops
from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.figures import StepResult, mean_terms, metrics_of, non_finite
from vapi_fast.alignment.losses import judge_step
from vapi_fast.alignment.micro_batches import learn, weights_for
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.optimizer import clip_gradients, make_optimizer, step_unless
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.runtime.clock import Clock
from vapi_fast.runtime.distributed import reduce_at, sum_over_ranks


@dataclass(frozen=True)
class Trainer:
    """What stays from step to step. `failed`: 0-d float32 on the device, 1 once a value was not finite."""

    models: Models
    optimizer: torch.optim.Optimizer
    config: AlignConfig
    clock: Clock
    failed: Tensor


def make_trainer(models: Models, config: AlignConfig, clock: Clock = nullcontext) -> Trainer:
    """What `align_step` needs, with AdamW over the generator as it is now: shard it before."""
    device = models.generator.head.weight.device
    return Trainer(models, make_optimizer(models.generator, config), config, clock, torch.zeros((), device=device))


class Gradients(NamedTuple):
    """What the backward passes over this rank's images leave, besides the gradients; all on the device."""

    means: Tensor  # float64 [metrics]: this rank's share of the means over all images
    bad: Tensor  # bool [metrics, b]: the term is not finite for the image
    tokens: Tensor  # int64 [b,T]
    rollouts: Tensor  # int64 [b,G,T]
    rewards: Tensor  # [b,G] or, with `credit_window`, [b,G,T]; empty where nothing was sampled


def accumulate_gradients(models: Models, config: AlignConfig, batch: ImageBatch, seed: int, clock: Clock) -> Gradients:
    """Forward and backward over this rank's images, micro-batch by micro-batch."""
    with clock("encode"):
        tokens = models.codec.encode(batch.images)
    metrics = metrics_of(config)
    means, bad, rollouts, rewards = [], [], [], []
    with weights_for(models, config):
        judged = judge_step(models, config, batch, tokens, seed, clock) if config.control == "shuffled" else None
        for start in range(0, len(tokens), config.micro_batch):
            rows = slice(start, start + config.micro_batch)
            part = batch.take(rows)
            reduce_at(models.generator, last=rows.stop >= len(tokens))
            known = judged and judged.take(rows)
            losses = learn(models, config, part, tokens[rows], seed, clock, known)
            share = len(part.images) / config.batch_size
            means.append(share * mean_terms(losses.terms, metrics))
            bad.append(non_finite(losses.terms, len(part.images), metrics))
            rollouts.append(losses.rollouts)
            rewards.append(losses.terms.get("reward", losses.terms["loss"].new_empty(0)))
    return Gradients(torch.stack(means).sum(0), torch.cat(bad, 1), tokens, torch.cat(rollouts), torch.cat(rewards))


def align_step(
    trainer: Trainer,
    batch: ImageBatch,
    step: int,
    *,
    gradients: Callable[..., Gradients] = accumulate_gradients,
    stop: bool = False,
) -> StepResult:
    """One optimizer step on one batch.

    The draws of a step depend on (config.seed, step, sample id) alone: not on micro-batches, ranks or backend.

    Args:
        gradients: computes them, by `accumulate_gradients`'s signature.
        stop: this rank wants to stop; all ranks learn it from their `StepResult`.
    """
    config, generator, clock = trainer.config, trainer.models.generator, trainer.clock
    seed = ops.fold_seed(config.seed, step)
    trainer.optimizer.zero_grad(set_to_none=True)
    found = gradients(trainer.models, config, batch, seed, clock)
    with clock("optimizer"):
        flags = torch.stack([found.bad.any(), torch.full_like(found.bad[0, 0], stop)]).to(found.means)
        figures = sum_over_ranks(torch.cat([found.means, flags]))
        norm = clip_gradients(generator.parameters(), config.clip_grad_norm)
        trainer.failed.copy_(torch.maximum(trainer.failed, ((figures[-2] > 0) | ~norm.isfinite()).float()))
        step_unless(trainer.optimizer, trainer.failed)
    figures = torch.cat([figures[:-2], norm.detach().double().view(1), figures[-2:]])
    return StepResult(step, figures, found.bad, batch, metrics_of(config))
