"""The objectives: values against the formulas written as loops, gradients by gradcheck, Triton against float64."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import RELATIVE_L2, assert_accurate, relative_l2
from fused import DEVICE, DTYPES, assert_fused_accurate, strided
from head_losses import anchors, assert_policy_loss_accurate, gradients, policy_inputs, policy_loss
from torch import Tensor, nn
from torch.nn import functional as F

from vapi_fast import ops
from vapi_fast.kernels.launch import recorded


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The interpreter truncates to bfloat16, at up to 0.8 % an element: of few elements, not any draw is accurate."""
    torch.manual_seed(0)


# ---- the formulas


def exact_inputs(
    batch: int = 2, group: int = 3, length: int = 5, vocab: int = 17, width: int = 4, *, by_token: bool = False
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = {"dtype": torch.float64, "generator": generator}
    inputs = {
        "hidden": torch.randn(batch, length, width, **draw),
        "weight": torch.randn(vocab, width, **draw),
        "bias": torch.randn(vocab, **draw),
        "tokens": torch.randint(0, vocab, (batch, group, length), generator=generator),
        "advantages": torch.randn(batch, group, *[length][: int(by_token)], **draw),
        "targets": torch.randint(0, vocab, (batch, length), generator=generator),
    }
    logprobs = logits_of(inputs).log_softmax(-1)
    own = logprobs.gather(-1, inputs["tokens"].transpose(1, 2)).transpose(1, 2)
    inputs["old_logprobs"] = own + 0.3 * torch.randn(own.shape, **draw)
    inputs["base_logprobs"] = own + 0.3 * torch.randn(own.shape, **draw)
    return inputs


def logits_of(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["hidden"] @ inputs["weight"].T + inputs["bias"]


def naive_policy_loss(
    inputs: dict[str, Tensor], clip_range: float, prior_weight: float, kl_weight: float, temperature: float
) -> list[float]:
    logits = logits_of(inputs)
    batch, group, length = inputs["tokens"].shape
    advantages = inputs["advantages"].view(batch, group, -1).expand(batch, group, length)
    policy, kl, prior, ratios = [], [], [], []
    for b in range(batch):
        for t in range(length):
            row = [math.exp(x) for x in logits[b, t].tolist()]
            prior.append(-math.log(row[inputs["targets"][b, t]] / sum(row)))
            row = [math.exp(x / temperature) for x in logits[b, t].tolist()]
            for g in range(group):
                new = math.log(row[inputs["tokens"][b, g, t]] / sum(row))
                ratio = math.exp(new - float(inputs["old_logprobs"][b, g, t]))
                advantage = float(advantages[b, g, t])
                clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
                policy.append(max(-advantage * ratio, -advantage * clipped))
                d = float(inputs["base_logprobs"][b, g, t]) - new
                kl.append(math.exp(d) - d - 1)
                ratios.append(ratio)
    mean = [sum(x) / len(x) for x in (policy, prior, kl, ratios)]
    outside = sum(abs(ratio - 1) > clip_range for ratio in ratios) / len(ratios)
    return [mean[0] + prior_weight * mean[1] + kl_weight * mean[2], *mean, outside]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"group": 1},
        {"length": 1},
        {"batch": 1, "length": 63, "vocab": 65},
        {"length": 65, "width": 1},
        {"by_token": True},
        {"by_token": True, "group": 1},
        {"by_token": True, "length": 63, "width": 1},
    ],
)
@pytest.mark.parametrize(
    ("clip_range", "prior_weight", "kl_weight", "temperature"),
    [(0.2, 0.1, 0.0, 1.0), (0.1, 0.0, 0.3, 1.0), (0.3, 1.5, 0.2, 0.7), (0.0, 0.1, 0.0, 2.0)],
)
def test_policy_loss_against_loops(
    sizes: dict[str, int], clip_range: float, prior_weight: float, kl_weight: float, temperature: float
) -> None:
    inputs = exact_inputs(**sizes)
    options = {
        "clip_range": clip_range,
        "prior_weight": prior_weight,
        "kl_weight": kl_weight,
        "temperature": temperature,
    }
    terms = torch.stack(ops.policy_loss(**inputs, **options))
    assert terms.tolist() == pytest.approx(naive_policy_loss(inputs, **options), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize(("prior_weight", "kl_weight"), [(0.1, 0.0), (0.0, 0.4), (0.3, 0.4), (0.0, 0.0)])
def test_policy_loss_gradients(prior_weight: float, kl_weight: float, temperature: float, by_token: bool) -> None:
    inputs = exact_inputs(by_token=by_token)
    head = [inputs.pop(name).requires_grad_() for name in ("hidden", "weight", "bias")]
    options = inputs | {"prior_weight": prior_weight, "kl_weight": kl_weight, "temperature": temperature}
    assert torch.autograd.gradcheck(lambda *head: policy_loss(*head, **options).loss, head)


def test_on_policy_ratio_is_one_in_value_and_keeps_its_gradient() -> None:
    inputs = exact_inputs()
    del inputs["old_logprobs"], inputs["base_logprobs"]
    hidden = inputs["hidden"].requires_grad_()
    terms = ops.policy_loss(**inputs, prior_weight=0.0)
    assert (terms.ratio, terms.clip_fraction, terms.kl) == (1, 0, 0)
    torch.testing.assert_close(terms.policy, -inputs["advantages"].mean())
    # ∇ρ = ∇log π at ρ = 1: the loss has REINFORCE's gradient.
    logprobs = logits_of(inputs).log_softmax(-1).gather(-1, inputs["tokens"].transpose(1, 2))
    reinforce = -(inputs["advantages"][:, None] * logprobs).mean()
    expected = torch.autograd.grad(reinforce, hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(terms.loss, hidden)[0], expected)
    assert expected.norm() > 1e-3


def test_clipping_stops_the_gradient_where_it_would_go_too_far() -> None:
    inputs = exact_inputs(batch=1, group=1, length=1)
    hidden = inputs["hidden"].requires_grad_()
    own = logits_of(inputs).log_softmax(-1)[0, 0, inputs["tokens"].item()].detach()
    for advantage, shift, clipped in [(1.0, 0.5, True), (1.0, -0.5, False), (-1.0, 0.5, False), (-1.0, -0.5, True)]:
        inputs["advantages"] = torch.full((1, 1), advantage, dtype=torch.float64)
        inputs["old_logprobs"] = (own - shift).reshape(1, 1, 1)
        terms = ops.policy_loss(**inputs, prior_weight=0.0)
        gradient = torch.autograd.grad(terms.loss, hidden)[0]
        assert terms.clip_fraction == 1
        assert (gradient.norm() == 0) == clipped


def test_only_the_loss_carries_a_gradient() -> None:
    inputs = exact_inputs()
    inputs["advantages"].requires_grad_()
    inputs["old_logprobs"].requires_grad_()
    inputs["hidden"].requires_grad_()
    terms = ops.policy_loss(**inputs, prior_weight=0.0)
    assert [term.requires_grad for term in terms] == [True, False, False, False, False, False]
    terms.loss.backward()
    assert inputs["advantages"].grad is None
    assert inputs["old_logprobs"].grad is None
    assert terms.prior > 0  # reported, though it weighs nothing


def test_extreme_logits_stay_finite() -> None:
    inputs = exact_inputs()
    del inputs["old_logprobs"], inputs["base_logprobs"]
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    inputs["hidden"] = (inputs["hidden"] * 1e4).requires_grad_()
    terms = ops.policy_loss(**inputs)
    assert terms.loss.isfinite()
    assert torch.autograd.grad(terms.loss, inputs["hidden"])[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("operation", [ops.policy_loss, ops.linear_cross_entropy])
def test_accuracy_of_the_reference(operation: object, dtype: torch.dtype, autocast: bool) -> None:
    inputs = exact_inputs(batch=3, length=63, vocab=65, width=24)
    hidden, weight, bias = inputs.pop("hidden"), inputs.pop("weight") / 24**0.5, inputs.pop("bias")
    del inputs["old_logprobs"], inputs["base_logprobs"]
    if operation is ops.linear_cross_entropy:
        inputs = {"targets": inputs["targets"]}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            terms = operation(hidden, weight, bias=bias, **inputs)
        return terms if isinstance(terms, Tensor) else terms.loss

    assert_accurate(loss, [hidden, weight, bias], dtype)


@pytest.mark.parametrize("group", [2, 3, 8])
def test_group_advantages_against_torch_std(group: int) -> None:
    rewards = torch.randn(7, group, dtype=torch.float64)
    expected = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-8)
    torch.testing.assert_close(ops.group_advantages(rewards), expected)
    torch.testing.assert_close(ops.group_advantages(rewards.float()), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [2, 3, 8])
def test_advantages_of_tokens_share_the_scale_of_their_image(group: int) -> None:
    """At positions where the rollouts differ a hundredth as much, advantages are a hundredth too."""
    rewards = torch.randn(7, group, 10, dtype=torch.float64)
    rewards[..., 5:] /= 100
    scale = rewards.var(1).mean(-1).sqrt()[:, None, None]
    expected = (rewards - rewards.mean(1, keepdim=True)) / (scale + 1e-8)
    found = ops.group_advantages(rewards, clip=100.0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.var(1).mean(-1), torch.ones(7, dtype=torch.float64), rtol=1e-6, atol=0)
    assert found[..., 5:].abs().max() < 0.1
    torch.testing.assert_close(ops.group_advantages(rewards), expected.clamp(-5, 5))
    single = ops.group_advantages(rewards.float().transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(single, expected.clamp(-5, 5).float(), rtol=1e-5, atol=1e-5)
    alone = rewards[..., :1].float()
    assert torch.equal(ops.group_advantages(alone), ops.group_advantages(alone[..., 0])[..., None])


def test_group_advantages_are_clipped_on_both_sides() -> None:
    rewards = torch.zeros(2, 64)
    rewards[0, 0], rewards[1, 0] = 1.0, -1.0  # (1 − 1/64) / (1/8) = 7.875 standard deviations away
    assert ops.group_advantages(rewards)[:, 0].tolist() == [5.0, -5.0]
    torch.testing.assert_close(ops.group_advantages(rewards, clip=10.0)[:, 0], torch.tensor([7.875, -7.875]))


def test_group_advantages_of_equal_rewards_and_of_one_rollout_are_zero() -> None:
    equal = torch.linspace(-3, -0.1, 50)[:, None].expand(50, 7)
    assert ops.group_advantages(equal).abs().max() < 1e-5
    assert ops.group_advantages(torch.randn(4, 1)).tolist() == [[0.0]] * 4
    assert not ops.group_advantages(equal[:, :, None] * torch.linspace(0.1, 3, 64)).any()
    assert not ops.group_advantages(torch.randn(4, 1, 9)).any()


@pytest.mark.parametrize("group", [1, 4])
def test_a_nan_reward_spoils_its_group_alone(group: int) -> None:
    rewards = torch.randn(3, group)
    rewards[1, 0] = math.nan
    assert ops.group_advantages(rewards).isnan().any(-1).tolist() == [False, True, False]
    of_tokens = torch.randn(3, group, 5)
    of_tokens[1, 0, 2] = math.nan
    assert ops.group_advantages(of_tokens).isnan().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("length", [1, 63, 65])
def test_cross_entropy_is_that_of_the_logits(length: int, biased: bool) -> None:
    shapes = ((2, length, 5), (33, 5), (33,))[: 2 + biased]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    targets = torch.randint(0, 33, (2, length))
    loss = ops.linear_cross_entropy(*leaves[:2], targets, bias=leaves[2] if biased else None)
    expected = F.cross_entropy(F.linear(*leaves).transpose(1, 2), targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, r"advantages must be floating \[B, G\] with B=2, G=3, got float64 \[3, 2\]", {"advantages": "t"}),
        (
            ValueError,
            r"advantages must be floating \[B, G, T\] with B=2, G=3, T=5, got float64 \[2, 3, 4\]",
            {"advantages": torch.zeros(2, 3, 4).double()},
        ),
        (ValueError, r"advantages must be .* got float32 \[2, 3, 5, 1\]", {"advantages": torch.zeros(2, 3, 5, 1)}),
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
        (ValueError, r"bias must be floating \[V\] with V=17, got float64 \[16\]", {"bias": torch.zeros(16).double()}),
        (TypeError, r"bias must be floating \[V\], got int64 \[17\]", {"bias": torch.zeros(17).long()}),
        (ValueError, r"bias must be on hidden's device cpu, got meta", {"bias": torch.zeros(17, device="meta")}),
    ],
)
def test_bad_policy_arguments(error: type[Exception], message: str, changes: dict[str, object]) -> None:
    inputs = exact_inputs()
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
    with pytest.raises(ValueError, match="rewards must have G > 0"):
        ops.group_advantages(torch.zeros(2, 0, 4))
    with pytest.raises(ValueError, match="linear_cross_entropy: hidden must have B > 0"):
        ops.linear_cross_entropy(torch.zeros(0, 3, 4), torch.zeros(5, 4), torch.zeros(0, 3).long())
    with pytest.raises(
        ValueError, match=r"linear_cross_entropy: bias must be floating \[V\] with V=5, got float32 \[\]"
    ):
        ops.linear_cross_entropy(
            torch.zeros(1, 1, 4), torch.zeros(5, 4), torch.zeros(1, 1).long(), bias=torch.zeros(())
        )
    with pytest.raises(ValueError, match=r"linear_cross_entropy: targets must be in \[0, 5\), got 5"):
        ops.linear_cross_entropy(torch.zeros(1, 1, 4), torch.zeros(5, 4), torch.tensor([[5]]))


# ---- on Triton, against float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "anchored"),
    [
        ({}, False),
        ({"group": 1}, True),
        ({"group": 16, "width": 100}, True),
        ({"batch": 1, "length": 63, "width": 7}, False),
        ({"batch": 1, "length": 65, "vocab": 128}, False),
        ({"batch": 1, "length": 3, "vocab": 1000}, True),
        ({"batch": 1, "length": 2, "vocab": 16384, "width": 8}, True),
        ({"batch": 1, "length": 2, "vocab": 20001, "width": 8}, True),  # a row in three blocks
        ({"by_token": True}, True),
        ({"by_token": True, "group": 1, "batch": 1, "length": 63, "width": 7}, False),
        ({"by_token": True, "group": 9, "length": 1}, True),
    ],
)
def test_policy_loss(sizes: dict[str, int], anchored: bool, dtype: torch.dtype) -> None:
    inputs, options = policy_inputs(**sizes)
    if anchored:
        options |= anchors(inputs, options["tokens"])
    assert_policy_loss_accurate(inputs, options, dtype)


def test_one_advantage_for_a_rollout_is_the_same_for_each_of_its_tokens(backend: str) -> None:
    """Bit for bit on Triton, terms and gradients; and with another for one position, its row alone is another."""
    inputs, options = policy_inputs(biased=True)
    options |= anchors(inputs, options["tokens"])

    def found(advantages: Tensor) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
        terms = policy_loss(*leaves, **options | {"advantages": advantages})
        return torch.stack(terms).detach(), [*torch.autograd.grad(terms.loss, leaves)]

    one = options["advantages"]
    each = one[..., None].expand(*one.shape, 5)
    terms, expected = found(one)
    same, gradients = found(each)
    rounding = 0.0 if backend == "triton" else 1e-6  # a mean's order is its layout's
    torch.testing.assert_close([same, *gradients], [terms, *expected], rtol=rounding, atol=rounding)
    changed, (to_hidden, *_) = found(each + 3.0 * (torch.arange(5, device=DEVICE) == 2))
    assert (changed - terms).abs().gt(1e-3).tolist() == [True, True, False, False, False, False]
    assert (to_hidden - expected[0]).abs().amax((0, 2)).gt(1e-3).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize(
    ("clip_range", "prior_weight", "kl_weight"), [(0.2, 0.1, 0.0), (0.1, 0.0, 0.3), (0.3, 1.5, 0.2)]
)
def test_clipping_on_both_sides(clip_range: float, prior_weight: float, kl_weight: float, temperature: float) -> None:
    inputs, options = policy_inputs(batch=3, group=4)
    options |= anchors(inputs, options["tokens"], temperature=temperature)
    options["advantages"][0, :2] = 0.0
    options["advantages"][1] = -options["advantages"][1].abs()
    options |= {"clip_range": clip_range, "prior_weight": prior_weight, "kl_weight": kl_weight}
    terms = assert_policy_loss_accurate(inputs, options | {"temperature": temperature})
    assert 0.1 < terms.clip_fraction < 0.9
    assert terms.prior > 1  # reported, whatever its weight
    assert terms.kl > 0.01


