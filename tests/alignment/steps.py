"""One step's gradient and figures, as tests compare them."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from vapi_fast import AlignConfig
from vapi_fast.alignment.figures import METRICS
from vapi_fast.alignment.free_running import accumulate_free_gradients
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.step import Gradients, accumulate_gradients
from vapi_fast.data.dataset import ImageBatch

SEED = 11  # of `step`


def gradient(models: Models) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in models.generator.parameters()])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def step(models: Models, config: AlignConfig, batch: ImageBatch) -> tuple[dict[str, float], Tensor, Gradients]:
    """The means of METRICS, the gradient, and all that was found."""
    models.generator.zero_grad()
    accumulate = accumulate_free_gradients if config.rollouts == "free" else accumulate_gradients
    found = accumulate(models, config, batch, SEED, nullcontext)
    return dict(zip(METRICS, found.means.tolist(), strict=True)), gradient(models), found
