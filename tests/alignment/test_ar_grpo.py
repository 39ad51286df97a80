"""`--recipe ar-grpo`: guided rollouts from the class alone, learned from without guidance, by its trainer's loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vapi_fast import AlignConfig
from vapi_fast.alignment.control import advantages_of
from vapi_fast.alignment.figures import metrics_of
from vapi_fast.alignment.free_running import accumulate_free_gradients, draw
from vapi_fast.alignment.losses import rewards_of
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.step import make_trainer
from vapi_fast.cli import main
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.generation.sequences import sample_groups
from vapi_fast.runtime.errors import ConfigError

Make = Callable[..., AlignConfig]
SEED = 5
ADVANTAGE_EPS, BETA, EPSILON = 1e-4, 0.1, 0.2  # of its trainer


def redness(images: Tensor, labels: Tensor) -> Tensor:
    return images[:, 0].mean((1, 2))


REDNESS = f"{__name__}:redness"
REWARDS = f"classifier:5,{REDNESS}"


def test_the_recipe_is_what_its_authors_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_c2i_train.sh`: 4 classes × 8 a step, guidance 2, β 0.1, 400 steps at 1e-5, TRL's AdamW without decay."""
    monkeypatch.setattr("vapi_fast.alignment.config.installed", lambda module: True)
    files = {name: tmp_path / name for name in ("gpt_ckpt", "vq_ckpt", "data")}
    for path in files.values():
        path.touch()
    for config in (AlignConfig(model="xl", recipe="ar-grpo", **files), AlignConfig(model="tiny", recipe="ar-grpo")):
        assert (config.batch_size, config.group_size, config.steps) == (4, 8, 400)
        assert (config.rollouts, config.rollout_cfg_scale, config.temperature) == ("free", 2.0, 1.0)
        assert (config.top_k, config.top_p, config.noise_prob) == (0, 1.0, 0.0)
        assert (config.dropout, config.label_dropout, config.off_policy) == (0.0, 0.0, False)
        assert (config.prior, config.prior_weight) == ("kl", BETA)
        assert (config.advantage, config.advantage_eps) == ("sum", ADVANTAGE_EPS)
        assert (config.lr, config.weight_decay, config.beta2, config.clip_grad_norm) == (1e-5, 0.0, 0.999, 1.0)
        weights = {"clip": 5.0, "clip-levels": 1.0, "hpsv2": 5.0, "hpsv2-levels": 1.0}
        assert {term.name: term.weight for term in config.reward_terms} == weights
    assert AlignConfig(model="tiny", recipe="ar-grpo", reward="classifier", lr=3e-5, prior="ce").lr == 3e-5


def test_no_weight_decays(tiny_config: Make, tiny_models: Models) -> None:
    groups = make_trainer(tiny_models, tiny_config(recipe="ar-grpo", reward="classifier")).optimizer.param_groups
    assert {(group["lr"], group["weight_decay"], group["betas"]) for group in groups} == {(1e-5, 0.0, (0.9, 0.999))}


def test_guidance_draws_the_rollouts(tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch) -> None:
    config = tiny_config(recipe="ar-grpo", reward="classifier")
    drawn = draw(tiny_models, config, tiny_batch, SEED).tokens
    options = {"group_size": 4, "seed": SEED, "sample_ids": tiny_batch.sample_ids}
    assert torch.equal(drawn, sample_groups(tiny_models.generator, tiny_batch.labels, cfg_scale=2.0, **options).tokens)
    assert not torch.equal(drawn, sample_groups(tiny_models.generator, tiny_batch.labels, **options).tokens)


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 3, "group_size": 8}, {"top_k": 40}])
def test_a_step_is_its_trainer_s(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, changes: dict[str, Any]
) -> None:
    """Loss and gradient of the same rollouts and rewards, away from the base so that KL is not zero."""
    config = tiny_config(recipe="ar-grpo", reward=REWARDS, **changes)
    generator = tiny_models.generator
    for parameter in generator.parameters():
        parameter.data += 0.05 * parameter.std() * torch.randn_like(parameter)
    found = accumulate_free_gradients(tiny_models, config, tiny_batch, SEED, nullcontext)
    ours = torch.cat([p.grad.flatten() for p in generator.parameters()])
    figures = dict(zip(metrics_of(config), found.means.tolist(), strict=True))

    generator.zero_grad()
    tokens, labels = found.rollouts.flatten(0, 1), tiny_batch.labels.repeat_interleave(config.group_size)

    def per_token_logps(model: torch.nn.Module) -> Tensor:
        return model(tokens[:, :-1], labels).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)

    parts = rewards_of(tiny_models, config, found.rollouts, tiny_batch, nullcontext)
    rewards = 5 * parts["reward/classifier"] + parts[f"reward/{REDNESS}"]
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + ADVANTAGE_EPS)
    advantages = advantages.view(-1, 1)
    logps = per_token_logps(generator)
    with torch.no_grad():
        reference = per_token_logps(tiny_models.base)
    kl = torch.exp(reference - logps) - (reference - logps) - 1
    ratio = torch.exp(logps - logps.detach())
    policy = -torch.min(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
    loss = (policy + BETA * kl).mean()
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in generator.parameters()])

    assert kl.mean().item() > 1e-3
    assert figures["kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert figures["clipped"] == figures["cross_entropy"] == 0


def test_its_advantages_are_not_clipped(tiny_config: Make) -> None:
    """One rollout against 63 is (64 − 1)/√64 deviations away; against seven 2.47, which 5 does not clip either."""
    for group, most in ((64, 63 / 8), (8, 7 / 8**0.5)):
        rewards, ids = {"reward": torch.eye(group)[:1] * 1e6}, torch.arange(1)
        options = {"recipe": "ar-grpo", "reward": "classifier", "group_size": group}
        assert advantages_of(rewards, tiny_config(**options), 0, ids).max().item() == pytest.approx(most)
        for clip in (5.0, 0.5):
            clipped = advantages_of(rewards, tiny_config(**options, advantage_clip=clip), 0, ids)
            assert clipped.max().item() == pytest.approx(min(most, clip))


REWARD = "--reward clip:5,clip-levels,hpsv2:5,hpsv2-levels"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "ste"},
            "--prior kl needs --method vapi: --method ste has no sampled tokens; --recipe ar-grpo sets --prior kl",
        ),
        (
            {"method": "ntp", "prior": "ce"},
            "--rollouts free and --reward need --method vapi: --method ntp has no rollouts; --recipe ar-grpo sets "
            f"--rollouts free {REWARD}",
        ),
        (
            {"rollouts": "teacher-forced"},
            "--rollout-cfg-scale 2 needs --rollouts free: those around an image are drawn from the forward that they "
            "are learned in; --recipe ar-grpo sets --rollout-cfg-scale 2",
        ),
        (
            {"noise_prob": 0.5},
            "--rollouts free needs --noise-prob 0: its context is its own tokens; --recipe ar-grpo sets --rollouts "
            "free",
        ),
        (
            {"noise_prob": 0.5, "rollouts": "free"},
            "--rollouts free needs --noise-prob 0: its context is its own tokens",
        ),
        ({"advantage_clip": -1.0}, "--advantage-clip must be at least 0, got -1.0"),
    ],
)
def test_what_the_recipe_excludes(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    """One line, with what the recipe has set and the user may not know of."""
    monkeypatch.setattr("vapi_fast.alignment.config.installed", lambda module: True)
    with pytest.raises(ConfigError) as refused:
        tiny_config(recipe="ar-grpo", **changes)
    assert str(refused.value) == message


def test_its_rewards_need_transformers(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vapi_fast.alignment.config.installed", lambda module: module != "transformers")
    with pytest.raises(ConfigError) as refused:
        tiny_config(recipe="ar-grpo")
    assert str(refused.value) == (
        "--reward clip needs transformers, not installed here: pip install 'vapi-fast[rewards]'; --recipe ar-grpo sets "
        + REWARD
    )
    tiny_config(recipe="ar-grpo", reward="classifier")


@pytest.mark.usefixtures("image_sets")
def test_the_command_takes_the_preset_s_own_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the recipe's, whose networks have to be fetched."""
    output = tmp_path / "run"
    command = "vapi-fast align --model tiny --recipe ar-grpo --reward classifier --group-size 4 --steps 2 --no-eval"
    monkeypatch.setattr("sys.argv", [*command.split(), "--output-dir", str(output)])
    assert main() == 0
    record = json.loads((output / "run.json").read_text())
    assert record["config"]["recipe"] == "ar-grpo"
    assert record["curves"]["reward/classifier"] == record["reward"]
    assert all(0 < reward < 1 for reward in record["reward"])
    assert record["curves"]["kl"][0] == pytest.approx(0, abs=1e-9)
    assert record["curves"]["kl"][1] > 0
