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


def rotate_heads(qkv: Tensor, table: Tensor) -> None:
    """`rotary_2d` of the queries and keys of a fused projection, contiguous `[B, T, 3, heads, head_dim]`, in place."""
    batch, length, _, heads, head_dim = qkv.shape
    turned = qkv[:, :, :2].view(batch, length, 2 * heads, head_dim)
    turned.copy_(rotary_2d(turned, table))


def rotate_heads_backward(dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor) -> Tensor:
    """The gradient `[B, T, 3, heads, head_dim]` to the projection, of those to rotated queries, keys, and values."""
    back = torch.stack([table[..., 0], -table[..., 1]], dim=-1)  # a rotation's transpose turns by the opposite angle
    return torch.stack([rotary_2d(dq, back), rotary_2d(dk, back), dv], dim=2)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up; see `vapi_fast.ops.swiglu`."""
    dtype = accumulation_dtype(gate, up)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


swiglu_forward = swiglu


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to both of the result's dy, and the result again; without autograd."""
    dtype = accumulation_dtype(gate, up)
    gate_wide, up_wide, dy_wide = gate.to(dtype), up.to(dtype), dy.to(dtype)
    share, silu = gate_wide.sigmoid(), F.silu(gate_wide)
    dgate = dy_wide * up_wide * share * (1 + gate_wide * (1 - share))
    return dgate.to(gate.dtype), (dy_wide * silu).to(up.dtype), (silu * up_wide).to(gate.dtype)
