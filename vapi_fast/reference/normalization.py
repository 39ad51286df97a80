"""Normalisation layers: of the tokenizer (GroupNorm with SiLU) and of the transformer (RMSNorm)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import accumulation_dtype


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """SiLU of GroupNorm; see `vapi_fast.ops.group_norm_silu`."""
    dtype = accumulation_dtype(x, weight, bias)
    return F.silu(torch.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm, the weight multiplied after the cast back; see `vapi_fast.ops.rms_norm`."""
    wide = x.to(accumulation_dtype(x))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight
