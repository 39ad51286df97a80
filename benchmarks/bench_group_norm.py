"""GroupNorm with SiLU: alone, behind a bias, behind a sum, and behind the four phases of an upsampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from operations import BOTH, FORWARD, Operation, share, test_operation
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "test_operation"]


def alone(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, 1e-6))


def behind_bias(h: Tensor, channel_bias: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return alone(h + channel_bias[:, None, None], weight, bias, groups)


def behind_sum(h: Tensor, residual: Tensor, channel_bias: Tensor, *norm: Any) -> tuple[Tensor, Tensor]:
    total = h + channel_bias[:, None, None] + residual
    return total, alone(total, *norm)


def behind_shuffle(h: Tensor, channel_bias: Tensor, *norm: Any) -> tuple[Tensor, Tensor]:
    """F.pixel_shuffle after each phase is cut to its pixels."""
    height, width = h.shape[2] - 1, h.shape[3] - 1
    phases = h.unflatten(1, (2, 2, -1))
    cut = [phases[:, a, b, :, a : a + height, b : b + width] for a in (0, 1) for b in (0, 1)]
    total = F.pixel_shuffle(torch.stack(cut, 2).flatten(1, 2), 2) + channel_bias[:, None, None]
    return total, alone(total, *norm)


def at(name: str, plain: tuple[str, Callable[..., Any]], size: tuple[int, int], *passes: int) -> Operation:
    """passes: how many times the forward, and the backward beyond it, read or write the map of this size."""
    maps = [*passes, 0][:2]
    return Operation(
        name,
        plain,
        lambda s, e: tuple(times * e * math.prod(s.maps(*size)) for times in maps),
        targets=share(0.80, FORWARD, *[BOTH] * (len(passes) > 1)),
    )


PLAIN, SHUFFLE = "F.group_norm", "F.pixel_shuffle"
OPERATIONS = [
    at("group_norm_silu C@S", (PLAIN, alone), (1, 1), 3, 5),
    at("group_norm_silu 2C@S/2", (PLAIN, alone), (2, 2), 3, 5),
    at("group_norm_silu 4C@S/8", (PLAIN, alone), (4, 8), 3, 5),
    at("bias_group_norm_silu C@S", (PLAIN, behind_bias), (1, 1), 3),
    at("add_group_norm_silu C@S", (PLAIN, behind_sum), (1, 1), 5),
    at("add_group_norm_silu 2C@S/2", (PLAIN, behind_sum), (2, 2), 5),
    at("add_group_norm_silu C@S phases", (SHUFFLE, behind_shuffle), (1, 1), 4),
]
