"""The language-model head."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from .precision import accumulation_dtype, full_precision


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden `[..., D]`, weight `[V, D]`, bias `[V]` → logits `[..., V]` in the accumulation dtype."""
    dtype = accumulation_dtype(hidden, weight)
    with full_precision(hidden):
        return linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
