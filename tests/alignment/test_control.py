"""Controls: advantages that say nothing of the rollouts, and everything else of a step as in the real run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import PublishedRecipe
from processes import become, on_ranks
from torch import Tensor

import vapi_fast
from vapi_fast import AlignConfig, ops
from vapi_fast.alignment import free_running, losses, step
from vapi_fast.alignment.control import SAID, advantages_of, normal_rewards, others, sheet_label
from vapi_fast.alignment.free_running import accumulate_free_gradients
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.step import Gradients, accumulate_gradients
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.runtime.checkpoint import load_state_dict
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.tiny import FILES

Make = Callable[..., AlignConfig]
SEED = 11
CONTROLS = (None, "random", "shuffled")


def test_random_rewards_are_normal_and_independent() -> None:
    """By the normal distribution function at 1 024 seeds × 4 images × 8 rollouts; no two draws go together."""
    drawn = torch.stack([normal_rewards(seed, torch.tensor([0, 1, 5, 2**33 + 1]), 8) for seed in range(1024)])
    assert (drawn.shape, drawn.dtype) == ((1024, 4, 8), torch.float32)
    assert torch.equal(drawn[:, 1], drawn[:, 3])  # the low 32 bits of an id count
    values = drawn[:, :3].flatten(1).double()
    ranks = torch.special.ndtr(values.flatten()).sort().values
    uniform = (torch.arange(len(ranks)) + 0.5) / len(ranks)
    assert (ranks - uniform).abs().max() < 1.95 / len(ranks) ** 0.5  # Kolmogorov–Smirnov at 0.1 %
    correlations = torch.corrcoef(values.T) - torch.eye(24)
    assert correlations.abs().max() < 5 / 1024**0.5


def test_pictures_say_what_trained_the_generator(tiny_config: Make) -> None:
    runs = ({}, {"control": "random"}, {"control": "shuffled"}, {"method": "ste"}, {"method": "ntp"})
    assert [sheet_label(tiny_config(**changes)) for changes in runs] == [
        *("aligned", "random advantages", "shuffled advantages", "straight-through", "next-token prediction alone")
    ]


@pytest.mark.parametrize("group_size", [2, 8])
def test_random_advantages_are_normalised_as_the_real_ones(tiny_config: Make, group_size: int) -> None:
    config, ids = tiny_config(control="random", group_size=group_size), torch.arange(4)
    drawn = torch.cat([advantages_of({"reward": torch.zeros(4, group_size)}, config, seed, ids) for seed in range(500)])
    torch.testing.assert_close(drawn.mean(1), torch.zeros(2000), rtol=0, atol=1e-6)
    # Not exactly where two of them are nearly equal: there is eps beside the deviation.
    torch.testing.assert_close(drawn.std(1), torch.ones(2000), rtol=1e-3, atol=0)
    assert drawn.mean(0).abs().max() < 5 / 2000**0.5  # no rollout is preferred
    if group_size == 2:
        torch.testing.assert_close(drawn.abs(), torch.full_like(drawn, 0.5**0.5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("batch_size", [2, 3, 4, 32, 129])
def test_every_image_gets_one_other_s_advantages(batch_size: int) -> None:
    drawn = torch.stack([others(seed, batch_size, torch.device("cpu")) for seed in range(600)])
    assert torch.equal(drawn.sort(1).values, torch.arange(batch_size).expand_as(drawn))
    assert (drawn != torch.arange(batch_size)).all()
    if batch_size == 4:  # from each image to each other one equally often
        counts = torch.stack([(drawn == slot).sum(0) for slot in range(4)])
        assert (counts + 200 * torch.eye(4) - 200).abs().max() < 5 * (600 * 2 / 9) ** 0.5


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_advantages_do_not_depend_on_the_backend(tiny_config: Make, backend: str) -> None:
    rewards, ids = torch.randn(4, 4), torch.tensor([2, 0, 3, 1])
    with ops.use_backend(backend):
        found = {name: advantages_of({"reward": rewards}, tiny_config(control=name), SEED, ids) for name in CONTROLS}
    real = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    torch.testing.assert_close(found[None], real)
    drawn = normal_rewards(SEED, ids, 4)
    torch.testing.assert_close(found["random"], (drawn - drawn.mean(1, keepdim=True)) / drawn.std(1, keepdim=True))
    source = others(SEED, 4, torch.device("cpu"))[ids]
    torch.testing.assert_close(found["shuffled"], real[ids.argsort()][source])


def learned(
    models: Models, config: AlignConfig, batch: ImageBatch, patch: pytest.MonkeyPatch
) -> tuple[Gradients, dict[str, Any]]:
    """A step's gradients, and what `policy_loss` was called with, its micro-batches joined."""
    calls: list[dict[str, Any]] = []
    policy_loss = ops.policy_loss
    with patch.context() as patched:
        patched.setattr(losses.ops, "policy_loss", lambda **call: (calls.append(call), policy_loss(**call))[1])
        models.generator.zero_grad()
        found = accumulate_gradients(models, config, batch, SEED, nullcontext)
    rows = ("hidden", "tokens", "advantages", "targets")
    return found, calls[0] | {name: torch.cat([call[name].detach() for call in calls]) for name in rows}


