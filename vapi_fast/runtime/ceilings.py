"""What a device can do at most: a large copy and a large matrix product, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vapi_fast.runtime.clock import Timeline, timeline

WARM_UPS, ROUNDS = 3, 10


@dataclass(frozen=True)
class Ceilings:
    """`copy`: bytes a second, read and written counted; `matmul`: FLOPs a second, on a GPU of 16-bit numbers.

    `single_share`: of `matmul` that products of float32 can reach; NVIDIA's TF32 has half by specification.
    """

    copy: float
    matmul: float
    single_share: float = 0.5

    @property
    def single(self) -> float:
        return self.single_share * self.matmul


def measure(device: torch.device) -> Ceilings:
    """On a GPU 2 GiB copied and a bf16 product of 8192³, on a CPU 32 MiB and an fp32 product of 512³.

    Takes a tenth of a second, and on a GPU 4 GiB of its memory meanwhile. The factors are random: of zeros, a GPU
    multiplies more, as it draws less power.
    """
    gpu = device.type == "cuda"
    dtype, side, count = (torch.bfloat16, 8192, 2**30) if gpu else (torch.float32, 512, 2**23)
    source = torch.ones(count, device=device, dtype=dtype)
    copied = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    line = timeline(device)
    copy = fastest_seconds(line, lambda: copied.copy_(source))
    product = fastest_seconds(line, lambda: torch.mm(a, b))
    return Ceilings(2 * source.nbytes / copy, 2 * side**3 / product, 0.5 if gpu else 1.0)


def fastest_seconds(line: Timeline, run: Callable[[], object]) -> float:
    """The least of rounds one right after the other, so that a GPU never waits for the host."""
    for _ in range(WARM_UPS):
        run()
    marks = [line.mark()]
    for _ in range(ROUNDS):
        run()
        marks.append(line.mark())
    line.wait(marks[-1])
    return min(map(line.seconds, marks, marks[1:]))
