"""RMSNorm, and what a residual stream fuses with it. Bound by memory bandwidth.

| kernel   | bytes moved (x: bytes of the input)                                | FLOPs per element |
|----------|--------------------------------------------------------------------|-------------------|
| forward  | 2x (x read, y written); with a sum 4x (branch read, sum written)   | 4, 5              |
| backward | 3x (x and dy read, dx written); in a stream 5x (dsum read, y too)  | 10, 12            |

In a block of a transformer, of 28.3 MB a map (16 × 576 × 1536, bf16): sum and norm in one kernel forward 113 MB instead
of 142; backward, where the norm is wanted again and its gradient joins the stream's, 142 MB instead of 226. Predicted
for an H100 with 3.0 TB/s at 0.86 of it: 0.044 instead of 0.055 ms, 0.055 instead of 0.088 ms, two of each a layer.

The weight's gradient is left in shares, one a program, 1.6 MB in all. In a step of several micro-batches the kernel
adds to the shares that it finds (3.2 MB, as many as writing them and reading them for a sum), and they are summed up
once: of eight micro-batches and 97 norms by two launches in place of 97 · 15, for 157 MB of memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_dtypes, contiguous, launch, multiprocessors, next_power_of_2, rows_of

FORWARD = {"BLOCK_ROWS": 4, "num_warps": 8, "num_stages": 1}
BACKWARD = {"BLOCK_ROWS": 2, "num_warps": 8, "num_stages": 1}


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    rows,
    D,
    stride_x,
    stride_branch,
    eps,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """y = cast(x / sqrt(mean x² + eps)) · weight for BLOCK_ROWS rows a program; y is contiguous `[rows, D]`.

    With a branch x is the sum of the two, rounded and written to `sum_ptr`, contiguous; else both are None.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    row = row.to(tl.int64)
    x = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + row[:, None] * stride_branch + column[None, :], mask=inside, other=0.0)
        x = (x.to(tl.float32) + branch.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row[:, None] * D + column[None, :], x, mask=inside)
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
    dsum_ptr,
    dx_ptr,
    dweight_ptr,
    y_ptr,
    rows,
    D,
    stride_x,
    eps,
    ADD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """dx, and each program's share of dweight (fp32 `[programs, D]`), over every programs-th block of rows.

    dsum: what else comes to x, contiguous, or None. y: the norm itself once more, contiguous, or None. ADD: to the
    shares that are there.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    share_ptr = dweight_ptr + program.to(tl.int64) * D + column
    dweight = tl.zeros([BLOCK_D], tl.float32)
    if ADD:
        dweight += tl.load(share_ptr, mask=column < D, other=0.0)
    for start in range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        row = row.to(tl.int64)
        here = row[:, None] * D + column[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + here, mask=inside, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)[:, None]
        normed = wide * rstd
        rounded = normed.to(x.dtype).to(tl.float32)
        dweight += tl.sum(dy * rounded, axis=0)
        if y_ptr is not None:
            y = rounded * weight[None, :]
            tl.store(y_ptr + here, y.to(y_ptr.dtype.element_ty), mask=inside)
        dnormed = dy * weight[None, :]
        dx = rstd * (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / D)[:, None])
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(share_ptr, dweight, mask=column < D)


def programs_of(rows: int, width: int, settings: dict[str, int]) -> tuple[int, dict[str, int]]:
    """Programs for all rows, and settings."""
    return -(-rows // settings["BLOCK_ROWS"]), settings | {"BLOCK_D": next_power_of_2(width)}


def normalised(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The sum of x and a branch, if there is one (else x), and its norm in `dtype`, contiguous."""
    rows, y = rows_of(x), x.new_empty(x.shape, dtype=dtype)
    total = None if branch is None else x.new_empty(x.shape)
    other = None if branch is None else rows_of(branch)
    programs, block = programs_of(*rows.shape, FORWARD)
    sizes = (*rows.shape, rows.stride(0), 0 if other is None else other.stride(0))
    launch(rms_norm_forward_kernel, (programs,), rows, other, weight.contiguous(), total, y, *sizes, eps, **block)
    return x if total is None else total, y


def norm_shares(device: torch.device) -> int:
    """Parts that the gradient of a norm's weight is summed up in."""
    return 2 * multiprocessors(device)


def rms_norm_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    dsum: Tensor | None = None,
    y: Tensor | None = None,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients to x, with `dsum` added where there is one, and to the weight in fp32; y: takes the norm once more.

    shares: as of `add_norm_backward`.
    """
    rows, dx = rows_of(x), x.new_empty(x.shape)
    programs, block = programs_of(*rows.shape, BACKWARD)
    programs = min(programs, norm_shares(x.device) if shares is None else len(shares))
    dweight = x.new_empty(programs, x.shape[-1], dtype=torch.float32) if shares is None else shares
    tensors = (dy.contiguous(), rows, weight.contiguous(), contiguous(dsum), dx, dweight, y)
    sizes = (*rows.shape, rows.stride(0))
    launch(rms_norm_backward_kernel, (programs,), *tensors, *sizes, eps, ADD=shares is not None, **block)
    return dx, dweight.sum(0) if shares is None else None


def add_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Sum and norm of a residual stream, without autograd; see `vapi_fast.reference.rms_norm.add_norm`."""
    check_dtypes("add_norm", x=x, branch=branch, weight=weight)
    return normalised(x, branch, weight, eps, x.dtype)


def add_norm_backward(
    dy: Tensor, total: Tensor, weight: Tensor, eps: float, dtotal: Tensor | None, shares: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Its gradients, and the norm again; see `vapi_fast.reference.rms_norm.add_norm_backward`."""
    y = dy.new_empty(dy.shape)
    return *rms_norm_gradients(dy, total, weight, eps, dtotal, y, shares), y


@torch.library.custom_op("vapi_fast::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return normalised(x, None, weight, eps, torch.promote_types(x.dtype, weight.dtype))[1]


@torch.library.custom_op("vapi_fast::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dx, dweight = rms_norm_gradients(dy, x, weight, eps)
    return dx, dweight.to(weight.dtype)


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
