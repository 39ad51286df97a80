"""Dropout with masks by counters. Bound by memory bandwidth: 2 bytes of x (x read, y written), forward and backward.

Four random words serve eight elements: about 15 integer instructions each. The backward draws the mask again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_dtypes, contiguous, launch, next_power_of_2, rows_of, seed_tensor
from .philox import DROPOUT, random_words

HALVES = tl.constexpr(8)  # 16-bit numbers in four words
SETTINGS = {"BLOCK_ROWS": 4, "num_warps": 8, "num_stages": 1}


@triton.jit(do_not_specialize=["rows", "length", "threshold", "site"])
def dropout_kernel(
    x_ptr,
    seed_ptr,
    sample_ids_ptr,
    y_ptr,
    rows,
    length,
    D,
    stride_x,
    threshold,
    scale,
    site,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """y, contiguous `[rows, D]`: zero where the 16-bit number is below `threshold`, else x · scale.

    Rows are the positions of one sample after another, `length` each.
    """
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    inside = row < rows
    sample_id = row // length
    if sample_ids_ptr is not None:
        sample_id = tl.load(sample_ids_ptr + sample_id, mask=inside, other=0)
    columns = (D + HALVES - 1) // HALVES
    column = tl.arange(0, BLOCK_COLUMNS)
    counter = (length - 1 - row % length)[:, None] * columns + column[None, :]
    word0, word1, word2, word3 = random_words(tl.load(seed_ptr), counter, site, sample_id[:, None], DROPOUT)
    for half in tl.static_range(HALVES):
        word = word0 if half < 2 else (word1 if half < 4 else (word2 if half < 6 else word3))
        bits = ((word >> (16 * (half % 2))) & 0xFFFF).to(tl.int32)
        here = (half * columns + column)[None, :]
        mask = inside[:, None] & (column < columns)[None, :] & (here < D)
        x = tl.load(x_ptr + row[:, None] * stride_x + here, mask=mask, other=0.0).to(tl.float32)
        y = tl.where(bits < threshold, 0.0, x * scale)
        tl.store(y_ptr + row[:, None] * D + here, y.to(y_ptr.dtype.element_ty), mask=mask)


def dropout_forward(x: Tensor, p: float, site: int, seed: Tensor, sample_ids: Tensor | None) -> Tensor:
    """x without a share p, without autograd; also its own gradient."""
    rows, y = rows_of(x), x.new_empty(x.shape)
    grid = (triton.cdiv(len(rows), SETTINGS["BLOCK_ROWS"]),)
    sizes = (len(rows), x.shape[1], x.shape[2], rows.stride(0))
    block = SETTINGS | {"BLOCK_COLUMNS": next_power_of_2(triton.cdiv(x.shape[2], HALVES.value))}
    draw = (math.ceil(p * 2**16), 1 / (1 - p), site & 0xFFFFFFFF)
    launch(dropout_kernel, grid, rows, seed, contiguous(sample_ids), y, *sizes, *draw, **block)
    return y


dropout_op = torch.library.custom_op("vapi_fast::dropout", dropout_forward, mutates_args=())
dropout_op.register_fake(lambda x, *_: x.new_empty(x.shape))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, ctx.site, *draw = inputs
    ctx.save_for_backward(*draw)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    return dropout_op(dy, ctx.p, ctx.site, *ctx.saved_tensors), None, None, None, None


dropout_op.register_autograd(_gradient, setup_context=_context)


def dropout(x: Tensor, p: float, *, seed: int | Tensor, site: int = 0, sample_ids: Tensor | None = None) -> Tensor:
    """Dropout in one pass; see `vapi_fast.ops.dropout`."""
    check_dtypes("dropout", x=x)
    return dropout_op(x, p, site, seed_tensor(seed, x.device), sample_ids)
