"""What this device can do at most, measured: a large copy and a large matrix product.

python benchmarks/ceilings.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import timed
from torch import Tensor

ROUNDS = 10


@dataclass(frozen=True)
class Ceilings:
    """`copy`: bytes a second, read and written counted; `matmul`: FLOPs a second."""

    copy: float
    matmul: float


def measure(device: torch.device) -> Ceilings:
    """On a GPU 2 GiB copied and a bf16 product of 8192³, on a CPU 32 MiB and an fp32 product of 512³."""
    gpu = device.type == "cuda"
    dtype, side, count = (torch.bfloat16, 8192, 2**30) if gpu else (torch.float32, 512, 2**23)
    source = torch.randn(count, device=device, dtype=dtype)
    copy = median(torch.empty_like(source).copy_, source)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return Ceilings(2 * source.nbytes / copy, 2 * side**3 / median(torch.mm, a, b))


def median(run: Callable[..., Tensor], *arguments: Tensor) -> float:
    for _ in range(3):
        run(*arguments)
    return statistics.median(timed(lambda: run(*arguments), held=1e-3) for _ in range(ROUNDS))


if __name__ == "__main__":
    found = measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"copy {found.copy / 1e9:.0f} GB/s, matrix product {found.matmul / 1e12:.2f} TFLOP/s")
