"""The sum that a residual stream ends with before its resolution changes, alone and padded."""

from __future__ import annotations

import math
from collections.abc import Callable

from cases import Sizes
from operations import Operation, share, test_operation
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "test_operation"]


def added(h: Tensor, channel_bias: Tensor, residual: Tensor) -> Tensor:
    return h + channel_bias[:, None, None] + residual


def padded(h: Tensor, channel_bias: Tensor, residual: Tensor) -> Tensor:
    return F.pad(added(h, channel_bias, residual), (0, 1, 0, 1))


def at(name: str, plain: tuple[str, Callable[..., Tensor]], pad: int) -> Operation:
    def moved(s: Sizes, e: int) -> tuple[int, int]:
        batch, channels, height, width = s.maps(1, 1)
        written = batch * channels * (height + pad) * (width + pad)
        return e * (2 * math.prod(s.maps(1, 1)) + written), 0

    return Operation(name, plain, moved, targets=share(0.85))


OPERATIONS = [at("bias_add C@S", ("two sums", added), 0), at("bias_add C@S padded", ("sums, F.pad", padded), 1)]
