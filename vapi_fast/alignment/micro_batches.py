"""A micro-batch's forward, loss and backward: kernel by kernel, or as CUDA graphs where that form is taken.

A graph does again what it did, on the tensors that it had. So what changes from one micro-batch to the next is copied
to where it was: tokens, conditions, sample ids, advantages, and the seed, a tensor. Weights are cast to bf16 once a
step, to where they were, and gradients added up in the same tensors in every step. Decoding and rewards stand between
two halves, and each stage of a half is a graph of its own, so that a clock sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.losses import LOSSES, Judged, Losses, draw_rollouts, judge, ntp_loss, policy_terms
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.recordings import Standing
from vapi_fast.alignment.rollout import condition_of, weights_of_step
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.runtime.clock import Clock
from vapi_fast.runtime.forms import form
from vapi_fast.runtime.graphs import Pool, RecordedStages, aside

T = TypeVar("T")

DEVICES = {"cuda"}  # whose kernels can be recorded


def is_recorded(models: Models, config: AlignConfig) -> bool:
    """Whether micro-batches are taken as graphs: not of sharded weights, which are gathered in between, nor with a
    gradient through the decoder."""
    device = models.generator.head.weight.device
    able = device.type in DEVICES and not isinstance(models.generator, FSDPModule) and config.method != "ste"
    return able and form("micro-batch", device, f"of {config.micro_batch}") == "graph"


def weights_for(models: Models, config: AlignConfig) -> AbstractContextManager[None]:
    """`weights_of_step`, of the micro-batches of one step."""
    if not is_recorded(models, config):
        return weights_of_step(models.generator)
    models.recordings.begin_step()
    return weights_of_step(models.generator, models.recordings.casts)


def learn(
    models: Models,
    config: AlignConfig,
    batch: ImageBatch,
    tokens: Tensor,
    seed: int,
    clock: Clock,
    judged: Judged | None = None,
) -> Losses:
    """The micro-batch's terms, its gradients added to what there are; inside of `weights_for`.

    judged: as of `vapi_loss`.
    """
    recordings, standing = models.recordings, None
    if is_recorded(models, config):
        recordings.hold_gradients(models.generator.parameters())
        key = config, *(each if each is None else (each.shape, each.dtype) for each in (*batch, tokens))
        standing = recordings.standing(key, batch, tokens)
    if standing is None:
        known = () if judged is None else (judged,)
        losses = LOSSES[config.method](models, config, batch, tokens, seed, clock, *known)
        backward(losses.terms["loss"], config, len(tokens), clock)
        return losses
    standing.take(batch, tokens, seed)
    halves = [partial(half, models, config, standing) for half in (draw, learn_from_drawn)]
    if standing.halves is None and standing.warm:
        standing.halves = [RecordedStages(half, recordings.pool) for half in halves]
    first, second = standing.halves or [partial(run_aside, recordings.pool, half) for half in halves]
    rollouts = first(clock).clone()
    if config.method == "vapi":
        judged = judged or judge(models, config, rollouts, batch, seed, clock)
        standing.learn_from(judged.advantages)
    terms = {name: term.clone() for name, term in second(clock).items()}
    recordings.hold_gradients(models.generator.parameters())
    return Losses(terms if judged is None else terms | judged.rewards, rollouts)


def backward(loss: Tensor, config: AlignConfig, images: int, clock: Clock) -> None:
    with clock("backward"):
        (loss * (images / config.batch_size)).backward()


# ---- the halves of one that stands in memory


def draw(models: Models, config: AlignConfig, standing: Standing, clock: Clock) -> Tensor:
    """Its rollouts int64 `[b,G,T]`; the graph of their forward is left for the other half."""
    if config.method == "ntp":
        return standing.tokens[:, :0]
    draws = {"seed": standing.seed, "sample_ids": standing.batch.sample_ids}
    standing.rollout = draw_rollouts(models, config, standing.tokens, condition_of(standing.batch), clock, **draws)
    return standing.rollout.tokens


def learn_from_drawn(models: Models, config: AlignConfig, standing: Standing, clock: Clock) -> dict[str, Tensor]:
    """Its terms but for the rewards, without a graph, once the gradients are added up."""
    given, seed = (models, config, standing.batch, standing.tokens), standing.seed
    if config.method == "ntp":
        terms = ntp_loss(*given, seed, clock).terms
    else:
        rollout, standing.rollout = standing.rollout, None
        terms = policy_terms(*given, rollout, standing.advantages, seed, clock)
    backward(terms["loss"], config, len(standing.tokens), clock)
    return {name: term.detach() for name, term in terms.items()}


def run_aside(pool: Pool | None, half: Callable[[Clock], T], clock: Clock) -> T:
    """Before its first recording, in the stream that it is recorded in."""
    with aside(pool):
        return half(clock)
