"""Rollouts: the distribution they come from, and what decides their draws."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from steps import relative, step
from torch import Tensor, nn

from vapi_fast import AlignConfig
from vapi_fast.alignment import rollout
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.rollout import Rollout, roll_out, token_logprobs
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.models import Condition
from vapi_fast.models.recompute import cast_once

Make = Callable[..., AlignConfig]


def draw(models: Models, config: AlignConfig, tokens: Tensor, batch: ImageBatch, seed: int = 7) -> Rollout:
    return roll_out(models.generator, tokens, Condition(batch.labels), config, seed=seed, sample_ids=batch.sample_ids)


def test_logprobs_are_those_of_the_training_forward(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch
) -> None:
    config = tiny_config(temperature=0.8)
    tokens = tiny_models.tokenizer.encode(tiny_batch.images)
    rollout = draw(tiny_models, config, tokens, tiny_batch)
    assert rollout.hidden.requires_grad
    logits = tiny_models.generator(tokens[:, :-1], tiny_batch.labels)
    expected = (logits / 0.8).log_softmax(-1).gather(-1, rollout.tokens.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(rollout.logprobs, expected, rtol=1e-4, atol=1e-5)
    again = token_logprobs(rollout.hidden, tiny_models.generator.head, rollout.tokens, 0.8)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


def test_draws_belong_to_seed_and_sample_id(tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch) -> None:
    tokens = tiny_models.tokenizer.encode(tiny_batch.images)
    whole = draw(tiny_models, tiny_config(group_size=6), tokens, tiny_batch)
    part = tiny_batch.take(slice(2, None))
    split = draw(tiny_models, tiny_config(group_size=4), tokens[2:], part)
    assert torch.equal(split.tokens, whole.tokens[2:, :4])
    assert not torch.equal(draw(tiny_models, tiny_config(), tokens, tiny_batch, seed=8).tokens, whole.tokens[:, :4])
    assert not torch.equal(whole.tokens[:, 0], whole.tokens[:, 1])


def test_noise_reaches_the_context_and_not_the_targets(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch
) -> None:
    """With ξ = 1 the context carries nothing of the image: two images of one class predict the same."""
    tokens = tiny_models.tokenizer.encode(tiny_batch.images)
    same = tiny_batch._replace(labels=torch.zeros(4, dtype=torch.int64), sample_ids=torch.zeros(4, dtype=torch.int64))
    noisy = draw(tiny_models, tiny_config(noise_prob=1.0), tokens, same).hidden
    torch.testing.assert_close(noisy[0], noisy[1], rtol=1e-4, atol=1e-4)
    clean = draw(tiny_models, tiny_config(), tokens, same).hidden
    torch.testing.assert_close(clean[:, 0], noisy[:, 0], rtol=1e-4, atol=1e-4)  # position 0 sees the class alone
    assert not torch.allclose(clean[0, 5:], clean[1, 5:], atol=1e-2)


def test_a_step_casts_weights_once_and_loses_nothing_by_it(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three micro-batches in bfloat16, as on a GPU: no further from float32's gradient than with casts in each."""
    config = tiny_config(method="ntp", batch_size=6, micro_batch=2)
    batch = tiny_batch.take(slice(6))
    found = {}

    def every_time(blocks: nn.Module, dtype: torch.dtype, *more: Tensor, kept: None) -> AbstractContextManager[None]:
        return nullcontext()

    for name, devices, cast in [
        ("exact", set(), cast_once),
        ("each", {"cpu"}, every_time),
        ("once", {"cpu"}, cast_once),
    ]:
        monkeypatch.setattr(rollout, "AUTOCAST", devices)
        monkeypatch.setattr(rollout, "cast_once", cast)
        found[name] = step(tiny_models, config, batch)[1]
    each, once = (relative(found[name], found["exact"]) for name in ("each", "once"))
    assert 0 < once < min(1.02 * each, 2e-2)
