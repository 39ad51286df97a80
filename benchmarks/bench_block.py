"""A transformer block's own forward and backward against autograd's through plain PyTorch.

On a GPU one of LlamaGen-XXL in bf16: our weights are cast before, as once in a step, and the plain form's by autocast
in each forward, as published; gradients are added to those of the call before. On a CPU a small one in float32.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from cases import Source
from operations import relative
from race import Contestant, Race
from torch import Tensor

from vapi_fast.models import LlamaGenConfig
from vapi_fast.models.recompute import cast_once
from vapi_fast.models.transformer import Block

if TYPE_CHECKING:
    from conftest import Guard

# Of the gradients, the worst one's relative L2 against the plain block's in float64.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
SETS = 4


def test_block(guard: Guard) -> None:
    from reference_step import block as plain_block

    bench, device = guard.bench, guard.bench.device
    sizes, dtype = bench.sizes, bench.dtype
    with device:
        ours = Block(LlamaGenConfig(layers=1, heads=sizes.heads, width=sizes.width))
    rotary = Source(device, dtype).rotations(sizes.tokens, sizes.head_dim)
    plain, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()

    def inputs() -> tuple[Tensor, Tensor]:
        """States, and the gradient to what becomes of them."""
        x, gradient = torch.randn(2, sizes.images, sizes.tokens, sizes.width, device=device, dtype=dtype)
        return x.requires_grad_(), gradient

    def own(x: Tensor) -> Tensor:
        h, branch = ours(x, None, rotary, None, None, 0, None)
        return h + branch

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return plain_block(plain, x, rotary)

    def run(form: Callable[[Tensor], Tensor]) -> Callable[[tuple[Tensor, Tensor]], None]:
        def both(given: tuple[Tensor, Tensor]) -> None:
            x, gradient = given
            x.grad = None
            form(x).backward(gradient)

        return both

    def gradients(x: Tensor, block: Block) -> list[Tensor]:
        return [x.grad, *(parameter.grad for parameter in block.parameters())]

    x, gradient = inputs()
    with cast_once(ours, dtype):
        run(own)((x, gradient))
    wide = x.detach().double().requires_grad_()
    run(lambda x: plain_block(exact, x, rotary.double()))((wide, gradient.double()))
    error = max(map(relative, gradients(x, ours), gradients(wide, exact)))
    with cast_once(ours, dtype):  # as the micro-batches of a step have it
        sets = itertools.cycle([(x, gradient), *(inputs() for _ in range(SETS - 1))])
        race = Race(run(own), {"autograd": Contestant(run(autocast))}, sets)
        race.warm_up()
        row = guard.measure(
            "block forward+backward",
            race,
            references=["autograd"],
            error=error,
            bound=BOUND[dtype],
            seconds=2 * bench.seconds,
            fewest=20,
            rows=sizes.rows,
            host_seconds={name: each.host_seconds for name, each in race.contestants.items()},
        )
    guard.judge(row)
