"""GroupNorm with SiLU, the tokenizer's normalisation, and what a frozen decoder fuses with it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import accumulation_dtype


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """SiLU of GroupNorm; see `vapi_fast.ops.group_norm_silu`."""
    dtype = accumulation_dtype(x, weight, bias)
    return F.silu(torch.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps)).to(x.dtype)


def bias_group_norm_silu(
    h: Tensor, channel_bias: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """SiLU of GroupNorm of h + channel_bias; see `vapi_fast.ops.bias_group_norm_silu`."""
    dtype = accumulation_dtype(h, channel_bias, weight, bias)
    return channels_last(
        group_norm_silu(h.to(dtype) + channel_bias.to(dtype)[:, None, None], weight, bias, groups, eps)
    ).to(h.dtype)


def add_group_norm_silu(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    residual: Tensor | None = None,
    channel_bias: Tensor | None = None,
    phases: bool = False,
    silu: bool = True,
    normed_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream's next map and its norm; see `vapi_fast.ops.add_group_norm_silu`."""
    given = [each for each in (h, weight, bias, residual, channel_bias) if each is not None]
    dtype = accumulation_dtype(*given)
    total = (interleaved(h) if phases else h).to(dtype, copy=not phases)
    if channel_bias is not None:
        total += channel_bias.to(dtype)[:, None, None]
    if residual is not None:
        total += residual.to(dtype)
    total = channels_last(total.to(h.dtype))
    normed = torch.group_norm(total.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps)
    normed = F.silu(normed, inplace=True) if silu else normed
    if normed_scale is not None:
        return total, channels_last(in_eight_bits(normed / normed_scale))
    return total, channels_last(normed.to(h.dtype))


def in_eight_bits(x: Tensor) -> Tensor:
    """The nearest in float8_e4m3fn, the largest of either sign beyond it."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn)


def interleaved(h: Tensor) -> Tensor:
    """Four phases `[B, 4·C, H + 1, W + 1]` → the map `[B, C, 2·H, 2·W]` whose pixels they hold in turns."""
    phases = h.unflatten(1, (2, 2, -1))
    height, width = h.shape[2] - 1, h.shape[3] - 1
    shape = (len(h), phases.shape[3], 2 * height, 2 * width)
    pixels = torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=torch.channels_last)
    for a in (0, 1):
        for b in (0, 1):
            pixels[:, :, a::2, b::2] = phases[:, a, b, :, a : a + height, b : b + width]
    return pixels


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
