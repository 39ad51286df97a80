"""Rotary positions and SwiGLU. Bound by memory bandwidth.

| kernel          | bytes moved (x: bytes of one input)                    | FLOPs per element           |
|-----------------|--------------------------------------------------------|-----------------------------|
| rotary_2d       | 2x (x read, y written); the table comes from the cache | 3                           |
| swiglu_forward  | 3x (gate and up read, y written)                       | 4, 1 exponential, 1 inverse |
| swiglu_backward | 5x (dy, gate and up read, dgate and dup written)       | 9, 1 exponential, 1 inverse |

Predicted for an H100 with 3.0 TB/s, bf16: rotary_2d of 16 × 576 × 24 heads of 64, 57 MB, 0.019 ms; swiglu of 16 × 576
rows of 4096, 226 MB, 0.075 ms, its backward 377 MB, 0.126 ms. Issuing the instructions (17, 25 and 35 an element) takes
less than half of that.
"""

from __future__ import annotations

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
    INVERSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Each pair of a row (image and position) of heads · head_dim columns turned by its position's angle, or back.

    Heads are adjacent in x; y is contiguous; the table is `[T, head_dim / 2, 2]`, a cosine and a sine for each pair.
    """
    row = (tl.program_id(0) // column_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    image, t = (row // T).to(tl.int64), row % T
    from_row = image * stride_b + t.to(tl.int64) * stride_t
    x = tl.load(x_ptr + from_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    turn = tl.load(table_ptr + t[:, None] * HEAD_DIM + (column % HEAD_DIM)[None, :], mask=inside, other=0.0)
    even, odd = even_and_odd(x)
    cosine, sine = even_and_odd(turn.to(tl.float32))
    if INVERSE:
        sine = -sine
    y = tl.reshape(tl.join(even * cosine - odd * sine, odd * cosine + even * sine), [BLOCK_ROWS, BLOCK_COLUMNS])
    to_row = row.to(tl.int64) * columns
    tl.store(y_ptr + to_row[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


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
    rows,
    D,
    column_blocks,
    stride_dy,
    stride_gate,
    stride_up,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dgate and dup, contiguous `[rows, D]`, for a tile."""
    row, column, inside = tile_of_rows(rows, D, column_blocks, BLOCK_ROWS, BLOCK_COLUMNS)
    dy = tl.load(dy_ptr + row * stride_dy + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate = dy * up * share * (1 + gate * (1 - share))
    dup = dy * gate * share
    tl.store(dgate_ptr + row * D + column, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * D + column, dup.to(dup_ptr.dtype.element_ty), mask=inside)


def tile_of(rows: int, columns: int) -> tuple[int, int, dict[str, int]]:
    """Programs for `[rows, columns]`, those side by side, and settings: BLOCK_ELEMENTS as whole rows if they fit."""
    block = {name: value for name, value in SETTINGS.items() if name != "BLOCK_ELEMENTS"}
    block["BLOCK_COLUMNS"] = min(next_power_of_2(columns), SETTINGS["BLOCK_COLUMNS"])
    block["BLOCK_ROWS"] = max(SETTINGS["BLOCK_ELEMENTS"] // block["BLOCK_COLUMNS"], 1)
    column_blocks = triton.cdiv(columns, block["BLOCK_COLUMNS"])
    return triton.cdiv(rows, block["BLOCK_ROWS"]) * column_blocks, column_blocks, block


@torch.library.custom_op("vapi_fast::rotary_2d", mutates_args=())
def rotary_2d_op(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    """x turned by the table's angles, or back (by the transposed rotation); contiguous."""
    batch, length, heads, head_dim = x.shape
    y = x.new_empty(x.shape)
    if x.stride(3) != 1 or (heads > 1 and x.stride(2) != head_dim):  # a slice of a fused projection is taken as it is
        x = x.contiguous()
    rows, columns = batch * length, heads * head_dim
    programs, column_blocks, block = tile_of(rows, columns)
    sizes = (rows, length, columns, column_blocks, x.stride(0), x.stride(1))
    constants = {"INVERSE": inverse, "HEAD_DIM": head_dim, **block}
    launch(rotary_2d_kernel, (programs,), x, table.contiguous(), y, *sizes, **constants)
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


@torch.library.custom_op("vapi_fast::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    y = gate.new_empty(gate.shape)
    gate, up = rows_of(gate), rows_of(up)
    programs, column_blocks, block = tile_of(*gate.shape)
    sizes = (*gate.shape, column_blocks, gate.stride(0), up.stride(0))
    launch(swiglu_forward_kernel, (programs,), gate, up, y, *sizes, **block)
    return y


@torch.library.custom_op("vapi_fast::swiglu_backward", mutates_args=())
def swiglu_backward_op(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    inputs = [rows_of(x) for x in (dy, gate, up)]
    programs, column_blocks, block = tile_of(*inputs[1].shape)
    sizes = (*inputs[1].shape, column_blocks, *(x.stride(0) for x in inputs))
    launch(swiglu_backward_kernel, (programs,), *inputs, dgate, dup, *sizes, **block)
    return dgate, dup


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
