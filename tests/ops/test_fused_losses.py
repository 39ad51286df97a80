"""The policy loss and cross-entropy on Triton against the reference in float64: terms, gradients, chunks, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import RELATIVE_L2, relative_l2
from fused import DEVICE, DTYPES, assert_fused_accurate, misaligned, strided
from torch import Tensor, nn

from vapi_fast import kernels, ops
from vapi_fast.kernels import head, losses

PRODUCTION = {"batch": 16, "group": 8, "length": 576, "vocab": 16384, "width": 1536}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The interpreter truncates to bfloat16, at up to 0.8 % an element: of few elements, not any draw is accurate."""
    torch.manual_seed(0)


def policy_inputs(
    batch: int = 2, group: int = 3, length: int = 5, vocab: int = 37, width: int = 24
) -> tuple[list[Tensor], dict[str, Any]]:
    """hidden and weight, and the other tensors. Tokens repeat within a row: in the group, and as its target."""
    inputs = [torch.randn(batch, length, width), torch.randn(vocab, width) / width**0.5]
    tokens = torch.randint(0, vocab, (batch, group, length))
    tokens[:, -1, ::2] = tokens[:, 0, ::2]
    targets = torch.randint(0, vocab, (batch, length))
    targets[:, ::3] = tokens[:, 0, ::3]
    options = {"tokens": tokens, "advantages": torch.randn(batch, group), "targets": targets}
    return inputs, {name: x.to(DEVICE) for name, x in options.items()}


def anchors(
    inputs: list[Tensor], tokens: Tensor, *, spread: float = 0.3, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Log-probs of an older policy, at ratios away from all clip bounds here, and of a base policy `spread` away."""
    hidden, weight = (x.double().to(DEVICE) for x in inputs)
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    own = logprobs.gather(-1, tokens.transpose(1, 2)).transpose(1, 2)
    ratios = own.new_tensor([0.5, 0.85, 0.95, 1.05, 1.15, 1.5])[torch.randint_like(tokens, 6)]
    return {"old_logprobs": own - ratios.log(), "base_logprobs": own + spread * torch.randn_like(own)}


def assert_policy_loss_accurate(
    inputs: list[Tensor], options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> ops.PolicyLoss:
    """Loss and gradients near the reference's in float64, and every term of the report too."""
    found: list[ops.PolicyLoss] = []

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        found.append(ops.policy_loss(hidden, weight, **options))
        return found[-1].loss

    assert_fused_accurate(loss, inputs, dtype)
    expected, terms = (torch.stack(each).detach() for each in found)
    tolerance = RELATIVE_L2[dtype]
    torch.testing.assert_close(terms, expected.float(), rtol=tolerance, atol=tolerance / 10)
    assert [term.requires_grad for term in found[-1]] == [True] + 5 * [False]
    return ops.PolicyLoss(*terms)


def triton_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in inputs]
    with ops.use_backend("triton"):
        return [*torch.autograd.grad(loss(*leaves), leaves)]


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
    ],
)
def test_policy_loss(sizes: dict[str, int], anchored: bool, dtype: torch.dtype) -> None:
    inputs, options = policy_inputs(**sizes)
    if anchored:
        options |= anchors(inputs, options["tokens"])
    assert_policy_loss_accurate(inputs, options, dtype)


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
    for gradient in triton_gradients(lambda *t: ops.policy_loss(*t, **options).loss, *inputs):
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "vocab", "width"), [(1, 2, 1), (13, 1000, 7), (2, 16384, 8), (2, 20001, 8)])
def test_linear_cross_entropy(length: int, vocab: int, width: int, dtype: torch.dtype) -> None:
    inputs, options = policy_inputs(length=length, vocab=vocab, width=width)
    assert_fused_accurate(lambda *t: ops.linear_cross_entropy(*t, options["targets"]), inputs, dtype)


class Bigram(nn.Module):
    """The least model that takes a prefix and a condition."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)

    def forward(self, prefix: Tensor, condition: Tensor, *, return_hidden: bool) -> Tensor:
        assert return_hidden
        return self.embedding(torch.cat([condition[:, None], prefix], dim=1))


def test_noisy_prefix_cross_entropy() -> None:
    model = Bigram(37, 8).to(DEVICE)
    tokens, condition = torch.randint(0, 37, (3, 9), device=DEVICE), torch.randint(0, 37, (3,), device=DEVICE)
    results = []
    for operations in (kernels, ops):
        with ops.use_backend("reference"):
            loss = operations.noisy_prefix_cross_entropy(model, tokens, condition, noise_prob=0.5, seed=3)
        results.append((loss.detach(), *torch.autograd.grad(loss, model.parameters())))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_chunks_of_rows_equal_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, weight), options = policy_inputs()
    hidden, weight = hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    options |= anchors([hidden, weight], options["tokens"])

    def run() -> tuple[Tensor, ...]:
        states, head_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with ops.use_backend("triton"):
            terms = ops.policy_loss(states, head_weight, **options)
        return torch.stack(terms).detach(), *torch.autograd.grad(terms.loss, (states, head_weight))

    whole = run()
    monkeypatch.setattr(head, "CHUNK_BYTES", 3 * 37 * 4)
    assert head.rows_at_once(10, 37) == 3  # of 10 rows: 3, 3, 3, 1
    for one, several in zip(whole, run(), strict=True):
        assert relative_l2(several, one.double()) < RELATIVE_L2[dtype] / 10


def test_rows_of_a_chunk() -> None:
    assert head.rows_at_once(16 * 576, 16384) == 2304
    assert head.rows_at_once(2561, 16384) == 1408
    assert head.rows_at_once(10**6, 65536) == 640
    assert head.rows_at_once(0, 5) >= 1


def test_upstream_gradients_scale_and_accumulate() -> None:
    (hidden, weight), options = policy_inputs()
    plain = triton_gradients(lambda *t: ops.policy_loss(*t, **options).loss, hidden, weight)
    leaves = [x.to(DEVICE).requires_grad_() for x in (hidden, weight)]
    with ops.use_backend("triton"):
        loss = ops.policy_loss(*leaves, **options).loss
    (3 * loss).backward(retain_graph=True)
    (loss / 2).backward()
    for leaf, gradient in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, 3.5 * gradient)


def test_a_second_derivative_is_refused() -> None:
    (hidden, weight), options = policy_inputs()
    hidden, weight = hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE)
    with ops.use_backend("triton"):
        loss = ops.linear_cross_entropy(hidden, weight, options["targets"])
    gradient = torch.autograd.grad(loss.square(), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="scale_gradient"):
        gradient.sum().backward()


def test_only_the_gradients_that_are_needed() -> None:
    (hidden, weight), options = policy_inputs()
    hidden, weight = hidden.to(DEVICE), weight.to(DEVICE)
    both = triton_gradients(lambda *t: ops.policy_loss(*t, **options).loss, hidden, weight)
    for index in range(2):
        inputs = [hidden.clone(), weight.clone()]
        inputs[index].requires_grad_()
        with ops.use_backend("triton"):
            ops.policy_loss(*inputs, **options).loss.backward()
        torch.testing.assert_close(inputs[index].grad, both[index])
        assert inputs[1 - index].grad is None
        with ops.use_backend("triton"), torch.no_grad():
            assert not ops.policy_loss(*inputs, **options).loss.requires_grad
    shapes = [
        tuple(x.shape)
        for x in losses.linear_cross_entropy_op(hidden, weight, None, options["targets"], [False, True, False])
    ]
    assert shapes == [(), (0,), weight.shape, (0,)]


@pytest.mark.parametrize("change", [misaligned, strided, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)])
def test_any_strides(change: Callable[[Tensor], Tensor]) -> None:
    inputs, options = policy_inputs(batch=2, length=3)
    options |= anchors(inputs, options["tokens"])
    changed = {name: change(x) for name, x in options.items()}
    assert_policy_loss_accurate([change(x) for x in inputs], changed)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_16_bit_hidden_state_with_an_fp32_head(autocast: bool) -> None:
    (hidden, weight), options = policy_inputs()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        exact = hidden.dtype == torch.float64
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast and not exact):
            return ops.policy_loss(hidden if exact else hidden.bfloat16(), weight, **options).loss

    hidden = hidden.bfloat16().float()
    exact = [x.double().to(DEVICE).requires_grad_() for x in (hidden, weight)]
    found = triton_gradients(loss, hidden, weight)
    for gradient, expected in zip(found, torch.autograd.grad(loss(*exact), exact), strict=True):
        assert gradient.dtype == torch.float32
        assert relative_l2(gradient, expected) < RELATIVE_L2[torch.bfloat16]


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


def test_nan_in_hidden_reaches_the_loss_and_the_gradients() -> None:
    (hidden, weight), options = policy_inputs()
    hidden[1, 2, 3] = math.nan
    with ops.use_backend("triton"):
        terms = ops.policy_loss(hidden.to(DEVICE), weight.to(DEVICE), **options)
    assert [term.isnan().item() for term in terms] == [True, True, True, False, True, False]
    found = triton_gradients(lambda *t: ops.policy_loss(*t, **options).loss, hidden, weight)
    assert found[0].isnan().all(-1).flatten().nonzero().tolist() == [[7]]
    assert found[1].isnan().all()


@pytest.mark.parametrize("name", ["advantages", "old_logprobs", "base_logprobs"])
def test_nan_beside_the_logits_reaches_the_loss(name: str) -> None:
    inputs, options = policy_inputs()
    options |= anchors(inputs, options["tokens"]) | {"kl_weight": 0.1}
    options[name][0, 0] = math.nan
    with ops.use_backend("triton"):
        assert ops.policy_loss(*(x.to(DEVICE) for x in inputs), **options).loss.isnan()


def test_an_infinite_ratio_of_no_advantage_is_nan() -> None:
    inputs, options = policy_inputs()
    options |= {"advantages": torch.zeros(2, 3, device=DEVICE), "old_logprobs": torch.full((2, 3, 5), -1e3).to(DEVICE)}
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            assert ops.policy_loss(*(x.to(DEVICE) for x in inputs), **options).loss.isnan()


@pytest.mark.parametrize("wrong", [-1, 37, 2**40])
def test_a_token_outside_of_the_vocabulary_makes_nan(wrong: int) -> None:
    inputs, options = policy_inputs()
    hidden, weight = (x.to(DEVICE).requires_grad_() for x in inputs)
    for name in ("tokens", "targets"):
        changed = options | {name: options[name].clone()}
        changed[name].view(-1)[1] = wrong
        loss = losses.policy_loss(hidden, weight, **changed).loss  # past the check of tokens on a CPU
        assert loss.isnan()
        if name == "tokens":
            assert torch.autograd.grad(loss, weight)[0].isnan().all()
    assert losses.linear_cross_entropy(hidden, weight, changed["targets"]).isnan()


def test_what_the_kernels_do_not_take() -> None:
    inputs, options = policy_inputs(batch=1, group=128, length=1)
    hidden, weight = (x.to(DEVICE) for x in inputs)
    with ops.use_backend("triton"):
        with pytest.raises(ValueError, match="G <= 127 on the 'triton' backend, got G=128"):
            ops.policy_loss(hidden, weight, **options)
        with pytest.raises(TypeError, match="hidden must be float32, bfloat16 or float16"):
            ops.linear_cross_entropy(hidden.double(), weight, options["targets"])


def test_registration() -> None:
    inputs, options = policy_inputs(batch=1, length=3, width=8)
    hidden, weight = (x.to(DEVICE).requires_grad_() for x in inputs)
    anchored = [x.float() for x in anchors(inputs, options["tokens"]).values()]
    scalars = (0.2, 0.1, 0.1, 0.9, [True, True, False])
    torch.library.opcheck(losses.policy_loss_op, (hidden, weight, None, *options.values(), *anchored, *scalars))
    torch.library.opcheck(losses.policy_loss_op, (hidden, weight, None, *options.values(), None, None, *scalars))
    torch.library.opcheck(
        losses.linear_cross_entropy_op, (hidden, weight, None, options["targets"], [True, True, False])
    )
    scale = torch.ones((), device=DEVICE)
    torch.library.opcheck(losses.scale_gradient_op, (torch.randn(3, 5, device=DEVICE), scale, torch.bfloat16))


def test_compiled_without_a_graph_break() -> None:
    inputs, options = policy_inputs()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        # Not from vapi_fast.ops, whose check of a CPU's tokens is a branch on data.
        terms = losses.policy_loss(hidden, weight, **options)
        return 2 * terms.loss + terms.prior + losses.linear_cross_entropy(hidden, weight, options["targets"])

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, expected in zip(triton_gradients(compiled, *inputs), triton_gradients(loss, *inputs), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_production_sizes(dtype: torch.dtype) -> None:
    inputs, options = policy_inputs(**PRODUCTION)
    assert_policy_loss_accurate(inputs, options, dtype)
    assert_fused_accurate(lambda *t: ops.linear_cross_entropy(*t, options["targets"]), inputs, dtype)
    options |= anchors(inputs, options["tokens"], temperature=0.9)
    assert_policy_loss_accurate(inputs, options | {"kl_weight": 0.1, "temperature": 0.9}, dtype)


@pytest.mark.parametrize("sizes", [{}, pytest.param(PRODUCTION, marks=pytest.mark.gpu)])
def test_fp16_with_loss_scaling(sizes: dict[str, int]) -> None:
    inputs, options = policy_inputs(**sizes)
    assert_fused_accurate(lambda *t: 2.0**14 * ops.policy_loss(*t, **options).loss, inputs, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [5, 100, 3000, 16384, 40000, 65536])
@pytest.mark.parametrize("group", [1, 16, 127])
def test_every_block_size(vocab: int, group: int) -> None:
    inputs, options = policy_inputs(batch=2, group=group, length=33, vocab=vocab, width=64)
    options |= anchors(inputs, options["tokens"], temperature=0.9)
    assert_policy_loss_accurate(inputs, options | {"kl_weight": 0.1, "temperature": 0.9})
    assert_policy_loss_accurate(inputs, options, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
def test_memory(head_dtype: torch.dtype) -> None:
    (hidden, weight), options = policy_inputs(**PRODUCTION)
    hidden = hidden.to(DEVICE, torch.bfloat16).requires_grad_()
    weight = weight.to(DEVICE, head_dtype).requires_grad_()
    peaks = {}
    for backend in ("triton", "reference", "triton"):  # the first run allocates cuBLAS's workspace
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with ops.use_backend(backend):
            ops.policy_loss(hidden, weight, **options).loss.backward()
        torch.cuda.synchronize()
        peaks[backend] = torch.cuda.max_memory_allocated() - before
    assert peaks["triton"] < 0.15 * peaks["reference"]


@pytest.mark.gpu
def test_a_captured_graph_replays_on_new_inputs() -> None:
    inputs, options = policy_inputs(batch=2, length=40, vocab=1000, width=64)
    hidden, weight = (x.to(DEVICE, torch.bfloat16).requires_grad_() for x in inputs)
    with ops.use_backend("triton"):
        ops.policy_loss(hidden, weight, **options).loss.backward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = ops.policy_loss(hidden, weight, **options).loss
            gradient = torch.autograd.grad(loss, hidden)[0]
        with torch.no_grad():
            hidden.copy_(torch.randn_like(hidden))
        options["tokens"].random_(1000)
        graph.replay()
        expected = ops.policy_loss(hidden, weight, **options).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0])
