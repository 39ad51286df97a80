"""Distances of images: LPIPS from its features, and MSE; of a group to its image, and of pairs."""

from __future__ import annotations

from cases import Sizes
from operations import BOTH, Operation, share, test_operation
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "test_operation"]


def normalized_differences(a: list[Tensor], b: list[Tensor], weights: list[Tensor]) -> Tensor:
    """LPIPS in the features' own precision, the reference broadcast over the group."""

    def level(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        b = F.normalize(b, dim=-3, eps=1e-10)
        difference = F.normalize(a, dim=-3, eps=1e-10) - (b[:, None] if a.ndim > b.ndim else b)
        return (difference.square().mean((-2, -1)) * weight).sum(-1)

    return sum(level(*each) for each in zip(a, b, weights, strict=True))


def mse_loss(a: Tensor, b: Tensor) -> Tensor:
    b = (b[:, None] if a.ndim > b.ndim else b).expand_as(a)
    return F.mse_loss(a, b, reduction="none").mean((-3, -2, -1))


def padded_pixels(images: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.pad((images - shift[:, None, None]) / scale[:, None, None], (0, 0, 0, 0, 0, 5))


def normalized_and_pooled(a: Tensor, b: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pooled = F.max_pool2d(a.flatten(0, 1), 2).unflatten(0, a.shape[:2]), F.max_pool2d(b, 2)
    return before + normalized_differences([a], [b], [weight]), *pooled


def features(s: Sizes) -> int:
    """Numbers in an image's five maps."""
    return sum(channels * side**2 for channels, side in s.levels)


def first_level(s: Sizes) -> int:
    channels, side = s.levels[0]
    return channels * side**2


def image(s: Sizes) -> int:
    return 3 * s.pixels**2


OPERATIONS = [
    Operation(
        "lpips_distance",
        ("own precision", normalized_differences),
        lambda s, e: (e * s.images * (s.group + 1) * features(s), 0),
        targets=share(0.80),
    ),
    Operation(
        "lpips_distance of pairs",
        ("own precision", normalized_differences),
        lambda s, e: (2 * e * s.images * features(s), 3 * e * s.images * features(s)),
        forward=False,
        targets=share(0.80, BOTH),
    ),
    Operation(
        "lpips_distance_max_pool",
        ("own precision, F.max_pool2d", normalized_and_pooled),
        lambda s, e: (e * s.images * (s.group + 1) * first_level(s) * 5 // 4, 0),
        targets=share(0.80),
    ),
    Operation("mse", ("F.mse_loss", mse_loss), lambda s, e: (e * s.images * (s.group + 1) * image(s), 0)),
    Operation(
        "mse of pairs",
        ("F.mse_loss", mse_loss),
        lambda s, e: (2 * e * s.images * image(s), 3 * e * s.images * image(s)),
        forward=False,
    ),
    Operation(
        "scaled_pixels",
        ("F.pad", padded_pixels),
        lambda s, e: (e * s.images * (3 + 8) * s.pixels**2, 0),
        targets=share(0.80),
    ),
]
