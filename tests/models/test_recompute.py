"""Recomputing norms and SwiGLU in the backward changes neither values nor gradients, only what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import RELATIVE_L2, relative_l2
from fused import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vapi_fast import ops
from vapi_fast.kernels.launch import recorded
from vapi_fast.models.recompute import norm_linear, rotated_heads, swiglu_linear

Operation = Callable[..., Sequence[Tensor]]

TABLE = ops.rotary_2d_table(2, 8, 1)


def one_linear(x: Tensor, norm: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return norm_linear(x, norm, 1e-5, weight)


def two_linears(x: Tensor, norm: Tensor, first: Tensor, second: Tensor) -> Sequence[Tensor]:
    return norm_linear(x, norm, 1e-5, first, second)


def plain_linears(x: Tensor, norm: Tensor, *weights: Tensor) -> Sequence[Tensor]:
    return [F.linear(ops.rms_norm(x, norm, 1e-5), weight) for weight in weights]


def swiglu(gate: Tensor, up: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return [swiglu_linear(gate, up, weight)]


def plain_swiglu(gate: Tensor, up: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return [F.linear(ops.swiglu(gate, up), weight)]


def heads(qkv: Tensor) -> Sequence[Tensor]:
    return rotated_heads(qkv, TABLE.to(qkv.device))


def plain_heads(qkv: Tensor) -> Sequence[Tensor]:
    q, k, v = qkv.unbind(2)
    return ops.rotary_2d(q, TABLE.to(q)), ops.rotary_2d(k, TABLE.to(k)), v


CASES = {
    "one linear": (one_linear, plain_linears, [(2, 5, 24), (24,), (72, 24)]),
    "two linears": (two_linears, plain_linears, [(2, 5, 24), (24,), (40, 24), (16, 24)]),
    "SwiGLU": (swiglu, plain_swiglu, [(2, 5, 40), (2, 5, 40), (24, 40)]),
    "heads": (heads, plain_heads, [(2, 5, 3, 3, 8)]),
}
every_case = pytest.mark.parametrize(("operation", "plain", "shapes"), CASES.values(), ids=CASES.keys())


def random_inputs(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def directions(outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=generator).to(y) for y in outputs]


def values_and_gradients(operation: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
    outputs = operation(*inputs)
    return [*outputs, *torch.autograd.grad(outputs, inputs, directions(outputs))]


@every_case
def test_values_and_gradients_equal_the_plain_form(operation: Operation, plain: Operation, shapes: Any) -> None:
    inputs = random_inputs(shapes)
    expected = values_and_gradients(plain, inputs)
    for _ in range(2):
        for found, exactly in zip(values_and_gradients(operation, inputs), expected, strict=True):
            assert relative_l2(found.detach(), exactly.detach()) < 1e-12


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_triton_forward_and_backward(operation: Operation, plain: Operation, shapes: Any, dtype: Any) -> None:
    """The backward recomputes on the forward's backend though it is called, as by autograd's threads, outside."""
    inputs = [x.detach().to(DEVICE).requires_grad_() for x in random_inputs(shapes, dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with ops.use_backend("reference"):
        expected = values_and_gradients(plain, exact)
    with ops.use_backend("triton"), recorded(carry_out=True) as forward:
        outputs = operation(*inputs)
    with recorded(carry_out=True) as backward:
        gradients = torch.autograd.grad(outputs, inputs, directions(outputs))
    assert forward.launches
    assert {launch.kernel for launch in forward.launches} <= {launch.kernel for launch in backward.launches}
    for found, exactly in zip([*outputs, *gradients], expected, strict=True):
        assert found.dtype == dtype
        assert relative_l2(found.detach(), exactly.detach()) < RELATIVE_L2[dtype]


class WeightCasts(TorchDispatchMode):
    """Counts the casts of matrices to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].ndim == 2 and kwargs.get("dtype") == torch.bfloat16:
            self.count += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", ["one linear", "two linears", "SwiGLU"])
def test_float32_weights_are_cast_once(case: str, autocast: bool) -> None:
    """Activations in bfloat16, master weights in float32: outputs bfloat16, weight gradients float32."""
    operation, plain, shapes = CASES[case]
    inputs = [x.detach().float().requires_grad_() for x in random_inputs(shapes)]
    activations = [i for i, shape in enumerate(shapes) if len(shape) == 3]
    for i in activations:
        inputs[i] = inputs[i].detach().bfloat16().requires_grad_()
    expected = values_and_gradients(plain, [x.detach().double().requires_grad_() for x in inputs])
    with WeightCasts() as casts:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = operation(*inputs)
        gradients = torch.autograd.grad(outputs, inputs, directions(outputs))
    assert casts.count == sum(len(shape) == 2 for shape in shapes)
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    assert [g.dtype for g in gradients] == [x.dtype for x in inputs]
    for found, exactly in zip([*outputs, *gradients], expected, strict=True):
        assert relative_l2(found.detach(), exactly.detach()) < 1e-2


def test_autocast_changes_nothing_but_the_weights() -> None:
    """The norm of float32 activations stays float32 in autocast: their dtype is the model's choice."""
    inputs = random_inputs(CASES["one linear"][2], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = one_linear(*inputs)
    (outside,) = one_linear(*inputs)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


@every_case
def test_inputs_that_need_no_gradient(operation: Operation, plain: Operation, shapes: Any) -> None:
    inputs = random_inputs(shapes)
    for needed in range(len(inputs)):
        for i, x in enumerate(inputs):
            x.requires_grad_(i == needed)
        outputs, expected = operation(*inputs), plain(*inputs)
        found, exactly = (
            torch.autograd.grad(
                sum((y * d).sum() for y, d in zip(some, directions(expected), strict=True)), inputs[needed]
            )
            for some in (outputs, expected)
        )
        assert relative_l2(found[0], exactly[0]) < 1e-12


@every_case
def test_without_gradients_nothing_is_kept(operation: Operation, plain: Operation, shapes: Any) -> None:
    inputs = random_inputs(shapes)
    expected = operation(*inputs)
    with torch.no_grad():
        outputs = operation(*inputs)
    for found, graph in zip(outputs, expected, strict=True):
        assert torch.equal(found, graph)
        assert found.grad_fn is None


@every_case
def test_a_second_derivative_is_refused(operation: Operation, plain: Operation, shapes: Any) -> None:
    inputs = random_inputs(shapes)
    (gradient, *_) = torch.autograd.grad(sum(y.square().sum() for y in operation(*inputs)), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_rotated_heads_free_the_projection() -> None:
    (qkv,) = random_inputs([(2, 5, 3, 3, 8)])
    storages = {x.untyped_storage().data_ptr() for x in heads(qkv)}
    assert qkv.untyped_storage().data_ptr() not in storages
