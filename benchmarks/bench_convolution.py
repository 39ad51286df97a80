"""3×3 convolution of a frozen network with bias and residual, alone and with the norm behind it."""

from __future__ import annotations

import math
from typing import Any

from bench_group_norm import alone as normed
from operations import FORWARD, Operation, share, test_operation
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "test_operation"]


def plain(x: Tensor, kernel: Tensor, channel_bias: Tensor, residual: Tensor) -> Tensor:
    return F.conv2d(x, kernel, channel_bias, padding=1) + residual


def with_norm(x: Tensor, kernel: Tensor, channel_bias: Tensor, residual: Tensor, *norm: Any) -> tuple[Tensor, Tensor]:
    total = plain(x, kernel, channel_bias, residual)
    return total, normed(total, *norm)


def at(name: str, form: Any, size: tuple[int, int], passes: int) -> Operation:
    """passes: how many times maps of this size are read or written."""

    def channels(s: Any) -> int:
        return s.maps(*size)[1]

    return Operation(
        name,
        ("F.conv2d", form),
        lambda s, e: (e * (passes * math.prod(s.maps(*size)) + 9 * channels(s) ** 2), 0),
        lambda s: (18 * channels(s) * math.prod(s.maps(*size)), 0),
        targets=share(0.55, FORWARD),
    )


OPERATIONS = [
    at("convolution C@S", plain, (1, 1), 3),
    at("convolution_group_norm_silu C@S", with_norm, (1, 1), 5),
    at("convolution_group_norm_silu 4C@S/8", with_norm, (4, 8), 5),
]
