"""The whole alignment step on Triton kernels: the same rollouts, loss and gradients as on the reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from accuracy import relative_l2
from fused import DEVICE
from torch import Tensor

from vapi_fast import ops

if TYPE_CHECKING:
    from vapi_fast import AlignConfig
    from vapi_fast.alignment.models import Models
    from vapi_fast.data.dataset import ImageBatch


def figures_and_gradient(models: Models, config: AlignConfig, batch: ImageBatch) -> tuple[dict[str, float], Tensor]:
    from vapi_fast.alignment.figures import METRICS
    from vapi_fast.alignment.step import accumulate_gradients

    models.generator.zero_grad()
    means = accumulate_gradients(models, config, batch, ops.fold_seed(config.seed, 3), nullcontext).means
    figures = dict(zip(METRICS, means.tolist(), strict=True))
    return figures, torch.cat([p.grad.flatten() for p in models.generator.parameters()])


@pytest.mark.parametrize("method", ["vapi", "ste", "ntp"])
def test_a_step_is_the_same_on_both_backends(
    tiny_config: Callable[..., AlignConfig], tiny_batch: ImageBatch, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 throughout: bf16 or TF32 would carry draws and gradients further apart than a wrong kernel."""
    from vapi_fast.alignment import rollout
    from vapi_fast.alignment.models import load_models
    from vapi_fast.alignment.reward import PixelReward

    monkeypatch.setattr(rollout, "AUTOCAST", set())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    side = 32 if DEVICE.type == "cuda" else 16  # pixels: the interpreter takes a minute at the preset's size
    small = {"group_size": 2, "batch_size": 2, "micro_batch": 2, "image_size": side}
    config = tiny_config(method=method, noise_prob=0.3, **small)
    models = load_models(config, DEVICE)
    models = replace(models, reward=PixelReward(models.tokenizer, models.reward.lpips, dtype=torch.float32))
    batch = tiny_batch.take(slice(2)).to(DEVICE)
    batch = batch._replace(images=batch.images[..., :side, :side].contiguous())
    with ops.use_backend("reference"):
        expected, expected_gradient = figures_and_gradient(models, config, batch)
    with ops.use_backend("triton"):
        figures, gradient = figures_and_gradient(models, config, batch)
    assert figures == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert relative_l2(gradient, expected_gradient.double()) < 1e-4


def test_generation_draws_the_same_tokens_on_both_backends(tiny_config: Callable[..., AlignConfig]) -> None:
    from vapi_fast.generation.sequences import generate
    from vapi_fast.models import LlamaGen

    grid_size = 8 if DEVICE.type == "cuda" else 3  # the interpreter takes seconds a token
    generator = LlamaGen.from_checkpoint(tiny_config().gpt_ckpt, "tiny", grid_size=grid_size).to(DEVICE).eval()
    labels = torch.tensor([3, 7], device=DEVICE)
    drawn = {}
    for name in ("reference", "triton"):
        with ops.use_backend(name):
            drawn[name] = generate(generator, labels, seed=5, cfg_scale=1.5, top_k=100, top_p=0.95)
    assert torch.equal(drawn["triton"], drawn["reference"])
