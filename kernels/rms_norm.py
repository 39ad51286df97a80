"""RMSNorm. Bound by memory bandwidth.

| kernel   | bytes moved (x: bytes of the input) | FLOPs per element |
|----------|-------------------------------------|-------------------|
| forward  | 2x (x read, y written)              | 4                 |
| backward | 3x (x and dy read, dx written)      | 10                |
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_dtypes, launch, multiprocessors, next_power_of_2, rows_of

FORWARD = {"BLOCK_ROWS": 4, "num_warps": 8, "num_stages": 1}
BACKWARD = {"BLOCK_ROWS": 2, "num_warps": 8, "num_stages": 1}


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward_kernel(
    x_ptr, weight_ptr, y_ptr, rows, D, stride_x, eps, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """y = cast(x / sqrt(mean x² + eps)) · weight for BLOCK_ROWS rows a program; y is contiguous `[rows, D]`."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    row = row.to(tl.int64)
    x = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    normed = (wide * rstd[:, None]).to(x.dtype).to(tl.float32)
    y = normed * weight[None, :]
    tl.store(y_ptr + row[:, None] * D + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    dweight_ptr,
    rows,
    D,
    stride_x,
    eps,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """dx, and each program's share of dweight (fp32 `[programs, D]`), over every programs-th block of rows."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    for start in range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        row = row.to(tl.int64)
        x = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)[:, None]
        normed = wide * rstd
        dweight += tl.sum(dy * normed.to(x.dtype).to(tl.float32), axis=0)
        dnormed = dy * weight[None, :]
        dx = rstd * (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / D)[:, None])
        tl.store(dx_ptr + row[:, None] * D + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + program.to(tl.int64) * D + column, dweight, mask=column < D)


@torch.library.custom_op("vapi_fast::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, y = rows_of(x), x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    grid = (triton.cdiv(len(rows), FORWARD["BLOCK_ROWS"]),)
    sizes = (len(rows), x.shape[-1], rows.stride(0))
    block = FORWARD | {"BLOCK_D": next_power_of_2(x.shape[-1])}
    launch(rms_norm_forward_kernel, grid, rows, weight.contiguous(), y, *sizes, eps, **block)
    return y


@torch.library.custom_op("vapi_fast::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, dx = rows_of(x), x.new_empty(x.shape)
    programs = min(triton.cdiv(len(rows), BACKWARD["BLOCK_ROWS"]), 2 * multiprocessors(x.device))
    dweight = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
    tensors = (dy.contiguous(), rows, weight.contiguous(), dx, dweight)
    sizes = (len(rows), x.shape[-1], rows.stride(0))
    block = BACKWARD | {"BLOCK_D": next_power_of_2(x.shape[-1])}
    launch(rms_norm_backward_kernel, (programs,), *tensors, *sizes, eps, **block)
    return dx, dweight.sum(0).to(weight.dtype)


rms_norm_op.register_fake(lambda x, weight, eps: x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)))
rms_norm_backward_op.register_fake(lambda dy, x, weight, eps: (x.new_empty(x.shape), weight.new_empty(weight.shape)))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *rms_norm_backward_op(dy, *ctx.saved_tensors, ctx.eps), None


rms_norm_op.register_autograd(_gradient, setup_context=_context)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm in one pass; see `vapi_fast.ops.rms_norm`."""
    check_dtypes("rms_norm", x=x, weight=weight)
    return rms_norm_op(x, weight, eps)
