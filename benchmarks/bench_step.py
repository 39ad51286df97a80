"""A whole alignment step's forward, rollouts, reward, loss and backward against the published recipe's.

On a GPU LlamaGen-XXL with random weights and few images, in bf16; on a CPU the presets tiny and tiny-text in float32.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch
from race import YARDSTICK, Contestant, Race, yardstick

from vapi_fast import ops

if TYPE_CHECKING:
    from conftest import Guard, Step

    from vapi_fast.data.dataset import ImageBatch

SEED, LARGEST = 0, 8  # images, for which there is the most time
# Of the gradient, relative L2 against the published step's on the same rollouts. In bf16 the rollouts' rewards round,
# and with random weights they differ little, so that their advantages round much.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.3}
# Share of the images' tokens that differ from the published encoder's: on a GPU TF32 rounds, wrong ones hardly agree.
DISAGREEMENT = {torch.float32: 0.0, torch.bfloat16: 0.5}


@pytest.mark.parametrize("step", ["classes", "captions"], indirect=True)
def test_gradients(guard: Guard, step: Step) -> None:
    from comparison import relative_error
    from reference_step import CHUNK, PublishedModels, encode, published_step

    from vapi_fast.alignment.step import accumulate_gradients

    models, config = step.models, step.config
    theirs = PublishedModels.of(models)
    parameters = list(models.generator.parameters())

    def ours(batch: ImageBatch) -> None:
        models.generator.zero_grad(set_to_none=True)
        accumulate_gradients(models, config, batch, SEED, nullcontext)

    def published(batch: ImageBatch) -> None:
        models.generator.zero_grad(set_to_none=True)
        published_step(theirs, config, batch, SEED)

    first = step.batches[0]
    models.generator.zero_grad(set_to_none=True)
    found = accumulate_gradients(models, config, first, SEED, nullcontext)
    gradients = [parameter.grad for parameter in parameters]
    models.generator.zero_grad(set_to_none=True)
    published_step(theirs, config, first, SEED, tokens=found.tokens, drawn=found.rollouts)
    error = relative_error(gradients, [parameter.grad for parameter in parameters])
    del gradients
    with torch.no_grad(), ops.use_backend("reference"):
        tokens = torch.cat([encode(theirs.tokenizer, images) for images in first.images.split(CHUNK)])
    rivals = {"published": Contestant(published), YARDSTICK: yardstick(guard.bench.device)}
    race = Race(ours, rivals, itertools.cycle(step.batches))
    race.warm_up()
    row = guard.measure(
        "alignment step" + " tiny-text" * (config.model == "tiny-text"),
        race,
        seconds=guard.bench.model_seconds * len(first.images) / LARGEST,
        references=["published"],
        error=error,
        bound=BOUND[models.reward.dtype],
        disagreement=(tokens != found.tokens).double().mean().item(),
        disagreement_bound=DISAGREEMENT[models.reward.dtype],
        images=len(first.images),
        group_size=config.group_size,
        model=config.model,
    )
    guard.judge(row)
