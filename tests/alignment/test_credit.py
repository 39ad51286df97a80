"""Credit by token: what each token's pixels are worth, advantages of neighbourhoods, and steps that learn by them."""

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
from test_control import learned
from torch import Tensor

import vapi_fast
from vapi_fast import AlignConfig, ops
from vapi_fast.alignment.control import advantages_of, neighbourhood_means, normal_rewards, others
from vapi_fast.alignment.losses import judge_step
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.reward import PixelReward, in_cells
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.runtime.errors import ConfigError

Make = Callable[..., AlignConfig]
SEED = 11
CONTROLS = (None, "random", "shuffled")


# ---- rewards


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_token_s_reward_is_that_of_its_pixels(tiny_models: Models, tiny_batch: ImageBatch, chunk: int) -> None:
    """By the formula: 8 × 8 tokens, each over 4 × 4 pixels of the image, and 4 × 4, 2 × 2 and 1 of the levels."""
    lpips = tiny_models.reward.lpips
    reward = PixelReward(tiny_models.tokenizer, lpips, 0.7, 1.3, chunk)
    tokens = torch.randint(0, 512, (4, 3, 64), generator=torch.Generator().manual_seed(0))
    scored = reward.score(tokens, tiny_batch.images, by_token=True)
    assert [tuple(x.shape) for x in scored] == 3 * [(4, 3, 64)]
    for whole, each in zip(reward.score(tokens, tiny_batch.images), scored, strict=True):
        torch.testing.assert_close(each.mean(-1), whole, rtol=1e-5, atol=0)
    with torch.no_grad():
        decoded = tiny_models.tokenizer.decode(tokens[:, 1])
        levels = list(zip(lpips.feature_maps(decoded), lpips.feature_maps(tiny_batch.images), lpips.heads, strict=True))
        assert [a.shape[-1] for a, _, _ in levels] == [32, 16, 8]
        for t in (0, 7, 21, 63):

            def cell(maps: Tensor, t: int = t) -> Tensor:
                size = maps.shape[-1] // 8
                y, x = size * (t // 8), size * (t % 8)
                return maps[..., y : y + size, x : x + size]

            mse = (cell(decoded) - cell(tiny_batch.images)).square().mean((1, 2, 3))
            distance = sum(
                (((cell(a) / cell(a).norm(dim=1, keepdim=True)) - cell(b) / cell(b).norm(dim=1, keepdim=True)).square())
                .mean((2, 3))
                .mul(w)
                .sum(1)
                for a, b, w in levels
            )
            torch.testing.assert_close(scored.mse[:, 1, t], mse, rtol=1e-5, atol=0)
            torch.testing.assert_close(scored.lpips[:, 1, t], distance, rtol=1e-4, atol=0)
            total = -(0.7 * mse + 1.3 * distance)
            torch.testing.assert_close(scored.total[:, 1, t], total, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("height", "grid"), [(6, 3), (4, 4), (2, 4), (1, 3), (5, 1)])
def test_distances_in_cells(height: int, grid: int, backend: str) -> None:
    """Cells of several pixels and of one, and pixels that lie over several cells, in channels of any layout."""
    a = torch.randn(2, 3, 5, height, height)
    b = torch.randn(2, height, height, 5).movedim(-1, 1)
    with ops.use_backend(backend):
        found = in_cells(ops.mse, a, b, grid)
    pixels = (a - b[:, None]).square().mean(2)  # [B,G,H,W]
    fine = pixels.repeat_interleave(grid, -1).repeat_interleave(grid, -2)  # each cell is height² of these
    expected = torch.stack(
        [
            fine[..., y * height : (y + 1) * height, x * height : (x + 1) * height].mean((-2, -1))
            for y in range(grid)
            for x in range(grid)
        ],
        dim=-1,
    )
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.mean(-1), pixels.mean((-2, -1)))


def test_of_another_token_only_the_pixels_around_it_are_worth_less(tiny_models: Models, tiny_batch: ImageBatch) -> None:
    own = tiny_models.codec.encode(tiny_batch.images)
    tokens = own[:, None].repeat(1, 2, 1)
    tokens[:, 1, 27] = (tokens[:, 1, 27] + 100) % 512  # row 3, column 3
    mse = tiny_models.reward.score(tokens, tiny_batch.images, by_token=True).mse
    change = (mse[:, 1] - mse[:, 0]).abs().unflatten(-1, (8, 8)).mean(0)
    assert change.argmax() == 27
    assert change[2:5, 2:5].sum() > 0.5 * change.sum()


# ---- advantages


@pytest.mark.parametrize("window", [1, 3, 5, 7])
def test_neighbourhoods_are_cut_off_at_the_border(window: int) -> None:
    rewards = torch.randn(2, 3, 49)
    found = neighbourhood_means(rewards, window)
    maps, reach = rewards.view(2, 3, 7, 7), window // 2
    for t in range(49):
        rows, columns = (slice(max(at - reach, 0), at + reach + 1) for at in divmod(t, 7))
        torch.testing.assert_close(found[..., t], maps[..., rows, columns].mean((-2, -1)))
    if window == 1:
        assert torch.equal(found, rewards)


