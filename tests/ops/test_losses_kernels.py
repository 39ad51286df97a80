"""How the kernels of the losses go about it: chunks, which gradients, layouts, registration, memory, graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import RELATIVE_L2, relative_l2
from fused import DEVICE, DTYPES, assert_fused_accurate, misaligned, strided
from head_losses import PRODUCTION, anchors, assert_policy_loss_accurate, gradients, policy_inputs, policy_loss
from torch import Tensor

from vapi_fast import ops
from vapi_fast.kernels import head, losses


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The interpreter truncates to bfloat16, at up to 0.8 % an element: of few elements, not any draw is accurate."""
    torch.manual_seed(0)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_chunks_of_rows_equal_one(dtype: torch.dtype, by_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, options = policy_inputs(biased=True, by_token=by_token)
    inputs = [x.to(DEVICE, dtype) for x in inputs]
    options |= anchors(inputs, options["tokens"])

    def run() -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        with ops.use_backend("triton"):
            terms = policy_loss(*leaves, **options)
        return torch.stack(terms).detach(), *torch.autograd.grad(terms.loss, leaves)

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
    plain = gradients("triton", lambda *t: ops.policy_loss(*t, **options).loss, hidden, weight)
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
    inputs, options = policy_inputs(biased=True)
    inputs = [x.to(DEVICE) for x in inputs]
    all_three = gradients("triton", lambda *t: policy_loss(*t, **options).loss, *inputs)
    for index in range(3):
        leaves = [x.clone().requires_grad_(i == index) for i, x in enumerate(inputs)]
        with ops.use_backend("triton"):
            policy_loss(*leaves, **options).loss.backward()
        torch.testing.assert_close(leaves[index].grad, all_three[index])
        assert [leaf.grad is None for leaf in leaves] == [i != index for i in range(3)]
        with ops.use_backend("triton"), torch.no_grad():
            assert not policy_loss(*leaves, **options).loss.requires_grad
    results = losses.linear_cross_entropy_op(*inputs[:2], options["targets"], False, True, inputs[2])
    assert [tuple(x.shape) for x in results] == [(), (0,), inputs[1].shape, (0,)]


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("change", [misaligned, strided, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)])
def test_any_strides(change: Callable[[Tensor], Tensor], by_token: bool) -> None:
    inputs, options = policy_inputs(batch=2, length=3, by_token=by_token)
    options |= anchors(inputs, options["tokens"])
    changed = {name: change(x) for name, x in options.items()}
    assert_policy_loss_accurate([change(x) for x in inputs], changed)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_advantages_of_tokens_in_any_form(dtype: torch.dtype) -> None:
    """In the head's dtype, column by column in memory or expanded, beside a filtered draw, at a temperature."""
    inputs, options = policy_inputs(batch=3, group=4, length=7, by_token=True)
    options |= anchors(inputs, options["tokens"], temperature=0.8) | {"kl_weight": 0.3, "temperature": 0.8}
    advantages = options["advantages"].to(dtype)
    for each in (advantages.mT.contiguous().mT, advantages[:, :1, :].expand(3, 4, 7)):
        assert not each.is_contiguous()
        assert_policy_loss_accurate(inputs, options | {"advantages": each}, dtype)


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
    inputs, options = policy_inputs(batch=1, length=3, width=8, biased=True)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
    anchored = [x.float() for x in anchors(inputs, options["tokens"]).values()]
    for bias, sides in ((leaves[2], anchored), (None, [None, None])):
        if bias is None:  # and advantages of each token
            options["advantages"] = torch.randn(options["tokens"].shape, device=DEVICE)
        needs = (True, True, *([] if bias is None else [bias, True]))  # the last two have defaults
        arguments = (*leaves[:2], *options.values(), *sides, 0.2, 0.1, 0.1, 0.9, *needs)
        torch.library.opcheck(losses.policy_loss_op, arguments)
        torch.library.opcheck(losses.linear_cross_entropy_op, (*leaves[:2], options["targets"], *needs))
    scale = torch.ones((), device=DEVICE)
    torch.library.opcheck(losses.scale_gradient_op, (torch.randn(3, 5, device=DEVICE), scale, torch.bfloat16))


def test_compiled_without_a_graph_break() -> None:
    inputs, options = policy_inputs()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        # Not from vapi_fast.ops, whose check of a CPU's tokens is a branch on data.
        terms = losses.policy_loss(hidden, weight, **options)
        return 2 * terms.loss + terms.prior + losses.linear_cross_entropy(hidden, weight, options["targets"])

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, expected in zip(gradients("triton", compiled, *inputs), gradients("triton", loss, *inputs), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_production_sizes(dtype: torch.dtype) -> None:
    inputs, options = policy_inputs(**PRODUCTION)
    assert_policy_loss_accurate(inputs, options, dtype)
    by_token = options | {"advantages": torch.randn(options["tokens"].shape, device=DEVICE)}
    assert_policy_loss_accurate(inputs, by_token, dtype)
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