@pytest.mark.parametrize(
    "changes", [{}, {"dropout": 0.1}, {"recipe": "va-pi"}, {"noise_prob": 0.5, "top_k": 40, "prior": "kl"}]
)
def test_all_but_the_advantages_is_the_real_step_s(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    """Bit for bit: states, rollouts, targets, weights of the terms, and the rewards that are reported."""
    runs = {
        control: learned(tiny_models, tiny_config(control=control, micro_batch=2, **changes), tiny_batch, monkeypatch)
        for control in CONTROLS
    }
    real, called = runs[None]
    assert torch.equal(called["advantages"], ops.group_advantages(real.rewards))
    for control in CONTROLS[1:]:
        found, call = runs[control]
        for name in ("means", "rollouts", "rewards", "tokens"):
            mine, theirs = getattr(found, name), getattr(real, name)
            if name == "means":  # of the loss and its gradient alone the advantages are part
                mine, theirs = mine[1:], theirs[1:]
            assert torch.equal(mine, theirs), name
        assert call.keys() == called.keys()
        for name, value in called.items():
            if name == "advantages":
                assert not torch.equal(call[name], value)
            elif name not in ("old_logprobs", "base_logprobs"):  # of the first micro-batch
                assert torch.equal(call[name], value) if isinstance(value, Tensor) else call[name] == value, name
            elif value is not None:
                assert torch.equal(call[name], value), name
    shuffled = runs["shuffled"][1]["advantages"]
    assert torch.equal(shuffled, called["advantages"][others(SEED, 4, torch.device("cpu"))])
    random = ops.group_advantages(normal_rewards(SEED, torch.arange(4), 4))
    assert torch.equal(runs["random"][1]["advantages"], random)


@pytest.mark.parametrize("control", ["random", "shuffled"])
def test_controls_do_not_depend_on_micro_batches(
    tiny_config: Make,
    tiny_models: Models,
    tiny_batch: ImageBatch,
    monkeypatch: pytest.MonkeyPatch,
    control: str,
) -> None:
    advantages, gradients = [], []
    for micro_batch in (4, 1, 3):
        config = tiny_config(control=control, micro_batch=micro_batch)
        advantages.append(learned(tiny_models, config, tiny_batch, monkeypatch)[1]["advantages"])
        gradients.append(torch.cat([p.grad.flatten().double() for p in tiny_models.generator.parameters()]))
    for found, gradient in zip(advantages[1:], gradients[1:], strict=True):
        # Rewards of another micro-batch are rounded otherwise; of random ones nothing is.
        torch.testing.assert_close(found, advantages[0], rtol=0, atol=0 if control == "random" else 1e-4)
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


@pytest.mark.parametrize("control", CONTROLS)
def test_free_rollouts_have_the_same_controls(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, monkeypatch: pytest.MonkeyPatch, control: str
) -> None:
    seen = []
    sequence_loss = free_running.sequence_loss
    monkeypatch.setattr(
        free_running, "sequence_loss", lambda *call: (seen.append(call[2].advantages), sequence_loss(*call))[1]
    )
    config = tiny_config(control=control, rollouts="free")
    found = accumulate_free_gradients(tiny_models, config, tiny_batch, SEED, nullcontext)
    expected = advantages_of({"reward": found.rewards}, config, SEED, tiny_batch.sample_ids)
    assert torch.equal(torch.cat(seen).view(4, 4), expected)


SHUFFLED = {"model": "tiny", "control": "shuffled", "batch_size": 4, "micro_batch": 1, "group_size": 4, "steps": 2}


def train(output: Path, rank: int = 0) -> None:
    """One rank of a shuffled run; leaves slots, advantages and rewards of every step beside its results."""
    seen = []
    judge = losses.judge_step

    def noted(*arguments: Any) -> losses.Judged:
        judged = judge(*arguments)
        seen.append((arguments[2].sample_ids, judged.advantages, judged.rewards["reward"]))
        return judged

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "judge_step", noted)
        vapi_fast.align(AlignConfig(output_dir=output, synthetic_data=True, **SHUFFLED))
    torch.save(seen, output / f"seen-{rank}.pt")


