"""The objectives: values against PAPER's formulas written as loops or by F.cross_entropy, gradients by gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor, nn
from torch.nn import functional as F

from vapi_fast import ops


def policy_inputs(
    batch: int = 2, group: int = 3, length: int = 5, vocab: int = 17, width: int = 4
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = {"dtype": torch.float64, "generator": generator}
    inputs = {
        "hidden": torch.randn(batch, length, width, **draw),
        "weight": torch.randn(vocab, width, **draw),
        "tokens": torch.randint(0, vocab, (batch, group, length), generator=generator),
        "advantages": torch.randn(batch, group, **draw),
        "targets": torch.randint(0, vocab, (batch, length), generator=generator),
    }
    logprobs = (inputs["hidden"] @ inputs["weight"].T).log_softmax(-1)
    own = logprobs.gather(-1, inputs["tokens"].transpose(1, 2)).transpose(1, 2)
    inputs["old_logprobs"] = own + 0.3 * torch.randn(own.shape, **draw)
    inputs["base_logprobs"] = own + 0.3 * torch.randn(own.shape, **draw)
    return inputs


def naive_policy_loss(
    inputs: dict[str, Tensor], clip_range: float, prior_weight: float, kl_weight: float, temperature: float
) -> list[float]:
    logits = inputs["hidden"] @ inputs["weight"].T
    batch, group, length = inputs["tokens"].shape
    policy, kl, prior, ratios = [], [], [], []
    for b in range(batch):
        for t in range(length):
            row = [math.exp(x) for x in logits[b, t].tolist()]
            prior.append(-math.log(row[inputs["targets"][b, t]] / sum(row)))
            row = [math.exp(x / temperature) for x in logits[b, t].tolist()]
            for g in range(group):
                new = math.log(row[inputs["tokens"][b, g, t]] / sum(row))
                ratio = math.exp(new - float(inputs["old_logprobs"][b, g, t]))
                advantage = float(inputs["advantages"][b, g])
                clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
                policy.append(max(-advantage * ratio, -advantage * clipped))
                d = float(inputs["base_logprobs"][b, g, t]) - new
                kl.append(math.exp(d) - d - 1)
                ratios.append(ratio)
    mean = [sum(x) / len(x) for x in (policy, prior, kl, ratios)]
    outside = sum(abs(ratio - 1) > clip_range for ratio in ratios) / len(ratios)
    return [mean[0] + prior_weight * mean[1] + kl_weight * mean[2], *mean, outside]


@pytest.mark.parametrize(
    "sizes", [{}, {"group": 1}, {"length": 1}, {"batch": 1, "length": 63, "vocab": 65}, {"length": 65, "width": 1}]
)
@pytest.mark.parametrize(
    ("clip_range", "prior_weight", "kl_weight", "temperature"),
    [(0.2, 0.1, 0.0, 1.0), (0.1, 0.0, 0.3, 1.0), (0.3, 1.5, 0.2, 0.7), (0.0, 0.1, 0.0, 2.0)],
)
def test_policy_loss_against_loops(
    sizes: dict[str, int], clip_range: float, prior_weight: float, kl_weight: float, temperature: float
) -> None:
    inputs = policy_inputs(**sizes)
    options = {
        "clip_range": clip_range,
        "prior_weight": prior_weight,
        "kl_weight": kl_weight,
        "temperature": temperature,
    }
    terms = torch.stack(ops.policy_loss(**inputs, **options))
    assert terms.tolist() == pytest.approx(naive_policy_loss(inputs, **options), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize(("prior_weight", "kl_weight"), [(0.1, 0.0), (0.0, 0.4), (0.3, 0.4), (0.0, 0.0)])
def test_policy_loss_gradients(prior_weight: float, kl_weight: float, temperature: float) -> None:
    inputs = policy_inputs()
    hidden, weight = (inputs.pop(name).requires_grad_() for name in ("hidden", "weight"))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return ops.policy_loss(
            hidden, weight, **inputs, prior_weight=prior_weight, kl_weight=kl_weight, temperature=temperature
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_on_policy_ratio_is_one_in_value_and_keeps_its_gradient() -> None:
    inputs = policy_inputs()
    del inputs["old_logprobs"], inputs["base_logprobs"]
    hidden = inputs["hidden"].requires_grad_()
    terms = ops.policy_loss(**inputs, prior_weight=0.0)
    assert (terms.ratio, terms.clip_fraction, terms.kl) == (1, 0, 0)
    torch.testing.assert_close(terms.policy, -inputs["advantages"].mean())
    # ∇ρ = ∇log π at ρ = 1: the loss has REINFORCE's gradient.
    logprobs = (hidden @ inputs["weight"].T).log_softmax(-1).gather(-1, inputs["tokens"].transpose(1, 2))
    reinforce = -(inputs["advantages"][:, None] * logprobs).mean()
    expected = torch.autograd.grad(reinforce, hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(terms.loss, hidden)[0], expected)
    assert expected.norm() > 1e-3


def test_clipping_stops_the_gradient_where_it_would_go_too_far() -> None:
    inputs = policy_inputs(batch=1, group=1, length=1)
    hidden = inputs["hidden"].requires_grad_()
    own = (hidden @ inputs["weight"].T).log_softmax(-1)[0, 0, inputs["tokens"].item()].detach()
    for advantage, shift, clipped in [(1.0, 0.5, True), (1.0, -0.5, False), (-1.0, 0.5, False), (-1.0, -0.5, True)]:
        inputs["advantages"] = torch.full((1, 1), advantage, dtype=torch.float64)
        inputs["old_logprobs"] = (own - shift).reshape(1, 1, 1)
        terms = ops.policy_loss(**inputs, prior_weight=0.0)
        gradient = torch.autograd.grad(terms.loss, hidden)[0]
        assert terms.clip_fraction == 1
        assert (gradient.norm() == 0) == clipped


def test_only_the_loss_carries_a_gradient() -> None:
    inputs = policy_inputs()
    inputs["advantages"].requires_grad_()
    inputs["old_logprobs"].requires_grad_()
    inputs["hidden"].requires_grad_()
    terms = ops.policy_loss(**inputs, prior_weight=0.0)
    assert [term.requires_grad for term in terms] == [True, False, False, False, False, False]
    terms.loss.backward()
    assert inputs["advantages"].grad is None
    assert inputs["old_logprobs"].grad is None
    assert terms.prior > 0  # reported, though it weighs nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_policy_loss_accuracy(dtype: torch.dtype, autocast: bool) -> None:
    inputs = policy_inputs(batch=3, length=63, vocab=65, width=24)
    hidden, weight = inputs.pop("hidden"), inputs.pop("weight") / 24**0.5
    del inputs["old_logprobs"], inputs["base_logprobs"]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ops.policy_loss(hidden, weight, **inputs).loss

    assert_accurate(loss, [hidden, weight], dtype)


def test_policy_loss_takes_bfloat16_hidden_with_a_float32_head_and_strided_inputs() -> None:
    inputs = policy_inputs()
    hidden, weight = inputs.pop("hidden"), inputs.pop("weight").float()
    low = hidden.bfloat16()
    strided = torch.empty(5, 2, 4, dtype=torch.bfloat16).transpose(0, 1).copy_(low)
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    inputs["tokens"] = inputs["tokens"].transpose(1, 2).contiguous().transpose(1, 2)
    expected = ops.policy_loss(low.float(), weight, **inputs)
    torch.testing.assert_close(ops.policy_loss(strided, weight, **inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["hidden", "advantages", "old_logprobs"])
def test_policy_loss_of_nan_is_nan(name: str) -> None:
    inputs = policy_inputs()
    inputs[name][0, 0] = math.nan
    assert ops.policy_loss(**inputs).loss.isnan()


def test_extreme_logits_stay_finite() -> None:
    inputs = policy_inputs()
    del inputs["old_logprobs"], inputs["base_logprobs"]
    inputs["hidden"] = (inputs["hidden"] * 1e4).float().requires_grad_()
    inputs["weight"] = inputs["weight"].float()
    terms = ops.policy_loss(**inputs)
    assert terms.loss.isfinite()
    assert torch.autograd.grad(terms.loss, inputs["hidden"])[0].isfinite().all()


@pytest.mark.parametrize("group", [2, 3, 8])
def test_group_advantages_against_torch_std(group: int) -> None:
    rewards = torch.randn(7, group, dtype=torch.float64)
    expected = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-8)
    torch.testing.assert_close(ops.group_advantages(rewards), expected)
    torch.testing.assert_close(ops.group_advantages(rewards.float()), expected.float(), rtol=1e-5, atol=1e-5)


def test_group_advantages_are_clipped_on_both_sides() -> None:
    rewards = torch.zeros(2, 64)
    rewards[0, 0], rewards[1, 0] = 1.0, -1.0  # (1 − 1/64) / (1/8) = 7.875 standard deviations away
    assert ops.group_advantages(rewards)[:, 0].tolist() == [5.0, -5.0]
    torch.testing.assert_close(ops.group_advantages(rewards, clip=10.0)[:, 0], torch.tensor([7.875, -7.875]))


def test_group_advantages_of_equal_rewards_and_of_one_rollout_are_zero() -> None:
    equal = torch.linspace(-3, -0.1, 50)[:, None].expand(50, 7)
    assert ops.group_advantages(equal).abs().max() < 1e-5
    assert ops.group_advantages(torch.randn(4, 1)).tolist() == [[0.0]] * 4


@pytest.mark.parametrize("group", [1, 4])
def test_a_nan_reward_spoils_its_group_alone(group: int) -> None:
    rewards = torch.randn(3, group)
    rewards[1, 0] = math.nan
    assert ops.group_advantages(rewards).isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("length", [1, 63, 65])
def test_linear_cross_entropy(length: int) -> None:
    hidden = torch.randn(2, length, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(33, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 33, (2, length))
    loss = ops.linear_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy((hidden @ weight.T).transpose(1, 2), targets)
    torch.testing.assert_close(loss, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_cross_entropy_accuracy(dtype: torch.dtype) -> None:
    targets = torch.randint(0, 65, (3, 63))
    inputs = [torch.randn(3, 63, 24), torch.randn(65, 24) / 24**0.5]
    assert_accurate(lambda hidden, weight: ops.linear_cross_entropy(hidden, weight, targets), inputs, dtype)


class Recorder(nn.Module):
    """A model whose hidden state at t is the sum of the inputs before t, so that the prefix can be read from it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, dtype=torch.float64)
        self.condition = nn.Embedding(3, 6, dtype=torch.float64)
        self.output = nn.Linear(6, 11, bias=False, dtype=torch.float64)

    def forward(self, tokens: Tensor, condition: Tensor, *, return_hidden: bool = False) -> Tensor:
        inputs = torch.cat([self.condition(condition)[:, None], self.embedding(tokens)], dim=1)
        hidden = inputs.cumsum(1)
        return hidden if return_hidden else self.output(hidden)


