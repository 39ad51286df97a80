"""Free-running rollouts: the same loop, another source of rollouts, and rewards that a user supplies."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vapi_fast
from vapi_fast import AlignConfig, ops
from vapi_fast.alignment.figures import metrics_of
from vapi_fast.alignment.free_running import accumulate_free_gradients, draw
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.step import align_step, make_trainer
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.generation.sequences import generate
from vapi_fast.runtime.errors import ConfigError, RewardError

Make = Callable[..., AlignConfig]
SEED = 11


def brightness(images: Tensor, labels: Tensor) -> Tensor:
    """A reward for light images; the classes are only looked at."""
    assert images.shape[0] == labels.shape[0]
    assert images.abs().max() <= 1
    return images.mean((1, 2, 3))


def one_number(images: Tensor, labels: Tensor) -> Tensor:
    return images.mean()


BRIGHTNESS = f"{__name__}:brightness"


def accumulated(models: Models, config: AlignConfig, batch: ImageBatch) -> tuple[dict[str, float], Tensor]:
    models.generator.zero_grad()
    found = accumulate_free_gradients(models, config, batch, SEED, nullcontext)
    gradient = torch.cat([p.grad.flatten().double() for p in models.generator.parameters()])
    return dict(zip(metrics_of(config), found.means.tolist(), strict=True)), gradient


def test_rollouts_are_the_engine_s(tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch) -> None:
    """Rollout 0 of each class is what `generate` draws for the same seed and sample id."""
    drawn = draw(tiny_models, tiny_config(rollouts="free", group_size=3), tiny_batch, SEED)
    generator = tiny_models.generator.eval()
    alone = generate(generator, tiny_batch.labels, seed=SEED, sample_ids=tiny_batch.sample_ids)
    assert drawn.tokens.shape == (4, 3, 64)
    assert torch.equal(drawn.tokens[:, 0], alone)


@pytest.mark.parametrize("prior", ["ce", "kl"])
def test_loss_and_gradient_are_those_of_the_formula(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, prior: str
) -> None:
    """−A · log π of every sampled token in its own context, and the prior, by autograd on the plain forward."""
    config = tiny_config(rollouts="free", reward=BRIGHTNESS, prior=prior, prior_weight=0.3)
    torch.manual_seed(1)
    for parameter in tiny_models.generator.parameters():  # away from the base, so that the KL term is not zero
        parameter.data += 0.02 * parameter.std() * torch.randn_like(parameter)
    figures, ours = accumulated(tiny_models, config, tiny_batch)

    tokens = draw(tiny_models, config, tiny_batch, SEED).tokens.flatten(0, 1)
    labels = tiny_batch.labels.repeat_interleave(config.group_size)
    rewards = brightness(tiny_models.tokenizer.decode(tokens).clamp(-1, 1), labels).unflatten(0, (-1, 4))
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-8)).clamp(-5, 5)
    tiny_models.generator.zero_grad()
    logprobs = tiny_models.generator(tokens[:, :-1], labels).log_softmax(-1)
    own = logprobs.gather(-1, tokens[..., None]).squeeze(-1)
    ratio = (own - own.detach()).exp()
    loss = -(advantages.flatten()[:, None] * ratio).mean()
    if prior == "kl":
        with torch.no_grad():
            base = tiny_models.base(tokens[:, :-1], labels).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        divergence = base - own
        kl = (divergence.exp() - divergence - 1).mean()
        loss = loss + 0.3 * kl
        assert figures["kl"] == pytest.approx(kl.item(), rel=1e-4)
    else:
        targets = tiny_models.tokenizer.encode(tiny_batch.images)
        logits = tiny_models.generator(targets[:, :-1], tiny_batch.labels)
        cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss = loss + 0.3 * cross_entropy
        assert figures["cross_entropy"] == pytest.approx(cross_entropy.item(), rel=1e-5)
    loss.backward()
    expected = torch.cat([p.grad.flatten().double() for p in tiny_models.generator.parameters()])
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert figures["reward"] == pytest.approx(rewards.mean().item(), rel=1e-4)
    assert float((ours - expected).norm() / expected.norm()) < 1e-4


def test_gradient_does_not_depend_on_micro_batch(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch
) -> None:
    whole_figures, whole = accumulated(tiny_models, tiny_config(rollouts="free", micro_batch=64), tiny_batch)
    figures, split = accumulated(tiny_models, tiny_config(rollouts="free", micro_batch=3), tiny_batch)
    assert figures == pytest.approx(whole_figures, rel=1e-4, abs=1e-6)
    assert float((split - whole).norm() / whole.norm()) < 1e-4


@pytest.mark.parametrize("rollouts", ["free", "teacher-forced"])
def test_steps_raise_the_reward_that_was_asked_for(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, rollouts: str
) -> None:
    config = tiny_config(rollouts=rollouts, reward=BRIGHTNESS, prior_weight=0.0, lr=1e-4, group_size=8)
    trainer = make_trainer(tiny_models, config)
    options = {"gradients": accumulate_free_gradients} if rollouts == "free" else {}
    rewards = [align_step(trainer, tiny_batch, step, **options).read()[0]["reward"] for step in range(8)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.02, rewards


@pytest.mark.usefixtures("image_sets")
def test_a_whole_run(tiny_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--rollouts free --reward module:function`, the module in the working directory; then goes on with --resume."""
    (tmp_path / "my_reward.py").write_text("def darkness(images, labels):\n    return -images.mean((1, 2, 3))\n")
    monkeypatch.chdir(tmp_path)
    config = tiny_config(rollouts="free", reward="my_reward:darkness", steps=2)
    record = vapi_fast.align(config)
    assert record["config"]["reward"] == "my_reward:darkness"
    assert all(math.isfinite(value) for value in record["reward"])
    assert record["curves"]["mse"] == [0.0, 0.0]
    assert record["stages"]["sample"]["seconds"] > 0
    assert record["model_flop_utilisation"] is None


def test_bad_rewards_are_refused(tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"reward": "no_such_module:f"}, "--reward no_such_module:f: No module named 'no_such_module'"),
        ({"reward": f"{__name__}:nothing"}, "has no attribute 'nothing'"),
        ({"reward": "brightness"}, "unknown, expected pixel, .* or module:function"),
        ({"reward": f"{__name__}:SEED"}, "not a function"),
        ({"rollouts": "free", "method": "ntp"}, "need --method vapi"),
        ({"rollouts": "free", "noise_prob": 0.5}, "needs --noise-prob 0"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            tiny_config(**changes)
    config = tiny_config(rollouts="free", reward=f"{__name__}:one_number")
    with pytest.raises(
        RewardError, match=r"must return a floating-point tensor \[16\], a reward an image; got float32"
    ):
        accumulate_free_gradients(tiny_models, config, tiny_batch, ops.fold_seed(0, 1), nullcontext)
