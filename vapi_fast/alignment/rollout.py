"""Teacher-forced rollouts: one forward an image, G token sequences drawn from it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from vapi_fast import ops
from vapi_fast.alignment.config import RolloutOptions
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.models import Condition, Dropout, Generator
from vapi_fast.models.recompute import cast_once
from vapi_fast.models.transformer import Head
from vapi_fast.runtime.clock import Clock

AUTOCAST = {"cuda"}  # devices that compute in bf16


class Rollout(NamedTuple):
    """`hidden` `[B,T,D]` keeps the graph of the forward that the tokens were drawn from."""

    hidden: Tensor
    tokens: Tensor  # int64 [B,G,T]
    logprobs: Tensor  # float32 [B,G,T], of the distribution drawn from


def condition_of(batch: ImageBatch) -> Condition:
    """What the images were drawn from: their classes, or their captions."""
    return Condition(batch.labels) if batch.features is None else Condition(batch.features, batch.mask)


def is_cast(model: Generator) -> bool:
    """Whether its forwards compute in bf16 with weights of float32: whole ones; sharded ones are gathered in bf16."""
    return model.head.weight.device.type in AUTOCAST and not isinstance(model, FSDPModule)


def weights_of_step(model: Generator, kept: dict[int, Tensor] | None = None) -> AbstractContextManager[None]:
    """In which a step has one cast of the blocks' and the head's weights, and no optimizer may change them.

    kept: as of `cast_once`.
    """
    if not is_cast(model):
        return nullcontext()
    return cast_once(model.layers, torch.bfloat16, model.head.weight, model.norm.weight, kept=kept)


def teacher_forced_hidden(
    model: Generator,
    tokens: Tensor,
    condition: Condition,
    config: RolloutOptions,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    training: bool = False,
) -> Tensor:
    """Hidden states `[B,T,D]` that predict x_1…x_T from x̃*_{<t}: the image's own tokens, some replaced by noise.

    training: with the dropouts of `config`. One mask serves whatever is drawn from the states.
    """
    context = tokens[:, :-1]
    if config.noise_prob:
        context = ops.noisy_prefix(tokens, config.noise_prob, model.config.vocab_size, seed=seed, sample_ids=sample_ids)
    dropout = None
    if training and (config.dropout or config.label_dropout):
        dropout = Dropout(config.dropout, config.label_dropout, seed, sample_ids)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=is_cast(model)):
        return model.hidden(context, condition, dropout)


def roll_out(
    model: Generator,
    tokens: Tensor,
    condition: Condition,
    config: RolloutOptions,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    training: bool = False,
    clock: Clock = nullcontext,
) -> Rollout:
    """Draw `config.group_size` sequences per image from q(x|I) = Π_t π_θ(x_t | x̃*_{<t}).

    Args:
        tokens: the image's tokens x*, int64 `[B,T]`.
        condition: of the images, B rows.
        seed, sample_ids: with the position and the rollout's index they decide every draw.
        training: as of `teacher_forced_hidden`.
        clock: times the stages forward and sample.
    """
    with clock("forward"):
        draw = {"seed": seed, "sample_ids": sample_ids}
        hidden = teacher_forced_hidden(model, tokens, condition, config, training=training, **draw)
    with clock("sample"):
        head = {name: operand.detach() for name, operand in model.head.operands(hidden).items()}
        drawn, logprobs = ops.linear_group_sample(
            **head,
            group_size=config.group_size,
            seed=seed,
            sample_ids=sample_ids,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
    return Rollout(hidden, drawn, logprobs)


def token_logprobs(hidden: Tensor, head: Head, tokens: Tensor, temperature: float) -> Tensor:
    """log π(x_t) `[B,G,T]` of given tokens `[B,G,T]` under the states `[B,T,D]` that the head takes."""
    logprobs = (head.logits(hidden.float()) / temperature).log_softmax(-1)
    return logprobs.gather(-1, tokens.transpose(1, 2)).transpose(1, 2)


def token_uncertainty(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    """Float32 `[B,2]`, in nats at temperature 1, means over an image's positions with states `[B,T,D]`: the entropy of
    the next token, and its cross-entropy to the image's own tokens `[B,T]`. One image's logits are held at once.
    """
    rows = []
    for states, own in zip(hidden, tokens, strict=True):
        logprobs = head.logits(states.float()).log_softmax(-1)
        entropy = torch.special.entr(logprobs.exp()).sum(-1)
        rows.append(torch.stack([entropy.mean(), -logprobs.gather(-1, own[:, None]).mean()]))
    return torch.stack(rows)
