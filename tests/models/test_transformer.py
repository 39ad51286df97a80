"""The core under a generator of another family, against the same in plain PyTorch: what holds the interface.

It is conditioned on prompts of words, left-padded and masked; its positions are one-dimensional, its image tokens come
through an MLP, and so do the states before a head with a bias (as in Janus-Pro).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_l2
from plain_transformer import plain_states
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vapi_fast import AlignConfig, ops
from vapi_fast.alignment import costs, losses
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.rollout import token_logprobs
from vapi_fast.alignment.snapshots import Snapshots
from vapi_fast.alignment.step import accumulate_gradients, align_step, make_trainer
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.generation import sample_groups
from vapi_fast.models import Condition, Generator, GeneratorConfig
from vapi_fast.models.families import FAMILIES
from vapi_fast.models.transformer import Block, Head, RMSNorm, attention_mask

PAD, BEGIN = 0, 1


class Prompts(NamedTuple):
    """A condition is so many words, behind padding."""

    words: int


@dataclass(frozen=True)
class PromptConfig(GeneratorConfig):
    words: int = 11

    norm_eps: ClassVar[float] = 0.1  # another one, and not to be overlooked

    @property
    def hidden_width(self) -> int:
        return 40

    @property
    def condition(self) -> Prompts:
        return Prompts(self.prefix_len)

    @property
    def prefix_len(self) -> int:
        return 5


class PromptGenerator(Generator):
    def __init__(self, config: PromptConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.words, config.width)
        self.codes = nn.Embedding(config.vocab_size, 8)
        self.aligner = nn.Sequential(nn.Linear(8, config.width), nn.GELU(), nn.Linear(config.width, config.width))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = nn.Linear(config.width, config.width)
        self.vision_head = nn.Linear(config.width, config.vocab_size)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, name: str, *, grid_size: int | None = None, averaged: bool = False
    ) -> PromptGenerator:
        raise NotImplementedError

    def rotary_table(self) -> Tensor:
        half = self.config.head_width // 2
        positions = torch.arange(self.config.prefix_len + self.config.grid_size**2)
        angles = positions[:, None] * 10000.0 ** (-torch.arange(half) / half)
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    def embed_condition(self, rows: Tensor) -> Tensor:
        return self.words(rows)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return self.aligner(self.codes(tokens))

    @property
    def readout(self) -> nn.Module:
        return nn.Sequential(self.mlp, nn.GELU())

    @property
    def head(self) -> Head:
        return Head(self.vision_head.weight, self.vision_head.bias)

    def unconditional(self, rows: Tensor) -> Tensor:
        return torch.where(rows == BEGIN, rows, PAD)

    def checked_condition(self, rows: Tensor, mask: Tensor | None) -> Condition:
        return Condition(rows, mask)


def plain_logits(model: PromptGenerator, tokens: Tensor, condition: Condition) -> Tensor:
    """Logits `[B,S+1,V]` in plain PyTorch, in the dtype of the weights."""
    h = torch.cat([model.words(condition.rows), model.aligner(model.codes(tokens))], dim=1)
    half = model.config.head_width // 2
    angles = torch.arange(h.shape[1])[:, None] * 10000.0 ** (-torch.arange(half, dtype=h.dtype) / half)
    turns = torch.polar(torch.ones_like(angles), angles)
    states = plain_states(model.layers, model.norm, h, turns, eps=0.1, mask=condition.mask)
    return model.vision_head(F.gelu(model.mlp(states[:, condition.rows.shape[1] - 1 :])))


def make_model(**sizes: int) -> PromptGenerator:
    torch.manual_seed(0)
    model = PromptGenerator(PromptConfig(**({"layers": 2, "heads": 2, "width": 16, "vocab_size": 50} | sizes)))
    for parameter in model.parameters():  # so that nothing is left out unseen, biases and norms among them
        nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.5)
    return model


def prompts(*lengths: int) -> Condition:
    """Prompts of so many words, begin token included."""
    rows = torch.randint(2, 11, (len(lengths), 5), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(5) >= 5 - torch.tensor(lengths)[:, None]
    rows[torch.arange(len(lengths)), 5 - torch.tensor(lengths)] = BEGIN
    return Condition(rows.where(mask, PAD), mask)


def test_attention_mask_by_hand() -> None:
    """Two condition positions, the first padded (or both): a position sees itself and what is not padding before it."""
    mask = attention_mask(torch.tensor([[False, True], [False, False]]), 0, 4)
    assert mask.shape == (2, 1, 4, 4)
    assert mask[:, 0].int().tolist() == [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
    ]
    later = attention_mask(torch.tensor([[False, True]]), 2, 4)
    assert later[:, 0].int().tolist() == [[[0, 1, 1, 0], [0, 1, 1, 1]]]


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_the_plain_form(masked: bool) -> None:
    model, condition = make_model(grid_size=3).double(), prompts(5, 2, 4)
    condition = condition if masked else Condition(condition.rows)
    context, rollouts = torch.randint(50, (3, 8)), torch.randint(50, (3, 4, 9))
    expected = plain_logits(model, context, condition)
    hidden = model.hidden(context, condition)
    assert hidden.shape == (3, 9, 16)
    assert relative_l2(model.head.logits(hidden).detach(), expected.detach()) < 1e-6  # the rotary table is float32
    logprobs = expected.log_softmax(-1).gather(-1, rollouts.transpose(1, 2)).transpose(1, 2)
    assert relative_l2(token_logprobs(hidden, model.head, rollouts, 1.0).detach(), logprobs.detach()) < 1e-6
    assert relative_l2(model(context, condition.rows, condition_mask=condition.mask).detach(), expected.detach()) < 1e-6

    advantages, targets = torch.randn(3, 4, dtype=torch.float64), torch.randint(50, (3, 9))
    operands = model.head.operands(hidden)
    loss = ops.policy_loss(**operands, tokens=rollouts, advantages=advantages, targets=targets, prior_weight=0.3).loss
    plain = -(advantages[:, :, None] * (logprobs - logprobs.detach()).exp()).mean()
    plain = plain + 0.3 * F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    parameters = list(model.parameters())
    found, exact = (torch.autograd.grad(each, parameters) for each in (loss, plain))
    for (name, _), gradient, exactly in zip(model.named_parameters(), found, exact, strict=True):
        assert exactly.abs().max() > 0, name
        assert relative_l2(gradient, exactly) < 1e-6, name


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_engine_draws_what_the_whole_forward_gives(scale: float, masked: bool) -> None:
    model, condition = make_model(grid_size=3).eval(), prompts(5, 2, 4) if masked else prompts(5, 5, 5)
    mask = condition.mask if masked else None
    drawn = sample_groups(
        model, condition.rows, group_size=2, condition_mask=mask, cfg_scale=scale, seed=3, top_k=20, batch_size=4
    )
    rows = Condition(condition.rows, mask).take(torch.arange(3).repeat_interleave(2))
    context = drawn.tokens.flatten(0, 1)[:, :-1]
    with torch.no_grad():
        logits = plain_logits(model, context, rows)
        if scale > 1:
            none = plain_logits(model, context, Condition(model.unconditional(rows.rows), rows.mask))
            logits = none + scale * (logits - none)
    expected, logprobs = ops.group_sample(
        logits,
        1,
        seed=3,
        top_k=20,
        sample_ids=torch.arange(3).repeat_interleave(2),
        first_rollouts=torch.arange(2).repeat(3),
    )
    assert torch.equal(drawn.tokens.flatten(0, 1), expected[:, 0])
    torch.testing.assert_close(drawn.logprobs.flatten(0, 1), logprobs[:, 0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def models(tiny_models: Models, monkeypatch: pytest.MonkeyPatch) -> Models:
    """The tiny preset's tokenizer and reward behind a generator for prompts, which stand where the classes are."""
    monkeypatch.setattr(losses, "condition_of", lambda batch: Condition(batch.labels, batch.labels != PAD))
    generator = make_model(vocab_size=512, grid_size=8).train()
    return Models(generator, tiny_models.tokenizer, tiny_models.reward)


