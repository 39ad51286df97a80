"""The sum that a residual stream ends with before its resolution changes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .group_norm import channels_last
from .precision import accumulation_dtype


def bias_add(h: Tensor, channel_bias: Tensor, residual: Tensor | None = None, *, pad: int = 0) -> Tensor:
    """h + channel_bias + residual; see `vapi_fast.ops.bias_add`."""
    dtype = accumulation_dtype(*(each for each in (h, channel_bias, residual) if each is not None))
    total = h.to(dtype) + channel_bias.to(dtype)[:, None, None]
    if residual is not None:
        total += residual.to(dtype)
    total = channels_last(total.to(h.dtype))
    return F.pad(total, (0, pad, 0, pad)) if pad else total  # a copy, even where nothing is added