def test_temperature_and_anchors_over_blocks_of_a_row() -> None:
    inputs, options = policy_inputs(batch=1, length=2, vocab=16389, width=8)
    options["tokens"][0, 0] = torch.tensor([16388, 3])
    options |= anchors(inputs, options["tokens"], temperature=0.7)
    assert_policy_loss_accurate(inputs, options | {"kl_weight": 0.3, "temperature": 0.7})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "temperature"),
    [({}, 1.0), ({"batch": 1, "length": 63, "width": 7}, 0.7), ({"batch": 1, "length": 2, "vocab": 20001}, 1.3)],
)
def test_a_bias_of_the_head(sizes: dict[str, int], temperature: float, dtype: torch.dtype) -> None:
    """Its values, strided, and its gradient, beside those to hidden and weight; with and without older policies."""
    if dtype == torch.bfloat16 and "vocab" in sizes and DEVICE.type == "cpu":
        pytest.skip("interpreted, the gradient is truncated twice where hardware rounds: 0.8 % of few elements")
    inputs, options = policy_inputs(**sizes, biased=True)
    inputs[2] = strided(inputs[2])
    targets = options["targets"]
    assert_fused_accurate(lambda h, w, b: ops.linear_cross_entropy(h, w, targets, bias=b), inputs, dtype)
    assert_policy_loss_accurate(inputs, options, dtype)
    options |= anchors(inputs, options["tokens"], temperature=temperature)
    assert_policy_loss_accurate(inputs, options | {"kl_weight": 0.3, "temperature": temperature}, dtype)


