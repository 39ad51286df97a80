"""The precision in which every reference operation computes."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: fp16 and bf16 inputs accumulate in fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context in which matrix products keep the precision of their inputs, also inside a caller's autocast."""
    return torch.autocast(tensor.device.type, enabled=False)
