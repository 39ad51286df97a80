"""Distances between images that make up the reward, and the pixels as a perceptual network takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import implementation
from .checks import FLOATING, ArgumentChecks, described

MAX_CHANNELS = 1024  # of pixels: a kernel holds those of one


def lpips_distance(features_a: Sequence[Tensor], features_b: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """LPIPS distance from feature maps; the reference image's are given once per group.

    d = Σ_l mean_hw Σ_c w_lc (â − b̂)², with â = a / (|a| + 1e-10) over channels (Zhang et al. 2018, arXiv 1801.03924).

    Args:
        features_a: one map a level, floating `[B, C, H, W]` each, or `[B, G, C, H, W]` each.
        features_b: one map a level, floating `[B, C, H, W]`; broadcast over G.
        weights: one vector a level, floating `[C]`, non-negative.

    Returns:
        `[B]` or `[B, G]`, fp32 (float64 for float64), with gradients to features and weights; that of an all-zero
        feature vector is finite.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device, or lists of different lengths.
    """
    for name, sequence in (("features_a", features_a), ("features_b", features_b), ("weights", weights)):
        if not isinstance(sequence, list | tuple):
            raise TypeError(f"lpips_distance: {name} must be a list or tuple of tensors, got {described(sequence)}")
    levels = len(features_a), len(features_b), len(weights)
    if not levels[0] == levels[1] == levels[2] > 0:
        raise ValueError(
            "lpips_distance: features_a, features_b and weights must have the same number of levels (at least one), "
            f"got {levels[0]}, {levels[1]} and {levels[2]}"
        )
    grouped = isinstance(features_a[0], Tensor) and features_a[0].ndim == 5
    batch = ArgumentChecks("lpips_distance")
    for level, (a, b, weight) in enumerate(zip(features_a, features_b, weights, strict=True)):
        checks = ArgumentChecks("lpips_distance")
        checks.sizes.update({dim: size for dim, size in batch.sizes.items() if dim in ("B", "G")})
        checks.floating(f"features_a[{level}]", a, "B G C H W" if grouped else "B C H W")
        checks.not_empty(f"features_a[{level}]", "C", "H", "W")
        checks.floating(f"features_b[{level}]", b, "B C H W")
        checks.floating(f"weights[{level}]", weight, "C")
        batch = checks
    return implementation(features_a[0]).lpips_distance(features_a, features_b, weights)


def lpips_distance_max_pool(
    features_a: Tensor, features_b: Tensor, weight: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One level of `lpips_distance`, and the level's maps as the network goes on with them: for inference.

    Args:
        features_a: floating `[B, C, H, W]` or `[B, G, C, H, W]`, H and W at least 2.
        features_b: floating `[B, C, H, W]`; broadcast over G.
        weight: floating `[C]`, non-negative.
        before: the distance of the levels before, floating `[B]` or `[B, G]`, to which this one's is added.

    Returns:
        Distances `[B]` or `[B, G]`, fp32 (float64 for float64), and `[B, (G,) C, H // 2, W // 2]` of features_a and of
        features_b, channels last in memory: the largest of every 2×2 pixels, NaN if one of them is.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device, or a gradient would be wanted.
    """
    checks = ArgumentChecks("lpips_distance_max_pool")
    lead = "B G" if isinstance(features_a, Tensor) and features_a.ndim == 5 else "B"
    checks.floating("features_a", features_a, f"{lead} C H W")
    checks.not_empty("features_a", "C")
    if min(features_a.shape[-2:]) < 2:
        raise ValueError(f"lpips_distance_max_pool: features_a must have H and W > 1, got {described(features_a)}")
    checks.floating("features_b", features_b, "B C H W")
    checks.floating("weight", weight, "C")
    if before is not None:
        checks.floating("before", before, lead)
    checks.no_gradient("lpips_distance", features_a=features_a, features_b=features_b, weight=weight, before=before)
    return implementation(features_a).lpips_distance_max_pool(features_a, features_b, weight, before)


def scaled_pixels(
    images: Tensor, shift: Tensor, scale: Tensor, *, channels: int, dtype: torch.dtype | None = None
) -> Tensor:
    """(images − shift) / scale for inference, with more channels of zeros, as a network's first convolution takes them.

    images floating `[B, C, H, W]`, shift and scale floating `[C]`, channels from C to 1024 → `[B, channels, H, W]` of
    `dtype` (floating; None: the images'), channels-last. Computed in fp32 (float64 for float64). Raises TypeError or
    ValueError for an argument of the wrong type, shape, device or range, and ValueError where a gradient would be
    wanted.
    """
    checks = ArgumentChecks("scaled_pixels")
    checks.floating("images", images, "B C H W")
    checks.not_empty("images", "C", "H", "W")
    checks.floating("shift", shift, "C")
    checks.floating("scale", scale, "C")
    checks.count("channels", channels, checks.sizes["C"])
    if channels > MAX_CHANNELS:
        raise ValueError(f"scaled_pixels: channels must be at most {MAX_CHANNELS}, got {channels}")
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"scaled_pixels: dtype must be floating or None, got {described(dtype)}")
    checks.no_gradient("subtract and divide", images=images, shift=shift, scale=scale)
    return implementation(images).scaled_pixels(images, shift, scale, channels=channels, dtype=dtype)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each image, over channels and pixels.

    a floating `[B, C, H, W]` or `[B, G, C, H, W]`, b floating `[B, C, H, W]`, broadcast over G → `[B]` or `[B, G]`,
    fp32 (float64 for float64), with gradients to both. Raises TypeError or ValueError for an argument of the wrong
    type, shape or device.
    """
    checks = ArgumentChecks("mse")
    checks.floating("a", a, "B G C H W" if isinstance(a, Tensor) and a.ndim == 5 else "B C H W")
    checks.not_empty("a", "C", "H", "W")
    checks.floating("b", b, "B C H W")
    return implementation(a).mse(a, b)
