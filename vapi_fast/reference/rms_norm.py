"""RMSNorm, the transformer's normalisation."""

from __future__ import annotations

from torch import Tensor

from .precision import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm, the weight multiplied after the cast back; see `vapi_fast.ops.rms_norm`."""
    wide = x.to(accumulation_dtype(x))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight
