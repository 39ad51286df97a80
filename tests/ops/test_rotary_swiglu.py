"""Rotary positions and SwiGLU: against complex rotation and formulas, and Triton against float64."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import RELATIVE_L2, assert_accurate, relative_l2
from fused import DEVICE, DTYPES, assert_fused_accurate, misaligned, strided
from torch import Tensor

from vapi_fast import ops
from vapi_fast.kernels import rotary_swiglu
from vapi_fast.kernels.launch import recorded

# ---- the formulas


@pytest.mark.parametrize(("grid_size", "head_dim", "prefix_len"), [(3, 8, 1), (5, 4, 0), (1, 64, 120), (24, 64, 1)])
def test_rotary_table_turns_by_row_then_column(grid_size: int, head_dim: int, prefix_len: int) -> None:
    table = ops.rotary_2d_table(grid_size, head_dim, prefix_len)
    assert table.shape == (prefix_len + grid_size**2, head_dim // 2, 2)
    assert (table[:prefix_len] == 0).all()
    for row in range(0, grid_size, 2):
        for column in range(0, grid_size, 3):
            for pair in range(head_dim // 2):
                place, i = (row, pair) if pair < head_dim // 4 else (column, pair - head_dim // 4)
                angle = place * 10000 ** (-2 * i / (head_dim / 2))
                cosine, sine = table[prefix_len + row * grid_size + column, pair].tolist()
                assert cosine == pytest.approx(math.cos(angle), abs=4e-6)
                assert sine == pytest.approx(math.sin(angle), abs=4e-6)


def test_rotary_table_of_another_base() -> None:
    cosine = ops.rotary_2d_table(2, 8, 0, base=100.0)[3, :, 0]  # row 1, column 1: frequencies 1 and 100^(−1/2), twice
    torch.testing.assert_close(cosine, torch.tensor([1.0, 0.1, 1.0, 0.1]).cos())


@pytest.mark.parametrize("length", [1, 10])
def test_rotary_is_a_complex_product(length: int) -> None:
    x = torch.randn(2, length, 3, 8, dtype=torch.float64)
    table = ops.rotary_2d_table(3, 8, 1).double()[:length] if length > 1 else ops.rotary_2d_table(3, 8, 0).double()[5:6]
    turned = torch.view_as_complex(x.reshape(2, length, 3, 4, 2)) * torch.view_as_complex(table.contiguous())[:, None]
    out = ops.rotary_2d(x, table)
    torch.testing.assert_close(out, torch.view_as_real(turned).reshape(x.shape))
    if length > 1:
        assert (out[:, 0] == 0).all()  # the condition position vanishes
        torch.testing.assert_close(out[:, 1:].norm(dim=-1), x[:, 1:].norm(dim=-1))
    assert torch.autograd.gradcheck(lambda x: ops.rotary_2d(x, table), x.requires_grad_())
    strided = x.detach().transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(ops.rotary_2d(strided, table), out)


def test_rotated_products_depend_on_the_offset_alone() -> None:
    q, k = torch.randn(2, 8, dtype=torch.float64)
    table = ops.rotary_2d_table(6, 8, 0).double()
    grid_q = ops.rotary_2d(q.expand(1, 36, 1, 8), table).reshape(6, 6, 8)
    grid_k = ops.rotary_2d(k.expand(1, 36, 1, 8), table).reshape(6, 6, 8)
    products = [(grid_q[row, column] @ grid_k[row + 2, column + 1]).item() for row in range(4) for column in range(5)]
    assert products == pytest.approx([products[0]] * 20, abs=1e-5)
    assert (grid_q[0, 0] @ grid_k[1, 2]).item() != pytest.approx(products[0], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotary_and_swiglu_accuracy(dtype: torch.dtype) -> None:
    table = ops.rotary_2d_table(8, 16, 1)
    assert_accurate(lambda x: ops.rotary_2d(x, table), [torch.randn(2, 65, 3, 16)], dtype)
    assert_accurate(ops.swiglu, [torch.randn(3, 63, 17), torch.randn(3, 63, 17)], dtype)


def test_swiglu_is_its_formula() -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(ops.swiglu(gate, up), gate / (1 + (-gate).exp()) * up)
    assert torch.autograd.gradcheck(ops.swiglu, (gate, up))
    extremes = torch.tensor([-1e4, 1e4, 0.0])
    assert ops.swiglu(extremes, torch.ones(3)).tolist() == [0.0, 1e4, 0.0]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="rotary_2d_table: head_dim must be a multiple of 4, got 6"):
        ops.rotary_2d_table(4, 6, 1)
    with pytest.raises(ValueError, match=r"rotary_2d: table must be .* with T=3, got float32 \[4, 4, 2\]"):
        ops.rotary_2d(torch.zeros(2, 3, 1, 8), torch.zeros(4, 4, 2))
    with pytest.raises(ValueError, match=r"rotary_2d: table must be .* head_dim=8, got float32 \[3, 2, 2\]"):
        ops.rotary_2d(torch.zeros(2, 3, 1, 8), torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match=r"swiglu: up must be .* with ...=\(2,\), D=3, got float32 \[2, 4\]"):
        ops.swiglu(torch.zeros(2, 3), torch.zeros(2, 4))


# ---- on Triton, against float64


def on_triton(operation: object, *inputs: object, **options: object) -> Tensor:
    with ops.use_backend("triton"):
        return operation(*inputs, **options)


def rotary_table(length: int, head_dim: int) -> Tensor:
    """The first rows of a table with one condition position."""
    return ops.rotary_2d_table(25, head_dim, 1)[:length].to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1, 3, 64), (1, 63, 2, 100), (3, 65, 1, 4), (1, 577, 2, 64), (2, 9, 24, 64)])
def test_rotary(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    table = ops.rotary_2d_table(25, shape[3], 0)[1 : shape[1] + 1].to(DEVICE)
    assert_fused_accurate(lambda x: ops.rotary_2d(x, table), [torch.randn(shape)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_makes_condition_positions_vanish(dtype: torch.dtype) -> None:
    table = ops.rotary_2d_table(3, 8, 4).to(DEVICE)
    out = assert_fused_accurate(lambda x: ops.rotary_2d(x, table), [torch.randn(2, 13, 3, 8)], dtype)
    assert not out[:, :4].any()
    assert out[:, 4:].all(-1).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        misaligned,
        strided,
        lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        lambda x: x.repeat(1, 1, 3, 1)[:, :, 4:8],
        lambda x: x.repeat(1, 1, 2, 1)[:, :, ::2],
        lambda x: x[:, :, 1:2, ::2],
    ],
)
def test_rotary_of_any_strides(change: object) -> None:
    x = change(torch.randn(2, 10, 4, 40))
    table = rotary_table(10, x.shape[3])
    out = assert_fused_accurate(lambda x: ops.rotary_2d(x, table), [x], torch.float32)
    assert out.is_contiguous()


@pytest.mark.parametrize("length", [1, 6])
def test_rotary_reads_slices_of_a_fused_projection_in_place(length: int) -> None:
    qkv, table = torch.randn(2, length, 3, 4, 16, device=DEVICE), rotary_table(length + 3, 16)[3:]
    for x in qkv.unbind(2)[:2]:
        assert_fused_accurate(lambda x: ops.rotary_2d(x, table), [x], torch.float32)
        with recorded() as recording:
            rotary_swiglu.rotary_2d_op(x, table, False)
        assert recording.launches[0].args[0].data_ptr() == x.data_ptr()


def test_rotary_table_of_other_dtype_and_strides() -> None:
    x, table = torch.randn(2, 10, 3, 8), rotary_table(10, 8)
    for other in (table.bfloat16(), strided(table), table.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_fused_accurate(lambda x, table=other: ops.rotary_2d(x, table), [x], torch.float32)


def test_rotary_of_nothing_and_of_nan() -> None:
    for shape in ((0, 5, 3, 8), (2, 0, 3, 8)):
        x = torch.empty(shape, device=DEVICE, requires_grad=True)
        out = on_triton(ops.rotary_2d, x, rotary_table(shape[1], 8))
        out.sum().backward()
        assert out.shape == x.grad.shape == shape
    x, table = torch.randn(1, 4, 3, 8, device=DEVICE), rotary_table(5, 8)[1:]
    x[0, 2, 1, 5] = torch.nan
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[0, 2, 1, 4:6] = True
    assert torch.equal(on_triton(ops.rotary_2d, x, table).isnan(), expected)
    with pytest.raises(TypeError, match="rotary_2d: table must be float32, bfloat16 or float16 on the 'triton'"):
        on_triton(ops.rotary_2d, x, table.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 1), (65, 63), (3, 7, 192), (2, 3, 1000), (2, 4096), (3, 2, 2, 520)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_fused_accurate(ops.swiglu, [3 * torch.randn(shape), torch.randn(shape)], dtype)


@pytest.mark.parametrize(
    "change",
    [misaligned, strided, lambda x: x.transpose(0, 1), lambda x: x[1:, 2:], lambda x: x.repeat(1, 1, 2)[..., :96]],
)
def test_swiglu_of_any_strides(change: object) -> None:
    gate, up = change(torch.randn(5, 5, 96)), torch.randn(5, 5, 96)
    up = up[: gate.shape[0], : gate.shape[1], : gate.shape[2]]
    for inputs in ([gate, up], [up, gate]):
        assert_fused_accurate(ops.swiglu, inputs, torch.float32)


def test_swiglu_reads_halves_of_one_projection_in_place() -> None:
    gate, up = torch.randn(2, 9, 2 * 48, device=DEVICE).chunk(2, dim=-1)
    assert_fused_accurate(ops.swiglu, [gate, up], torch.float32)
    with recorded() as recording:
        rotary_swiglu.swiglu_op(gate, up)
        rotary_swiglu.swiglu_backward_op(gate, gate, up)
    forward, backward = (launch.args for launch in recording.launches)
    assert [x.data_ptr() for x in forward[:2]] == [gate.data_ptr(), up.data_ptr()]
    assert [x.data_ptr() for x in backward[:3]] == [gate.data_ptr(), gate.data_ptr(), up.data_ptr()]
    dense = [x.contiguous() for x in (gate, up)]
    for mixed in ((gate, *dense), (dense[0], gate, dense[1]), (*dense[:1] * 2, up)):
        found = rotary_swiglu.swiglu_backward_op(*mixed)
        torch.testing.assert_close(found, rotary_swiglu.swiglu_backward_op(dense[0], *dense))


def test_swiglu_of_mixed_dtypes() -> None:
    for gate_dtype, up_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        gate = torch.randn(5, 70, device=DEVICE).to(gate_dtype).requires_grad_()
        up = torch.randn(5, 70, device=DEVICE).to(up_dtype).requires_grad_()
        out = on_triton(ops.swiglu, gate, up)
        exact = [x.detach().double().requires_grad_() for x in (gate, up)]
        with ops.use_backend("reference"):
            expected = ops.swiglu(*exact)
        assert out.dtype == gate_dtype
        assert relative_l2(out.detach(), expected.detach()) < RELATIVE_L2[gate_dtype]
        gradients = torch.autograd.grad(out.sum(), (gate, up))
        assert [g.dtype for g in gradients] == [gate_dtype, up_dtype]
        for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
            assert relative_l2(gradient, wanted) < RELATIVE_L2[gradient.dtype]


def test_swiglu_at_the_extremes() -> None:
    gate = torch.tensor([-1e4, 1e4, 0.0, -80.0, 80.0, torch.nan, 1.0], device=DEVICE, requires_grad=True)
    up = torch.tensor([1.0, 1.0, 1e4, 1.0, 1.0, 1.0, torch.nan], device=DEVICE, requires_grad=True)
    out = on_triton(ops.swiglu, gate, up)
    assert out.tolist()[:5] == pytest.approx([0.0, 1e4, 0.0, 0.0, 80.0])
    assert out.isnan().tolist() == [False] * 5 + [True] * 2
    dgate, dup = torch.autograd.grad(out.sum(), (gate, up))
    assert dgate.tolist()[:5] == pytest.approx([0.0, 1.0, 5e3, 0.0, 1.0])
    assert dup.tolist()[:5] == pytest.approx([0.0, 1e4, 0.0, 0.0, 80.0])
    assert dgate.isnan().tolist() == [False] * 5 + [True] * 2
    assert dup.isnan().tolist() == [False] * 5 + [True, False]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_swiglu_of_an_empty_batch(shape: tuple[int, ...]) -> None:
    gate = torch.empty(shape, device=DEVICE, requires_grad=True)
    out = on_triton(ops.swiglu, gate, gate)
    out.sum().backward()
    assert out.shape == gate.grad.shape == shape


def test_expanded_inputs() -> None:
    row, table = torch.randn(1, 10, 3, 8, device=DEVICE), rotary_table(10, 8)
    for operation, inputs in ((lambda x: ops.rotary_2d(x, table), [row]), (ops.swiglu, [row, row + 1])):
        one = on_triton(operation, *inputs)
        three = on_triton(operation, *(x.expand(3, *x.shape[1:]) for x in inputs))
        torch.testing.assert_close(three, one.expand_as(three))


def test_opcheck() -> None:
    namespace = torch.ops.vapi_fast
    x, table = torch.randn(2, 5, 3, 8, device=DEVICE, requires_grad=True), rotary_table(5, 8)
    for inverse in (False, True):
        torch.library.opcheck(namespace.rotary_2d.default, (x, table, inverse))
    torch.library.opcheck(namespace.rotary_2d.default, (x.detach()[:, :, ::2], table, False))
    gate, up = (torch.randn(3, 4, 10, device=DEVICE, requires_grad=True) for _ in range(2))
    torch.library.opcheck(namespace.swiglu.default, (gate, up))
    torch.library.opcheck(namespace.swiglu_backward.default, [x.detach() for x in (up, gate, up)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_production_sizes(dtype: torch.dtype) -> None:
    x, table = torch.randn(16, 577, 3, 24, 64)[:, :, 1], rotary_table(577, 64)
    assert_fused_accurate(lambda x: ops.rotary_2d(x, table), [x], dtype)
    assert_fused_accurate(ops.swiglu, [torch.randn(16, 577, 4096), torch.randn(16, 577, 4096)], dtype)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    gate = torch.randn(2**31 // 4096 + 5, 4096, dtype=torch.bfloat16, device=DEVICE)
    out = on_triton(ops.swiglu, gate, gate)
    assert torch.equal(out[-3:], on_triton(ops.swiglu, gate[-3:], gate[-3:]))
    del out
    x, table = gate[:-4].view(-1, 1, 64, 64), rotary_table(2, 64)[1:]
    out = on_triton(ops.rotary_2d, x, table)
    assert torch.equal(out[-3:], on_triton(ops.rotary_2d, x[-3:], table))
