"""The networks that scores are taken in: FID-Inception, or the tiny preset's own classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vapi_fast import tiny
from vapi_fast.evaluation.inception import load_inception
from vapi_fast.evaluation.metrics import ImageFeatures
from vapi_fast.models import LPIPS
from vapi_fast.runtime.errors import EvaluationError

SPATIAL_CHANNELS = 2  # of the tiny network's 8 × 8 positions: 128 features, as many as the pooled ones


class FeatureNetwork(NamedTuple):
    """`features` of images `[N,3,H,W]` in [−1, 1], and the network's name for reports."""

    features: Callable[[Tensor], ImageFeatures]
    name: str


def inception_network(weights: Path | None, device: torch.device) -> FeatureNetwork:
    """Inception on 8-bit images; weights as for `load_inception`."""
    return FeatureNetwork(load_inception(weights).to(device).image_features, "Inception-v3")


def tiny_network(lpips: LPIPS) -> FeatureNetwork:
    """The tiny preset's perceptual network with its classifier; raises EvaluationError for images of another size."""

    @torch.no_grad()
    def features(images: Tensor) -> ImageFeatures:
        if images.shape[2:] != (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE):
            height, width = images.shape[2:]
            raise EvaluationError(
                f"--model tiny scores images of {tiny.IMAGE_SIZE}x{tiny.IMAGE_SIZE} pixels, got {width}x{height}: pass "
                "another --model to score with Inception"
            )
        last = lpips.feature_maps(images)[-1]
        pooled = last.mean((2, 3))
        spatial = last[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return ImageFeatures(pooled, spatial, lpips.classifier(pooled))

    return FeatureNetwork(features, "tiny perceptual network")