@pytest.mark.parametrize("control", CONTROLS)
def test_advantages_of_tokens(tiny_config: Make, control: str | None) -> None:
    """Centred in the group at each position; a step's images share one scale each, random ones and others' alike."""
    config = tiny_config(control=control, credit_window=3)
    rewards, ids = torch.randn(4, 4, 64), torch.tensor([2, 0, 3, 1])
    found = advantages_of({"reward": rewards}, config, SEED, ids)
    drawn = normal_rewards(SEED, ids, 4, 64) if control == "random" else rewards
    expected = ops.group_advantages(neighbourhood_means(drawn, 3))
    if control == "shuffled":
        expected = expected[ids.argsort()][others(SEED, 4, torch.device("cpu"))[ids]]
    assert torch.equal(found, expected)
    torch.testing.assert_close(found.mean(1), torch.zeros(4, 64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.var(1).mean(-1), torch.ones(4), rtol=1e-3, atol=0)
    alike = {"reward": rewards[:, :1].expand(4, 4, 64)}
    assert not advantages_of(alike, tiny_config(credit_window=3), SEED, ids).any()


def test_random_rewards_of_tokens_are_normal_and_independent() -> None:
    drawn = torch.stack([normal_rewards(seed, torch.tensor([0, 5]), 3, 4) for seed in range(1024)])
    assert (drawn.shape, drawn.dtype) == ((1024, 2, 3, 4), torch.float32)
    assert torch.equal(drawn[:8, 1:], torch.stack([normal_rewards(seed, torch.tensor([5]), 3, 4) for seed in range(8)]))
    assert torch.equal(drawn[0, ..., 0], normal_rewards(0, torch.tensor([0, 5]), 3))  # the one draw of a rollout
    values = drawn.flatten(1).double()
    ranks = torch.special.ndtr(values.flatten()).sort().values
    uniform = (torch.arange(len(ranks)) + 0.5) / len(ranks)
    assert (ranks - uniform).abs().max() < 1.95 / len(ranks) ** 0.5  # Kolmogorov–Smirnov at 0.1 %
    assert (torch.corrcoef(values.T) - torch.eye(24)).abs().max() < 5 / 1024**0.5


def test_the_gradient_points_where_the_image_s_does_with_less_noise() -> None:
    """Where a token's reward depends on that token alone: 25 positions of unequal weight, 8 000 groups of 4.

    The policy's gradient is known: −π (r − E r) at each position, up to its scale.
    """
    torch.manual_seed(3)
    groups, size, length, vocab = 8000, 4, 25, 5
    logits, table = torch.randn(length, vocab), torch.randn(length, vocab) * torch.linspace(0.2, 2.0, length)[:, None]
    probabilities = logits.softmax(-1)
    direction = -(probabilities * (table - (probabilities * table).sum(-1, keepdim=True))).flatten()
    tokens = torch.multinomial(probabilities, groups * size, replacement=True).T.view(groups, size, length)
    rewards = table[torch.arange(length), tokens]

    def gradients(advantages: Tensor) -> Tensor:
        """Of each group by itself, `[groups, T·V]`."""
        hidden = logits.repeat(groups, 1, 1).requires_grad_()
        loss = ops.policy_loss(hidden, torch.eye(vocab), tokens, advantages, tokens[:, 0], prior_weight=0.0).loss
        return torch.autograd.grad(groups * loss, hidden)[0].flatten(1)

    noise = {}
    for name, values in (("image", rewards.mean(-1)), ("token", rewards)):
        each = gradients(ops.group_advantages(values))
        mean = each.mean(0)
        noise[name] = float(each.var(0).sum() / mean.square().sum())
        assert torch.cosine_similarity(mean, direction, dim=0) > (0.999 if name == "token" else 0.99), name
    assert noise["token"] < noise["image"] / 10


# ---- steps


def test_a_step_s_rollouts_are_those_of_whole_images(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the advantages is the same; these are the neighbourhoods' of the rewards that are reported."""
    (whole, theirs), (by_token, mine) = (
        learned(tiny_models, tiny_config(credit_window=window, micro_batch=2), tiny_batch, monkeypatch)
        for window in (None, 3)
    )
    assert torch.equal(by_token.rollouts, whole.rollouts)
    torch.testing.assert_close(by_token.rewards.mean(-1), whole.rewards, rtol=1e-5, atol=0)
    torch.testing.assert_close(by_token.means[1:], whole.means[1:], rtol=1e-5, atol=0)
    assert not by_token.bad.any()
    for name, value in theirs.items():
        if name != "advantages":
            assert torch.equal(mine[name], value) if isinstance(value, Tensor) else mine[name] == value, name
    assert torch.equal(mine["advantages"], ops.group_advantages(neighbourhood_means(by_token.rewards, 3)))
    scored = tiny_models.reward.score(whole.rollouts, tiny_batch.images, by_token=True)
    torch.testing.assert_close(by_token.rewards, scored.total, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("control", CONTROLS)
def test_credit_does_not_depend_on_micro_batches(
    tiny_config: Make,
    tiny_models: Models,
    tiny_batch: ImageBatch,
    monkeypatch: pytest.MonkeyPatch,
    control: str | None,
) -> None:
    advantages, gradients = [], []
    for micro_batch in (4, 1, 3):
        config = tiny_config(control=control, credit_window=3, micro_batch=micro_batch)
        advantages.append(learned(tiny_models, config, tiny_batch, monkeypatch)[1]["advantages"])
        gradients.append(torch.cat([p.grad.flatten().double() for p in tiny_models.generator.parameters()]))
    assert advantages[0].shape == (4, 4, 64)
    for found, gradient in zip(advantages[1:], gradients[1:], strict=True):
        torch.testing.assert_close(found, advantages[0], rtol=0, atol=0 if control == "random" else 1e-4)
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_a_value_that_is_not_finite_names_its_image(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tiny_batch.images.clone()
    images[2, 0, 5, 6] = math.inf
    encode = tiny_models.codec.encode
    monkeypatch.setattr(tiny_models.codec, "encode", lambda given: encode(given.nan_to_num(posinf=1.0)))
    spoilt = tiny_batch._replace(images=images)
    bad = learned(tiny_models, tiny_config(credit_window=3), spoilt, monkeypatch)[0].bad
    assert bad[1].tolist() == [False, False, True, False]  # the reward


def test_a_judged_step_is_taken_apart_by_images(tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch) -> None:
    config = tiny_config(control="shuffled", credit_window=3, micro_batch=2)
    tokens = tiny_models.codec.encode(tiny_batch.images)
    judged = judge_step(tiny_models, config, tiny_batch, tokens, SEED, nullcontext)
    part = judged.take(slice(1, 3))
    assert torch.equal(part.advantages, judged.advantages[1:3])
    assert {name: tuple(values.shape) for name, values in part.rewards.items()} == dict.fromkeys(
        ("reward", "mse", "lpips"), (2, 4, 64)
    )


@pytest.mark.usefixtures("image_sets")
def test_a_run_by_token(tiny_config: Make, tmp_path: Path) -> None:
    whole = vapi_fast.align(tiny_config(output_dir=tmp_path / "whole"))
    record = vapi_fast.align(tiny_config(output_dir=tmp_path / "token", credit_window=3))
    assert json.loads((tmp_path / "token" / "run.json").read_text())["config"]["credit_window"] == 3
    assert record["reward"][0] == pytest.approx(whole["reward"][0], rel=1e-5)
    assert record["curves"]["cross_entropy"][0] == whole["curves"]["cross_entropy"][0]
    assert record["reward"][1] != pytest.approx(whole["reward"][1], rel=1e-5)
    assert all(map(math.isfinite, record["curves"]["gradient_norm"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"credit_window": 0}, "--credit-window must be at least 1, got 0"),
        ({"credit_window": 4}, "--credit-window must be odd, with the token in the middle, got 4"),
        ({"credit_window": 9}, "--credit-window must be at most 8, the tokens of a side, got 9"),
        ({"credit_window": 3, "method": "ste"}, "--credit-window needs --method vapi: --method ste has no advantages"),
        ({"credit_window": 3, "method": "ntp"}, "--credit-window needs --method vapi: --method ntp has no advantages"),
        (
            {"credit_window": 3, "reward": "math:sqrt"},
            "--credit-window goes without --reward: what it gives an image has no part for a token",
        ),
        (
            {"credit_window": 3, "rollouts": "free"},
            "--credit-window needs --rollouts teacher-forced: a free token decides all after it too",
        ),
        (
            {"credit_window": 3, "lpips": "vgg16", "image_size": 40},
            "--credit-window needs an --image-size that is a multiple of 16, as a pixel of VGG16's last map has to lie "
            "over whole tokens, got 40",
        ),
    ],
)
def test_what_has_no_credit_by_token(tiny_config: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny_config(**changes)
    assert str(refused.value) == message


def test_windows_up_to_the_grid_are_taken(tiny_config: Make) -> None:
    assert tiny_config().credit_window is None
    assert [tiny_config(credit_window=window).credit_window for window in (1, 7)] == [1, 7]


def test_the_published_recipe_judges_whole_images(tiny_config: Make) -> None:
    with pytest.raises(ConfigError, match="--path reference goes without --credit-window"):
        PublishedRecipe().check(tiny_config(credit_window=3))
