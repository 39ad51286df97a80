"""The transformer's pointwise operations: rotation of queries and keys, SwiGLU."""

from __future__ import annotations

import torch
from operations import BOTH, FORWARD, Operation, share, test_operation, wide
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "test_operation"]


def complex_rotation(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(wide(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(table)[:, None]).flatten(-2).to(x.dtype)


def liger(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


OPERATIONS = [
    Operation(
        "rotary_2d",
        ("complex numbers", complex_rotation),
        lambda s, e: (2 * e * s.rows * s.heads * s.head_dim, 2 * e * s.rows * s.heads * s.head_dim),
        targets=share(0.80, FORWARD, BOTH),
    ),
    Operation(
        "swiglu",
        ("F.silu", lambda gate, up: F.silu(gate) * up),
        lambda s, e: (3 * e * s.rows * s.hidden, 5 * e * s.rows * s.hidden),
        liger=liger,
        targets=share(0.80, FORWARD, BOTH),
    ),
]