def train_rank(rank: int, world_size: int, port: int, output: Path) -> None:
    become(rank, world_size, port)
    train(output, rank)


def test_shuffled_runs_do_not_depend_on_ranks(tmp_path: Path) -> None:
    on_ranks(train_rank, 2, tmp_path / "two")
    train(tmp_path / "one")
    shares = [torch.load(tmp_path / "two" / f"seen-{rank}.pt", weights_only=True) for rank in range(2)]
    sharded = [[torch.cat(parts) for parts in zip(*step, strict=True)] for step in zip(*shares, strict=True)]
    whole = torch.load(tmp_path / "one" / "seen-0.pt", weights_only=True)
    assert len(whole) == len(sharded) == SHUFFLED["steps"]
    for number, ((slots, advantages, rewards), (their_slots, theirs, _)) in enumerate(zip(whole, sharded, strict=True)):
        assert torch.equal(slots, torch.arange(4))
        assert torch.equal(slots, their_slots)
        source = others(ops.fold_seed(0, number), 4, torch.device("cpu"))
        assert torch.equal(advantages, ops.group_advantages(rewards)[source])
        # Later steps start from weights that differ by float rounding.
        torch.testing.assert_close(theirs, advantages, rtol=0, atol=1e-4 if number == 0 else 0.05)
    one, two = (load_state_dict(tmp_path / name / "aligned.pt") for name in ("one", "two"))
    start = load_state_dict(FILES.generator)
    moved = sum(float((one[name] - start[name]).square().sum()) for name in start) ** 0.5
    assert sum(float((one[name] - two[name]).square().sum()) for name in start) ** 0.5 < 1e-3 * moved


@pytest.mark.usefixtures("image_sets")
def test_a_control_run_says_so(tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = vapi_fast.align(tiny_config(output_dir=tmp_path / "real"))
    assert "a control run" not in capsys.readouterr().out
    for control in CONTROLS[1:]:
        output = tmp_path / control
        record = vapi_fast.align(tiny_config(output_dir=output, control=control))
        assert json.loads((output / "run.json").read_text())["config"]["control"] == control
        out, err = capsys.readouterr()
        assert out.count(SAID[control]) == 2
        assert f"aligning (vapi, control {control})" in err
        assert record["reward"][0] == real["reward"][0]
        assert record["curves"]["cross_entropy"][0] == real["curves"]["cross_entropy"][0]
        assert record["reward"][1] != real["reward"][1]
        assert all(math.isfinite(value) for value in record["curves"]["gradient_norm"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"control": "random", "method": "ste"},
            "--control random needs --method vapi: --method ste has no advantages",
        ),
        ({"control": "shuffled", "method": "ntp"}, "--control shuffled needs --method vapi: --method ntp has no"),
        ({"control": "shuffled", "batch_size": 1}, "--control shuffled needs --batch-size 2 or more"),
        ({"control": "none"}, "--control none: choose one of random, shuffled"),
    ],
)
def test_what_has_no_control(tiny_config: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny_config(**changes)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_the_published_recipe_has_no_control(tiny_config: Make) -> None:
    with pytest.raises(ConfigError, match="--path reference goes without --control"):
        PublishedRecipe().check(tiny_config(control="random"))