def test_the_launches_of_a_bias() -> None:
    inputs, options = policy_inputs(biased=True)
    counts = []
    for count in (2, 3):
        leaves = [x.to(DEVICE).requires_grad_() for x in inputs[:count]]
        with recorded(carry_out=True) as recording, ops.use_backend("triton"):
            policy_loss(*leaves, **options).loss.backward()
        counts.append([launch.kernel.__name__ for launch in recording.launches])
    assert counts[0] == ["head_loss_kernel", *["scale_gradient_kernel"] * 2]
    assert counts[1] == [*counts[0], "scale_gradient_kernel"]  # of its gradient; the sum over rows is PyTorch's


def test_a_bias_of_minus_infinity_rules_a_token_out() -> None:
    inputs, options = policy_inputs(biased=True)
    unused = 5
    for name in ("tokens", "targets"):
        options[name][options[name] == unused] = 6
    inputs[2][unused] = -math.inf
    found = gradients("triton", lambda *t: policy_loss(*t, **options).loss, *inputs)
    assert found[2][unused] == 0
    assert not found[1][unused].any()
    kept = torch.arange(37) != unused
    for name in ("tokens", "targets"):
        options[name] = options[name] - (options[name] > unused).long()
    fewer = gradients("triton", lambda *t: policy_loss(*t, **options).loss, inputs[0], *(x[kept] for x in inputs[1:]))
    torch.testing.assert_close(found[0], fewer[0])
    torch.testing.assert_close(found[2][kept], fewer[2])