def test_a_step_takes_it(
    models: Models, tiny_config: Callable[..., AlignConfig], tiny_batch: ImageBatch, tmp_path: Path
) -> None:
    """Gradients by the formula on its plain form; an update; and a snapshot that another one goes on from."""
    config, batch = tiny_config(noise_prob=0.0), tiny_batch._replace(labels=prompts(5, 2, 4, 3).rows)
    found = accumulate_gradients(models, config, batch, 7, nullcontext)
    gradients = [parameter.grad for parameter in models.generator.parameters()]

    exact = make_model(vocab_size=512, grid_size=8).double()
    logits = plain_logits(exact, found.tokens[:, :-1], Condition(batch.labels, batch.labels != PAD))
    logprobs = logits.log_softmax(-1).gather(-1, found.rollouts.transpose(1, 2)).transpose(1, 2)
    rewards = models.reward.score(found.rollouts, batch.images).total.double()
    advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    plain = -(advantages[:, :, None] * (logprobs - logprobs.detach()).exp()).mean()
    plain = plain + config.prior_weight * F.cross_entropy(logits.flatten(0, 1), found.tokens.flatten())
    expected = torch.autograd.grad(plain, list(exact.parameters()))
    for (name, _), gradient, exactly in zip(exact.named_parameters(), gradients, expected, strict=True):
        assert relative_l2(gradient, exactly) < 1e-4, name

    trainer = make_trainer(models, config)
    before = [parameter.detach().clone() for parameter in models.generator.parameters()]
    figures, _ = align_step(trainer, batch, 0).read()
    assert figures["gradient_norm"] > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, models.generator.parameters(), strict=True))

    snapshots = Snapshots(tmp_path / "snapshots")
    snapshots.save(1, models.generator, trainer.optimizer, {})
    snapshots.finish()
    other = make_trainer(Models(make_model(vocab_size=512, grid_size=8), models.tokenizer, models.reward), config)
    assert Snapshots(tmp_path / "snapshots").restore(other.models.generator, other.optimizer) == (1, {})
    for found_weight, kept in zip(other.models.generator.parameters(), models.generator.parameters(), strict=True):
        assert torch.equal(found_weight, kept)


def test_its_work_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, PromptConfig, PromptGenerator)
    model = make_model(grid_size=3)
    assert costs.parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.hidden(torch.zeros(2, 8, dtype=torch.long), Condition(prompts(5, 5).rows))
    aligner, mlp = costs.around(model.config)
    assert aligner == (8 * 16 + 16 * 16, 16 + 16 + 8)  # codes in, the first product, and what GELU makes of it
    assert mlp == (16 * 16, 16 + 16)
    hidden_scores = 2 * 2 * 2 * 13**2 * 16  # PyTorch counts the masked half as well
    forward, _ = costs.transformer_costs(model.config, 2, passes=1)
    assert counter.get_total_flops() == forward.flops + hidden_scores
