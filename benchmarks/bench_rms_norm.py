"""RMSNorm of the transformer's states."""

from __future__ import annotations

from operations import BOTH, FORWARD, Operation, share, test_operation
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "test_operation"]


def liger(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, 1e-5, in_place=False)


OPERATIONS = [
    Operation(
        "rms_norm",
        ("F.rms_norm", lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5)),
        lambda s, e: (2 * e * s.rows * s.width, 3 * e * s.rows * s.width),
        liger=liger,
        targets=share(0.80, FORWARD, BOTH),
    )
]
