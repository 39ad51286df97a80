"""Rotary positions and SwiGLU. Bound by memory bandwidth.

| kernel          | bytes moved (x: bytes of one input)                        | FLOPs per element           |
|-----------------|------------------------------------------------------------|-----------------------------|
| rotary_2d       | 2x (x read, y written); the table comes from the cache     | 3                           |
| heads_backward  | 6x (dq, dk and dv read, dqkv written)                      | 2                           |
| swiglu_forward  | 3x (gate and up read, y written)                           | 4, 1 exponential, 1 inverse |
| swiglu_backward | 5x (dy, gate and up read, dgate and dup written); 6x with y | 9, 1 exponential, 1 inverse |

In a block queries and keys are rotated where the projection has written them, 4x, and the gradients of all three are
written where its backward reads them: 10x a layer, where copies of queries, keys and values and of their gradients made
it 16x. The gradient of SwiGLU writes SwiGLU again for its linear's weight, 6x instead of 8x.

Predicted for an H100 with 3.0 TB/s, bf16: rotary_2d of 16 × 576 × 24 heads of 64, 57 MB, 0.019 ms; swiglu of 16 × 576
rows of 4096, 226 MB, 0.075 ms, its backward 377 MB, 0.126 ms. Issuing the instructions (17, 25 and 35 an element) takes
less than half of that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_dtypes, launch, next_power_of_2, rows_of

SETTINGS = {"BLOCK_COLUMNS": 512, "BLOCK_ELEMENTS": 2048, "num_warps": 4, "num_stages": 1}


@triton.jit
def even_and_odd(x):
    """The elements at even and at odd columns of `[rows, columns]`."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def turned(x, cosine, sine):
    """Each pair of x's columns, `[rows, columns]`, turned by its angle `[rows, columns / 2]`."""
    even, odd = even_and_odd(x)
    return tl.reshape(tl.join(even * cosine - odd * sine, odd * cosine + even * sine), [x.shape[0], x.shape[1]])


@triton.jit(do_not_specialize=["rows", "T", "column_blocks"])
def rotary_2d_kernel(
    x_ptr,
    table_ptr,
    y_ptr,
    rows,
    T,
    columns,
    column_blocks,
    stride_b,
    stride_t,
    stride_yb,
    stride_yt,
    INVERSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Each pair of a row (image and position) of heads · head_dim columns turned by its position's angle, or back.

    Heads are adjacent in x and y, which may be the same memory; the table is `[T, head_dim / 2, 2]`, a cosine and a
    sine for each pair.
    """
    row = (tl.program_id(0) // column_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    image, t = (row // T).to(tl.int64), row % T
    from_row = image * stride_b + t.to(tl.int64) * stride_t
    x = tl.load(x_ptr + from_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    turn = tl.load(table_ptr + t[:, None] * HEAD_DIM + (column % HEAD_DIM)[None, :], mask=inside, other=0.0)
    cosine, sine = even_and_odd(turn.to(tl.float32))
    y = turned(x, cosine, -sine if INVERSE else sine)
    to_row = image * stride_yb + t.to(tl.int64) * stride_yt
    tl.store(y_ptr + to_row[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "T", "column_blocks"])
def heads_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    table_ptr,
    dqkv_ptr,
    rows,
    T,
    columns,
    column_blocks,
    stride_qb,
    stride_qt,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dq and dk turned back, and dv as it is, beside one another in dqkv, contiguous `[rows, 3, columns]`."""
    row = (tl.program_id(0) // column_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    image, t = (row // T).to(tl.int64), row % T
    turn = tl.load(table_ptr + t[:, None] * HEAD_DIM + (column % HEAD_DIM)[None, :], mask=inside, other=0.0)
    cosine, sine = even_and_odd(turn.to(tl.float32))
    t = t.to(tl.int64)
    row_q = image * stride_qb + t * stride_qt
    row_k = image * stride_kb + t * stride_kt
    row_v = image * stride_vb + t * stride_vt
    dq = tl.load(dq_ptr + row_q[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    dk = tl.load(dk_ptr + row_k[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    dv = tl.load(dv_ptr + row_v[:, None] + column[None, :], mask=inside, other=0.0)
    to = dqkv_ptr + row.to(tl.int64)[:, None] * (3 * columns) + column[None, :]
    tl.store(to, turned(dq, cosine, -sine).to(dqkv_ptr.dtype.element_ty), mask=inside)
    tl.store(to + columns, turned(dk, cosine, -sine).to(dqkv_ptr.dtype.element_ty), mask=inside)
    tl.store(to + 2 * columns, dv.to(dqkv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tile_of_rows(rows, D, column_blocks, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Rows `[BLOCK_ROWS, 1]`, columns `[1, BLOCK_COLUMNS]` and mask of this program's tile of `[rows, D]`."""
    row = (tl.program_id(0) // column_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    return row.to(tl.int64)[:, None], column[None, :], inside


@triton.jit(do_not_specialize=["rows", "column_blocks"])
def swiglu_forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    rows,
    D,
    column_blocks,
    stride_gate,
    stride_up,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """y = gate · sigmoid(gate) · up for a tile; y is contiguous `[rows, D]`."""
    row, column, inside = tile_of_rows(rows, D, column_blocks, BLOCK_ROWS, BLOCK_COLUMNS)
    gate = tl.load(gate_ptr + row * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * D + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "column_blocks"])
def swiglu_backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    y_ptr,
    rows,
    D,
    column_blocks,
    stride_dy,
    stride_gate,
    stride_up,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dgate and dup, and unless it is None the forward's y once more, all contiguous `[rows, D]`, for a tile."""
    row, column, inside = tile_of_rows(rows, D, column_blocks, BLOCK_ROWS, BLOCK_COLUMNS)
    dy = tl.load(dy_ptr + row * stride_dy + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    if y_ptr is not None:
        tl.store(y_ptr + row * D + column, (gate * share * up).to(y_ptr.dtype.element_ty), mask=inside)
    dgate = dy * up * share * (1 + gate * (1 - share))
    dup = dy * gate * share
    tl.store(dgate_ptr + row * D + column, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * D + column, dup.to(dup_ptr.dtype.element_ty), mask=inside)


@functools.cache
def tile_of(rows: int, columns: int) -> tuple[int, int, dict[str, int]]:
    """Programs for `[rows, columns]`, those side by side, and settings: BLOCK_ELEMENTS as whole rows if they fit."""
    block = {name: value for name, value in SETTINGS.items() if name != "BLOCK_ELEMENTS"}
    block["BLOCK_COLUMNS"] = min(next_power_of_2(columns), SETTINGS["BLOCK_COLUMNS"])
    block["BLOCK_ROWS"] = max(SETTINGS["BLOCK_ELEMENTS"] // block["BLOCK_COLUMNS"], 1)
    column_blocks = triton.cdiv(columns, block["BLOCK_COLUMNS"])
    return triton.cdiv(rows, block["BLOCK_ROWS"]) * column_blocks, column_blocks, block


def adjacent_heads(x: Tensor) -> Tensor:
    """x `[B, T, heads, head_dim]` as it is, a slice of a fused projection too, or copied where heads lie apart."""
    *_, heads, head_dim = x.shape
    return x if x.stride(3) == 1 and (heads == 1 or x.stride(2) == head_dim) else x.contiguous()


def rotate(x: Tensor, table: Tensor, y: Tensor, inverse: bool) -> None:
    """y = x turned by the table's angles, or back (by the transposed rotation); both with adjacent heads."""
    batch, length, heads, head_dim = x.shape
    programs, column_blocks, block = tile_of(batch * length, heads * head_dim)
    sizes = (batch * length, length, heads * head_dim, column_blocks, *x.stride()[:2], *y.stride()[:2])
    constants = {"INVERSE": inverse, "HEAD_DIM": head_dim, **block}
    launch(rotary_2d_kernel, (programs,), x, table.contiguous(), y, *sizes, **constants)


def rotate_heads(qkv: Tensor, table: Tensor) -> None:
    """Queries and keys rotated in their place; see `vapi_fast.reference.rotary_swiglu.rotate_heads`."""
    check_dtypes("rotate_heads", qkv=qkv, table=table)
    batch, length, _, heads, head_dim = qkv.shape
    heads = qkv[:, :, :2].view(batch, length, 2 * heads, head_dim)
    rotate(heads, table, heads, False)


def rotate_heads_backward(dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor) -> Tensor:
    """The gradient to the projection; see `vapi_fast.reference.rotary_swiglu.rotate_heads_backward`."""
    batch, length, heads, head_dim = dv.shape
    gradients = [adjacent_heads(x) for x in (dq, dk, dv)]
    dqkv = dv.new_empty(batch, length, 3, heads, head_dim)
    programs, column_blocks, block = tile_of(batch * length, heads * head_dim)
    sizes = (batch * length, length, heads * head_dim, column_blocks)
    strides = (stride for x in gradients for stride in x.stride()[:2])
    constants = {"HEAD_DIM": head_dim, **block}
    launch(heads_backward_kernel, (programs,), *gradients, table.contiguous(), dqkv, *sizes, *strides, **constants)
    return dqkv


@torch.library.custom_op("vapi_fast::rotary_2d", mutates_args=())
def rotary_2d_op(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    """x turned by the table's angles, or back; contiguous."""
    y = x.new_empty(x.shape)
    rotate(adjacent_heads(x), table, y, inverse)
    return y


rotary_2d_op.register_fake(lambda x, table, inverse: x.new_empty(x.shape))


def _rotary_2d_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, ctx.inverse = inputs
    ctx.save_for_backward(table)


def _rotary_2d_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return rotary_2d_op(dy, *ctx.saved_tensors, not ctx.inverse), None, None


rotary_2d_op.register_autograd(_rotary_2d_gradient, setup_context=_rotary_2d_context)


def rotary_2d(x: Tensor, table: Tensor) -> Tensor:
    """Rotation of interleaved pairs in one pass; see `vapi_fast.ops.rotary_2d`."""
    check_dtypes("rotary_2d", x=x, table=table)
    return rotary_2d_op(x, table, False)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up without autograd."""
    y = gate.new_empty(gate.shape)
    gate, up = rows_of(gate), rows_of(up)
    programs, column_blocks, block = tile_of(*gate.shape)
    sizes = (*gate.shape, column_blocks, gate.stride(0), up.stride(0))
    launch(swiglu_forward_kernel, (programs,), gate, up, y, *sizes, **block)
    return y


def swiglu_gradients(dy: Tensor, gate: Tensor, up: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients to both; y: takes the forward's result once more."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    inputs = [rows_of(x) for x in (dy, gate, up)]
    programs, column_blocks, block = tile_of(*inputs[1].shape)
    sizes = (*inputs[1].shape, column_blocks, *(x.stride(0) for x in inputs))
    launch(swiglu_backward_kernel, (programs,), *inputs, dgate, dup, y, *sizes, **block)
    return dgate, dup


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to both, and their product again; see `vapi_fast.reference.rotary_swiglu.swiglu_backward`."""
    y = gate.new_empty(gate.shape)
    return *swiglu_gradients(dy, gate, up, y), y


@torch.library.custom_op("vapi_fast::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu_forward(gate, up)


@torch.library.custom_op("vapi_fast::swiglu_backward", mutates_args=())
def swiglu_backward_op(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_gradients(dy, gate, up)


swiglu_op.register_fake(lambda gate, up: gate.new_empty(gate.shape))
swiglu_backward_op.register_fake(lambda dy, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)))


def _swiglu_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward_op(dy, *ctx.saved_tensors)


swiglu_op.register_autograd(_swiglu_gradient, setup_context=_swiglu_context)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up in one pass; see `vapi_fast.ops.swiglu`."""
    check_dtypes("swiglu", gate=gate, up=up)
    return swiglu_op(gate, up)
