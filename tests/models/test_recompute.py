"""The parts of a block against their plain forms: values, gradients, what is kept, launched, cast and added up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accuracy import RELATIVE_L2, relative_l2
from fused import DEVICE, misaligned
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vapi_fast import ops, reference
from vapi_fast.kernels.launch import recorded
from vapi_fast.models.recompute import Draw, add_norm, cast_once, linear, norm_heads, norm_swiglu, taken
from vapi_fast.ops.backends import implementation

Operation = Callable[..., Sequence[Tensor]]

TABLE = ops.rotary_2d_table(2, 8, 1)
DRAW = {"p": 0.25, "site": 3, "seed": 5}


def draw() -> Draw:
    return Draw(**DRAW | {"seed": torch.tensor(DRAW["seed"], device=DEVICE)}, sample_ids=None)


def heads(x: Tensor, branch: Tensor, norm: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return norm_heads(x, branch, norm, 1e-5, weight, 3, TABLE.to(x.device))


def plain_heads(x: Tensor, branch: Tensor, norm: Tensor, weight: Tensor) -> Sequence[Tensor]:
    table = TABLE.to(x)
    q, k, v = F.linear(ops.rms_norm(x + branch, norm, 1e-5), weight).unflatten(-1, (3, 3, -1)).unbind(2)
    return x + branch, ops.rotary_2d(q, table), ops.rotary_2d(k, table), v


def swiglu(x: Tensor, branch: Tensor, norm: Tensor, *weights: Tensor) -> Sequence[Tensor]:
    return norm_swiglu(x, branch, norm, 1e-5, *weights, draw())


def plain_swiglu(x: Tensor, branch: Tensor, norm: Tensor, gate: Tensor, up: Tensor, weight: Tensor) -> Sequence[Tensor]:
    normed = ops.rms_norm(x + branch, norm, 1e-5)
    fed = F.linear(ops.swiglu(F.linear(normed, gate), F.linear(normed, up)), weight)
    return x + branch, ops.dropout(fed, **DRAW)


CASES: dict[str, tuple[Operation, Operation, list[tuple[int, ...]]]] = {
    "heads": (heads, plain_heads, [(2, 5, 24), (2, 5, 24), (24,), (72, 24)]),
    "first heads": (
        lambda x, norm, weight: norm_heads(x, None, norm, 1e-5, weight, 3, TABLE.to(x.device)),
        lambda x, norm, weight: plain_heads(x, torch.zeros_like(x), norm, weight),
        [(2, 5, 24), (24,), (72, 24)],
    ),
    "SwiGLU": (swiglu, plain_swiglu, [(2, 5, 24), (2, 5, 24), (24,), (40, 24), (40, 24), (24, 40)]),
    "last norm": (
        lambda x, branch, norm: [add_norm(x, branch, norm, 1e-5)],
        lambda x, branch, norm: [ops.rms_norm(x + branch, norm, 1e-5)],
        [(2, 5, 24), (2, 5, 24), (24,)],
    ),
    "linear": (
        lambda x, weight: [linear(x, weight, draw())],
        lambda x, weight: [ops.dropout(F.linear(x, weight), **DRAW)],
        [(2, 5, 24), (16, 24)],
    ),
}
every_backend_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (backend, dtype)
        for backend in ("reference", "triton")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
)
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
    """The backward runs on the forward's backend though it is called, as by autograd's threads, outside."""
    inputs = [x.detach().to(DEVICE).requires_grad_() for x in random_inputs(shapes, dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with ops.use_backend("reference"):
        expected = values_and_gradients(plain, exact)
    with ops.use_backend("triton"), recorded(carry_out=True) as forward:
        outputs = operation(*inputs)
    with recorded(carry_out=True) as backward:
        gradients = torch.autograd.grad(outputs, inputs, directions(outputs))
    assert forward.launches
    assert backward.launches
    for found, exactly in zip([*outputs, *gradients], expected, strict=True):
        assert found.dtype == dtype
        # Several roundings of bfloat16 one after another, in the interpreter by truncation.
        assert relative_l2(found.detach(), exactly.detach()) < RELATIVE_L2[dtype] * (
            3 if dtype == torch.bfloat16 else 1
        )


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
@pytest.mark.parametrize("case", ["heads", "SwiGLU", "linear"])
def test_float32_weights_are_cast_once(case: str, autocast: bool) -> None:
    """Activations in bfloat16, master weights in float32: outputs bfloat16, weight gradients float32, norms' too."""
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
    inputs = random_inputs(CASES["heads"][2], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = heads(*inputs)
    for found, outside in zip(inside, heads(*inputs), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, outside)


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


def test_heads_share_the_projections_memory() -> None:
    _, *found = heads(*random_inputs(CASES["heads"][2]))
    assert len({x.untyped_storage().data_ptr() for x in found}) == 1
    assert found[0].untyped_storage().nbytes() == sum(x.nbytes for x in found)


class Blocks(nn.Module):
    """Two matrices, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 16, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.first.weight), self.second.weight)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients_of_weights_cast_once_are_added_up_in_float32(backend: str) -> None:
    """Three micro-batches: each product of bfloat16 operands reaches the sum unrounded."""
    torch.manual_seed(0)
    blocks, exact = Blocks().to(DEVICE), Blocks().to(DEVICE).double()
    blocks.second.weight.requires_grad_(False)
    exact.load_state_dict({name: value.bfloat16() for name, value in blocks.state_dict().items()})
    for _ in range(3):
        x = torch.randn(300, 24, device=DEVICE).bfloat16()
        with ops.use_backend(backend), cast_once(blocks, torch.bfloat16):
            with WeightCasts() as casts:
                y = blocks(x)
            y.backward(torch.ones_like(y))
        assert casts.count == 0
        y = exact(x.double())
        y.backward(torch.ones_like(y))
    assert blocks.second.weight.grad is None
    found, expected = blocks.first.weight.grad, exact.first.weight.grad
    assert found.dtype == torch.float32
    # Only the gradient to the first product is rounded: what comes of it is exact but for float32.
    assert relative_l2(found, expected) < 2e-3


class Normed(nn.Module):
    """A norm, its parts of a block, and another norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = (nn.Parameter(1 + 0.1 * torch.randn(24)) for _ in range(2))
        self.linear = nn.Linear(24, 72, bias=False)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        total, *heads = norm_heads(x, None, self.first_norm, 1e-5, self.linear.weight, 3, TABLE.to(x))
        normed = add_norm(total, sum(heads).flatten(2), self.second_norm, 1e-5)
        return add_norm(normed, None, last, 1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients_of_norms_are_added_up_in_shares(backend: str) -> None:
    """Three micro-batches of different sizes, and a second step in the same memory; a norm that is not trained."""
    torch.manual_seed(0)
    model, last = Normed().to(DEVICE), nn.Parameter(torch.randn(24, device=DEVICE))
    model.second_norm.requires_grad_(False)
    exact, exact_last = copy.deepcopy(model).double(), last.detach().double().requires_grad_()
    kept: dict[int, Tensor] = {}
    for step in range(2):
        with ops.use_backend(backend), cast_once(model, torch.float32, last, kept=kept):
            for images in (2, 5, 1):
                x = torch.randn(images, 5, 24, device=DEVICE)
                y = model(x, last)
                direction = torch.randn_like(y)
                y.backward(direction)
                assert model.first_norm.grad is last.grad is None or step
                with ops.use_backend("reference"):
                    exact(x.double(), exact_last).backward(direction.double())
        for found, expected in ((model.first_norm, exact.first_norm), (last, exact_last)):
            assert found.grad.dtype == torch.float32
            assert relative_l2(found.grad, expected.grad) < RELATIVE_L2[torch.float32]
        assert model.second_norm.grad is None
        assert kept.keys() == {id(model), id(model.linear.weight)}
    with ops.use_backend(backend):  # outside autograd has them
        y = model(x, last)
        assert torch.autograd.grad(y.sum(), (model.first_norm, last))[0].any()


def test_gradients_of_norms_do_not_survive_an_error() -> None:
    model, last, x = Normed(), nn.Parameter(torch.randn(24)), torch.randn(1, 5, 24)
    weights = [model.first_norm, last]
    expected = torch.autograd.grad(model(x, last).sum(), weights)

    def learn() -> None:
        model(x, last).sum().backward()

    with pytest.raises(ZeroDivisionError), cast_once(model, torch.float32, last):
        learn() or 1 / 0
    assert model.first_norm.grad is None
    failing = mock.patch.object(torch, "_foreach_copy_", side_effect=torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError), failing, cast_once(Blocks(), torch.bfloat16, last):
        pass
    learn()
    assert last.grad is not None
    assert model.first_norm.grad is not None
    torch.testing.assert_close([weight.grad for weight in weights], list(expected))


def test_another_weight_is_cast_once_and_its_gradients_added_up_in_float32() -> None:
    """As a head's, which operations of autograd take: bit for bit what casts in each of three micro-batches give."""
    torch.manual_seed(0)
    blocks, weight = Blocks().to(DEVICE), nn.Parameter(torch.randn(5, 8, device=DEVICE))
    other, rows = nn.Parameter(weight.detach().clone()), [torch.randn(7, 8, device=DEVICE).bfloat16() for _ in range(3)]
    with cast_once(blocks, torch.bfloat16, weight, weight.detach().clone()):
        with WeightCasts() as casts:
            products = [x @ taken(weight, torch.bfloat16).T for x in rows]
            sampled = taken(weight, torch.bfloat16).detach()
        assert casts.count == 0
        assert torch.equal(sampled, weight.bfloat16())
        assert torch.equal(taken(weight, torch.float16), weight.half())
        for y in products:
            y.sum().backward()
    for x in rows:
        (x @ taken(other, torch.bfloat16).T).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, other.grad)
    weight.requires_grad_(False)
    with cast_once(blocks, torch.bfloat16, weight):
        assert not taken(weight, torch.bfloat16).requires_grad


def test_weights_cast_once_follow_the_masters() -> None:
    """Each `with` block takes them as they are when it begins; after it nothing of them is left."""
    blocks, x = Blocks(), torch.randn(3, 24).bfloat16()
    for factor in (1, 2, 3):
        with torch.no_grad():
            blocks.first.weight.fill_(1.0).mul_(factor)
            blocks.second.weight.fill_(0.5)
        blocks.load_state_dict({name: value.clone() for name, value in blocks.state_dict().items()}, assign=True)
        with cast_once(blocks, torch.bfloat16):
            inside = blocks(x)
            assert torch.equal(inside, blocks(x))
        torch.testing.assert_close(inside, blocks(x))
        with torch.no_grad():
            blocks.first.weight.zero_()
        assert not blocks(x).any()


def test_weights_cast_once_are_given_up_by_an_error() -> None:
    blocks, x = Blocks(), torch.ones(1, 24).bfloat16()
    with pytest.raises(RuntimeError), cast_once(blocks, torch.bfloat16):
        raise RuntimeError
    with torch.no_grad():
        blocks.first.weight.zero_()
    assert not blocks(x).any()


# ---- the launches themselves


@every_backend_dtype
@pytest.mark.parametrize("shape", [(1, 3), (3, 5, 192), (2, 2, 2, 1000), (130, 20), (0, 8)])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
def test_add_norm(shape: tuple[int, ...], dtype: torch.dtype, backend: str, weight_dtype: torch.dtype | None) -> None:
    """Sum, norm and gradients, weights in the states' dtype or in float32, against autograd in float64."""
    x, branch, dsum, dy = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(4))
    branch = misaligned(branch)
    weight = (1 + 0.1 * torch.randn(shape[-1], device=DEVICE)).to(weight_dtype or dtype)
    with ops.use_backend(backend):
        kernels = implementation(x)
    total, normed = kernels.add_norm(x, branch, weight, 1e-5)
    dx, dweight, again = kernels.add_norm_backward(dy, total, weight, 1e-5, dsum)
    assert (total.dtype, normed.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, dtype, torch.float32)
    assert torch.equal(normed, again)
    exact = [value.double().requires_grad_() for value in (total, weight)]
    expected = reference.rms_norm(*exact, 1e-5)
    gradients = torch.autograd.grad(expected, exact, dy.double())
    if 0 in shape:
        assert not dweight.any()
        return
    close = RELATIVE_L2[dtype]
    assert relative_l2(total, x.double() + branch.double()) < close
    assert relative_l2(normed, expected.detach()) < close
    assert relative_l2(dx, gradients[0] + dsum.double()) < close
    assert relative_l2(dweight, gradients[1]) < close
    shares = torch.randn(3, shape[-1], device=DEVICE)
    before = shares.sum(0)
    again, none, _ = kernels.add_norm_backward(dy, total, weight, 1e-5, dsum, shares)
    assert torch.equal(again, dx)
    assert none is None
    assert relative_l2(shares.sum(0) - before, gradients[1]) < close
    alone, same = kernels.add_norm(total, None, weight, 1e-5)
    assert alone is total
    assert torch.equal(same, normed)
    dx, *others = kernels.add_norm_backward(dy, total, weight, 1e-5, None)
    assert relative_l2(dx, gradients[0]) < close
    assert all(map(torch.equal, others, (dweight, normed)))


