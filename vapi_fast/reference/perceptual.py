"""Distances between images that make up the reward, and the pixels as a perceptual network takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import accumulation_dtype

CHANNEL_EPS = 1e-10


def lpips_distance(features_a: Sequence[Tensor], features_b: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """LPIPS from the feature maps of two image sets; see `vapi_fast.ops.lpips_distance`."""
    return sum(level_distance(a, b, w) for a, b, w in zip(features_a, features_b, weights, strict=True))


def lpips_distance_max_pool(
    features_a: Tensor, features_b: Tensor, weight: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A level's distance, and both maps 2×2-pooled; see `vapi_fast.ops.lpips_distance_max_pool`."""
    distance = level_distance(features_a, features_b, weight)
    pooled = []
    for x in (features_a, features_b):
        maps = F.max_pool2d(x.flatten(0, -4), 2).contiguous(memory_format=torch.channels_last)
        pooled.append(maps.unflatten(0, x.shape[:-3]))
    return distance if before is None else before + distance, *pooled


def level_distance(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    dtype = accumulation_dtype(a, b)
    unit_a, unit_b = unit_channels(a.to(dtype)), unit_channels(b.to(dtype))
    if a.ndim > b.ndim:
        unit_b = unit_b[:, None]
    return ((unit_a - unit_b).square().mean((-2, -1)) * weight.to(dtype)).sum(-1)


def unit_channels(features: Tensor) -> Tensor:
    # vector_norm's gradient at the zero vector is zero, where that of sqrt(Σ x²) would be NaN.
    return features / (torch.linalg.vector_norm(features, dim=-3, keepdim=True) + CHANNEL_EPS)


def scaled_pixels(
    images: Tensor, shift: Tensor, scale: Tensor, *, channels: int, dtype: torch.dtype | None = None
) -> Tensor:
    """(images − shift) / scale; see `vapi_fast.ops.scaled_pixels`."""
    wide = accumulation_dtype(images, shift, scale)
    scaled = (images.to(wide) - shift.to(wide)[:, None, None]) / scale.to(wide)[:, None, None]
    scaled = scaled.to(images.dtype if dtype is None else dtype, memory_format=torch.channels_last)
    more = channels - len(shift)
    return F.pad(scaled, (0, 0, 0, 0, 0, more)) if more else scaled


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error per image; see `vapi_fast.ops.mse`."""
    dtype = accumulation_dtype(a, b)
    difference = a.to(dtype) - (b[:, None] if a.ndim > b.ndim else b).to(dtype)
    return difference.square().mean((-3, -2, -1))