@pytest.mark.parametrize("length", [1, 9])
def test_noisy_prefix_cross_entropy(length: int) -> None:
    model, tokens, condition = Recorder(), torch.randint(0, 11, (4, length)), torch.tensor([0, 2, 1, 0])
    ids = torch.tensor([5, 1, 8, 2])
    loss = ops.noisy_prefix_cross_entropy(model, tokens, condition, noise_prob=0.5, seed=3, sample_ids=ids)
    prefix = ops.noisy_prefix(tokens, 0.5, 11, seed=3, sample_ids=ids)
    expected = F.cross_entropy(model(prefix, condition).transpose(1, 2), tokens)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters()) if length > 1 else [model.condition.weight, model.output.weight]
    for gradient, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, r"advantages must be floating \[B, G\] with B=2, G=3, got float64 \[3, 2\]", {"advantages": "t"}),
        (ValueError, r"tokens must be int64 \[B, G, T\] with B=2, T=5, got int64 \[2, 5, 3\]", {"tokens": "t"}),
        (TypeError, r"targets must be int64 \[B, T\], got float64 \[2, 5\]", {"targets": "double"}),
        (ValueError, r"tokens must be in \[0, 17\), got 20", {"tokens": 20}),
        (ValueError, r"targets must be in \[0, 17\), got -1", {"targets": -1}),
        (ValueError, r"base_logprobs .* kl_weight=0.5 > 0, got None", {"base_logprobs": None, "kl_weight": 0.5}),
        (ValueError, r"kl_weight must be finite and not negative", {"kl_weight": -1.0}),
        (ValueError, r"clip_range must be finite and not negative, got -0.1", {"clip_range": -0.1}),
        (ValueError, r"prior_weight must be finite and not negative, got inf", {"prior_weight": float("inf")}),
        (ValueError, r"weight must have V > 0, got V=0", {"weight": torch.zeros(0, 4)}),
        (ValueError, r"weight must have V <= 65536, got V=65537", {"weight": torch.zeros(65537, 4)}),
        (TypeError, r"prior_weight must be a number, got NoneType", {"prior_weight": None}),
        (ValueError, r"temperature must be positive", {"temperature": 0.0}),
        (ValueError, r"hidden must have T > 0, got T=0", {"hidden": torch.zeros(2, 0, 4)}),
    ],
)
def test_bad_policy_arguments(error: type[Exception], message: str, changes: dict[str, object]) -> None:
    inputs = policy_inputs()
    for name, change in changes.items():
        if change == "t":
            inputs[name] = inputs[name].transpose(-1, -2)
        elif change == "double":
            inputs[name] = inputs[name].double()
        elif isinstance(change, int):
            inputs[name][0, 0] = change
        else:
            inputs[name] = change
    with pytest.raises(error, match=f"^policy_loss: {message}"):
        ops.policy_loss(**inputs)


def test_bad_arguments_of_the_other_losses() -> None:
    with pytest.raises(TypeError, match=r"group_advantages: rewards must be floating \[B, G\], got int64 \[2, 3\]"):
        ops.group_advantages(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="rewards must have G > 0"):
        ops.group_advantages(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="linear_cross_entropy: hidden must have B > 0"):
        ops.linear_cross_entropy(torch.zeros(0, 3, 4), torch.zeros(5, 4), torch.zeros(0, 3).long())
    with pytest.raises(ValueError, match=r"linear_cross_entropy: targets must be in \[0, 5\), got 5"):
        ops.linear_cross_entropy(torch.zeros(1, 1, 4), torch.zeros(5, 4), torch.tensor([[5]]))