@every_backend_dtype
@pytest.mark.parametrize("shape", [(5, 1, 3, 64), (1, 63, 2, 100), (3, 65, 1, 4), (0, 2, 3, 8)])
def test_rotate_heads(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    batch, length, count, width = shape
    qkv = torch.randn(batch, length, 3, count, width, device=DEVICE).to(dtype)
    table = ops.rotary_2d_table(9, width, 0)[:length].to(DEVICE)
    exact = qkv.double().requires_grad_()
    q, k, v = exact.unbind(2)
    expected = torch.stack([reference.rotary_2d(q, table.double()), reference.rotary_2d(k, table.double()), v], 2)
    gradients = torch.randn(batch, length, 4, count, width, device=DEVICE).to(dtype)
    dq, dv = gradients.unbind(2)[:2]  # with gaps between their rows
    dk = torch.randn(batch, count, length, width, device=DEVICE).to(dtype).transpose(1, 2)  # heads apart
    with ops.use_backend(backend):
        kernels = implementation(qkv)
    memory = qkv.data_ptr()
    kernels.rotate_heads(qkv, table)
    dqkv = kernels.rotate_heads_backward(dq, dk, dv, table)
    assert qkv.data_ptr() == memory
    assert (dqkv.shape, dqkv.dtype, dqkv.is_contiguous()) == (qkv.shape, dtype, True)
    if batch:
        assert relative_l2(qkv, expected.detach()) < RELATIVE_L2[dtype]
        direction = torch.stack([dq, dk, dv], 2).double()
        assert relative_l2(dqkv, torch.autograd.grad(expected, exact, direction)[0]) < RELATIVE_L2[dtype]
        assert torch.equal(dqkv[:, :, 2], dv)


@every_backend_dtype
@pytest.mark.parametrize("shape", [(7,), (5, 1), (65, 63), (3, 2, 2, 520)])
def test_swiglu_backward_gives_the_product_again(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    gate, up, dy = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3))
    with ops.use_backend(backend):
        kernels = implementation(gate)
    product = kernels.swiglu_forward(gate, misaligned(up))
    *found, again = kernels.swiglu_backward(misaligned(dy), gate, up)
    assert torch.equal(product, again)
    exact = [value.double().requires_grad_() for value in (gate, up)]
    expected = reference.swiglu(*exact)
    assert relative_l2(product, expected.detach()) < RELATIVE_L2[dtype]
    for gradient, wanted in zip(found, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        assert gradient.dtype == dtype
        assert relative_l2(gradient, wanted) < RELATIVE_L2[dtype]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nan_stays_in_its_row(backend: str) -> None:
    x = torch.randn(4, 8, device=DEVICE)
    branch, weight = torch.zeros_like(x), torch.ones(8, device=DEVICE)
    branch[2, 5] = torch.nan
    with ops.use_backend(backend):
        kernels = implementation(x)
    total, normed = kernels.add_norm(x, branch, weight, 1e-5)
    dx, dweight, _ = kernels.add_norm_backward(torch.ones_like(x), total, weight, 1e-5, torch.zeros_like(x))
    assert normed.isnan().all(-1).tolist() == dx.isnan().all(-1).tolist() == [False, False, True, False]
    assert dweight.isnan().all()
