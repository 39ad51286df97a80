"""Sizes at which operations are measured, and random inputs of these sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Shapes; the defaults are LlamaGen-XXL's at 384²."""

    images: int = 16
    group: int = 8
    tokens: int = 576  # a square number
    vocabulary: int = 16384
    width: int = 1536
    heads: int = 24
    head_dim: int = 64
    hidden: int = 4096
    code_width: int = 8
    pixels: int = 384  # a side
    channels: int = 128  # of the decoder at full resolution; LPIPS has half as many there
    norm_groups: int = 32
    sequences: int = 256  # decoded at once
    prefix: int = 120  # positions that a group of sequences shares

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    @property
    def logits(self) -> int:
        return self.rows * self.vocabulary

    @property
    def gemm(self) -> int:
        """FLOPs of the language-model head."""
        return 2 * self.logits * self.width


XXL = Sizes()
# The tiny preset's, in a batch of eight.
SMALL = Sizes(
    images=8,
    group=8,
    tokens=64,
    vocabulary=512,
    width=192,
    heads=6,
    head_dim=32,
    hidden=512,
    pixels=32,
    channels=32,
    norm_groups=8,
    sequences=64,
    prefix=12,
)
# No multiples of a block, so that every mask is needed.
ODD = Sizes(
    images=2,
    group=3,
    tokens=49,
    vocabulary=1000,
    width=72,
    heads=3,
    head_dim=20,
    hidden=100,
    code_width=6,
    pixels=36,
    channels=24,
    norm_groups=8,
    sequences=6,
    prefix=7,
)


@dataclass(frozen=True)
class Source:
    """Makes random inputs; `dtype` is that of activations and weights in production."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype) * scale

    def integers(self, *shape: int, below: int) -> Tensor:
        return torch.randint(below, shape, device=self.device)

    def maps(self, *shape: int) -> Tensor:
        """`[B, (G,) C, H, W]`, channels last in memory."""
        flat = torch.randn(math.prod(shape[:-3]), *shape[-3:], device=self.device, dtype=self.dtype)
        return flat.to(memory_format=torch.channels_last).view(shape)


def few_images(sizes: Sizes, images: int) -> Sizes:
    """For comparisons with float64."""
    return dataclasses.replace(sizes, images=images, sequences=images * sizes.group)


def tensors(arguments: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, those in lists and tuples too."""
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, list | tuple):
        for each in arguments:
            yield from tensors(each)


def changed(arguments: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments with another tensor for each tensor."""
    if isinstance(arguments, Tensor):
        return change(arguments)
    if isinstance(arguments, list | tuple):
        return type(arguments)(changed(each, change) for each in arguments)
    return arguments