def test_the_bounds_of_the_clip_range_belong_to_it() -> None:
    inputs, options = policy_inputs()
    terms = assert_policy_loss_accurate(inputs, options | {"clip_range": 0.0, "prior_weight": 0.0})
    assert (terms.ratio, terms.clip_fraction) == (1, 0)


def test_advantages_of_zero_leave_the_prior() -> None:
    inputs, options = policy_inputs()
    options["advantages"].zero_()
    terms = assert_policy_loss_accurate(inputs, options)
    torch.testing.assert_close(terms.loss, 0.1 * terms.prior)


def test_a_small_divergence_does_not_cancel() -> None:
    inputs, options = policy_inputs()
    options |= anchors(inputs, options["tokens"], spread=1e-3)
    terms = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        with ops.use_backend(backend):
            terms.append(ops.policy_loss(*(x.to(DEVICE, dtype) for x in inputs), **options))
    assert terms[0].kl < 1e-6
    assert terms[1].kl.item() == pytest.approx(terms[0].kl.item(), rel=1e-3)


def test_a_vocabulary_of_one_token() -> None:
    inputs, options = policy_inputs(batch=1, length=2, vocab=1)
    with ops.use_backend("triton"):
        terms = ops.policy_loss(*(x.to(DEVICE) for x in inputs), **options)
    torch.testing.assert_close(terms.loss, -options["advantages"].mean())
    assert terms.prior.abs() < 1e-6
    for gradient in gradients("triton", lambda *t: ops.policy_loss(*t, **options).loss, *inputs):
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "vocab", "width"), [(1, 2, 1), (13, 1000, 7), (2, 16384, 8), (2, 20001, 8)])
def test_linear_cross_entropy(length: int, vocab: int, width: int, dtype: torch.dtype) -> None:
    inputs, options = policy_inputs(length=length, vocab=vocab, width=width)
    assert_fused_accurate(lambda *t: ops.linear_cross_entropy(*t, options["targets"]), inputs, dtype)


