"""Dropout of the transformer's states."""

from __future__ import annotations

import math

import torch
from operations import BOTH, FORWARD, Operation, share, test_operation, words
from torch import Tensor
from torch.nn import functional as F

from vapi_fast.reference.philox import DROPOUT

__all__ = ["OPERATIONS", "test_operation"]


def drawn(x: Tensor) -> Tensor:
    """p is 0.1, the site 1; positions count from the last."""
    batch, length, width = x.shape
    columns = -(-width // 8)
    found = words(batch, length * columns, 1, DROPOUT, x.device)
    halves = [half.view(batch, length, columns).flip(1) for word in found for half in (word % 2**16, word // 2**16)]
    dropped = torch.cat(halves, dim=-1)[..., :width] < math.ceil(0.1 * 2**16)
    return x * ~dropped / 0.9


OPERATIONS = [
    Operation(
        "dropout",
        ("F.dropout", lambda x: F.dropout(x, 0.1)),
        lambda s, e: (2 * e * s.rows * s.width, 2 * e * s.rows * s.width),
        drawn=drawn,
        targets=share(0.80, FORWARD, BOTH),
    )
]
