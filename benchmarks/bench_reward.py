"""The pixel reward of a group of rollouts against the published way: eight at a time, both images through LPIPS.

On a GPU at 384² with random weights, ours in bf16; on a CPU the tiny preset.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from race import YARDSTICK, Contestant, Race, yardstick
from torch import Tensor

from vapi_fast import ops

if TYPE_CHECKING:
    from conftest import Guard, Step

# Of a reward, relative to the published float32 one's: rounding, and on a GPU that of bf16 and TF32.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def test_score(guard: Guard, step: Step) -> None:
    from reference_step import PublishedModels, score

    models, config = step.models, step.config
    theirs = PublishedModels.of(models)

    def drawn(tokens: Tensor) -> Tensor:
        """Rollouts `[B,G,T]`: as close to the image as those of a good generator, three tokens in four its own."""
        grouped = tokens[:, None].repeat(1, config.group_size, 1)
        return torch.where(torch.rand(grouped.shape, device=tokens.device) < 0.25, grouped.roll(1, -1), grouped)

    def ours(inputs: tuple[Tensor, Tensor]) -> Tensor:
        return models.reward.score(*inputs).total

    def published(inputs: tuple[Tensor, Tensor]) -> Tensor:
        rollouts, images = inputs
        repeated = images.repeat_interleave(config.group_size, 0)
        with ops.use_backend("reference"):
            rewards = score(theirs, config, rollouts.flatten(0, 1), repeated, nullcontext)["reward"]
        return rewards.view(rollouts.shape[:2])

    inputs = [(drawn(models.codec.encode(batch.images)), batch.images) for batch in step.batches]
    expected = published(inputs[0])
    error = ((ours(inputs[0]) - expected) / expected).abs().max().item()
    rivals = {"published": Contestant(published), YARDSTICK: yardstick(guard.bench.device)}
    race = Race(ours, rivals, itertools.cycle(inputs))
    race.warm_up()
    about = {"rollouts": inputs[0][0].shape[:2].numel(), "model": config.model}
    bound = BOUND[models.reward.dtype]
    guard.judge(guard.measure("reward score", race, references=["published"], error=error, bound=bound, **about))
