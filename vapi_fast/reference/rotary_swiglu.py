"""2-D rotary positions and SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import accumulation_dtype


def rotary_2d_table(grid_size: int, head_dim: int, prefix_len: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines of the 2-D rotary positions; see `vapi_fast.ops.rotary_2d_table`."""
    quarter = head_dim // 4
    frequencies = 1.0 / base ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float32)[:, None] * frequencies  # [grid_size, head_dim / 4]
    by_row = angles.repeat_interleave(grid_size, dim=0)
    by_column = angles.repeat(grid_size, 1)
    pairs = torch.cat([by_row, by_column], dim=-1)
    table = torch.stack([pairs.cos(), pairs.sin()], dim=-1)
    return torch.cat([table.new_zeros(prefix_len, *table.shape[1:]), table])


def rotary_2d(x: Tensor, table: Tensor) -> Tensor:
    """Rotation of interleaved pairs by position; see `vapi_fast.ops.rotary_2d`."""
    dtype = accumulation_dtype(x)
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table.to(dtype)[:, None].unbind(-1)  # [T, 1, head_dim / 2]
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up; see `vapi_fast.ops.swiglu`."""
    dtype = accumulation_dtype(gate, up)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)
