"""The precision in which every reference operation computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: fp16 and bf16 inputs accumulate in fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which matrix products keep the precision of their inputs, also inside a caller's autocast."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """out = a · b, or out += a · b, with fp32 sums and outside a caller's autocast.

    a `[m, k]` and b `[k, n]` of one dtype, out `[m, n]` of the same or fp32; gaps between rows or columns are fine.
    """
    with full_precision(a):
        if not a.is_cuda:  # `out_dtype` is for CUDA alone
            result = torch.mm(a.float(), b.float())
            out.add_(result) if accumulate else out.copy_(result)
            return
        wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
        if accumulate:
            torch.addmm(out, a, b, out=out, **wider)
        else:
            torch.mm(a, b, out=out, **wider)
