"""2-D rotary positions and SwiGLU."""

from __future__ import annotations

from torch import Tensor

from vapi_fast import reference

from .backends import implementation
from .checks import ArgumentChecks, described


def rotary_2d_table(grid_size: int, head_dim: int, prefix_len: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines for `rotary_2d`: zeros at the condition positions, then the image grid in raster order.

    Pair i of a head turns by row · base^(−4i / head_dim) in its first half, pair head_dim/4 + i by column · the same.

    grid_size ≥ 1 tokens a side, head_dim a multiple of 4, prefix_len ≥ 0 condition positions → fp32 on the CPU,
    `[prefix_len + grid_size², head_dim / 2, 2]` (cosine, sine). Raises TypeError or ValueError for an argument of the
    wrong type or range.
    """
    checks = ArgumentChecks("rotary_2d_table")
    checks.count("grid_size", grid_size, 1)
    checks.count("head_dim", head_dim, 4)
    checks.count("prefix_len", prefix_len, 0)
    checks.positive("base", base)
    if head_dim % 4:
        raise ValueError(f"rotary_2d_table: head_dim must be a multiple of 4, got {head_dim}")
    return reference.rotary_2d_table(grid_size, head_dim, prefix_len, base)


def rotary_2d(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each interleaved pair (x₂ᵢ, x₂ᵢ₊₁) of a head by its position's angle.

    x floating `[B, T, heads, head_dim]`; table floating `[T, head_dim / 2, 2]`, T rows of `rotary_2d_table`; a row of
    zeros makes x vanish → like x, with a gradient to x. Raises TypeError or ValueError for an argument of the wrong
    type, shape or device.
    """
    checks = ArgumentChecks("rotary_2d")
    checks.floating("x", x, "B T heads head_dim")
    checks.floating("table", table, "T pairs 2")
    if table.shape[1:] != (x.shape[-1] // 2, 2) or x.shape[-1] % 2:
        raise ValueError(
            f"rotary_2d: table must be [T, head_dim / 2, 2] for x with head_dim={x.shape[-1]}, got {described(table)}"
        )
    return implementation(x).rotary_2d(x, table)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up.

    gate and up floating `[..., D]` of the same shape → the same in gate's dtype, computed in fp32 (float64 for
    float64), with gradients to both. Raises TypeError or ValueError for an argument of the wrong type, shape or device.
    """
    checks = ArgumentChecks("swiglu")
    checks.floating("gate", gate, "... D")
    checks.floating("up", up, "... D")
    return implementation(gate).swiglu(gate, up)