def test_fp32_products_keep_their_precision_under_autocast() -> None:
    inputs, options = policy_inputs()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return ops.policy_loss(hidden, weight, **options).loss

    assert_fused_accurate(loss, inputs, torch.float32)


def test_logits_of_ten_thousand() -> None:
    # Logits of exactly 0 and ±1e4, so that float32 has no rounding to be blamed for; equal ones share the probability.
    (hidden, weight), options = policy_inputs(vocab=65, width=4)
    hidden = 1e4 * nn.functional.one_hot(hidden.argmax(-1), 4).float()
    assert_policy_loss_accurate([hidden, weight.mul(3).round().clamp(-1, 1)], options)


def test_equal_logits() -> None:
    (hidden, weight), options = policy_inputs(width=2)
    hidden[..., 0], weight[:, 1] = 0.0, 1.0
    terms = assert_policy_loss_accurate([hidden, weight], options | {"prior_weight": 1.0})
    assert terms.prior.item() == pytest.approx(math.log(37), rel=1e-6)


def test_a_logit_of_minus_infinity() -> None:
    hidden, targets = torch.ones(1, 2, 1, device=DEVICE), torch.tensor([[0, 2]], device=DEVICE)
    weight = torch.tensor([[0.3], [-math.inf], [1.0]], device=DEVICE, requires_grad=True)
    with ops.use_backend("triton"):
        loss = ops.linear_cross_entropy(hidden, weight, targets)
    with ops.use_backend("reference"):
        expected = ops.linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(each, weight)[0] for each in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_nan_in_hidden_reaches_the_loss_and_the_gradients(backend: str) -> None:
    (hidden, weight), options = policy_inputs()
    hidden[1, 2, 3] = math.nan
    terms = ops.policy_loss(hidden.to(DEVICE), weight.to(DEVICE), **options)
    assert [term.isnan().item() for term in terms] == [True, True, True, False, True, False]
    found = gradients(backend, lambda *t: ops.policy_loss(*t, **options).loss, hidden, weight)
    assert found[0].isnan().all(-1).flatten().nonzero().tolist() == [[7]]
    assert found[1].isnan().all()


@pytest.mark.parametrize("name", ["advantages", "old_logprobs", "base_logprobs"])
def test_nan_beside_the_logits_reaches_the_loss(backend: str, name: str) -> None:
    inputs, options = policy_inputs()
    options |= anchors(inputs, options["tokens"]) | {"kl_weight": 0.1}
    options[name][0, 0] = math.nan
    assert ops.policy_loss(*(x.to(DEVICE) for x in inputs), **options).loss.isnan()


def test_an_infinite_ratio_of_no_advantage_is_nan(backend: str) -> None:
    inputs, options = policy_inputs()
    options |= {"advantages": torch.zeros(2, 3, device=DEVICE), "old_logprobs": torch.full((2, 3, 5), -1e3).to(DEVICE)}
    assert ops.policy_loss(*(x.to(DEVICE) for x in inputs), **options).loss.isnan()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_16_bit_hidden_state_with_an_fp32_head(backend: str, autocast: bool) -> None:
    (hidden, weight), options = policy_inputs()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        exact = hidden.dtype == torch.float64
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast and not exact):
            return ops.policy_loss(hidden if exact else hidden.bfloat16(), weight, **options).loss

    hidden = hidden.bfloat16().float()
    found = gradients(backend, loss, hidden, weight)
    exact = gradients("reference", loss, hidden.double(), weight.double())
    for gradient, expected in zip(found, exact, strict=True):
        assert gradient.dtype == torch.float32
        assert relative_l2(gradient, expected) < RELATIVE_L2[torch.bfloat16]
