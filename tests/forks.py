"""Forks of the public models that compute as they do but for large values, or wide maps."""

from __future__ import annotations

import public_models
import torch
from public_models import LPIPS
from torch import Tensor


class ClampedPixels(public_models.Encoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-2, 2))


class ClampedImage(public_models.Decoder):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z).clamp(-9, 9)


class TiledEncoder(public_models.Encoder):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(TiledEncoder, self).forward(part) for part in x.split(32, -1)], -1)


class TiledDecoder(public_models.Decoder):
    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([super(TiledDecoder, self).forward(part) for part in z.split(16, -1)], -1)


class OwnEntries(public_models.VectorQuantizer):
    def get_codebook_entry(
        self, indices: Tensor, shape: tuple[int, ...] | None = None, channel_first: bool = True
    ) -> Tensor:
        return super().get_codebook_entry(indices, shape, channel_first) * 2


class ClampedImages(LPIPS):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input.clamp(-1, 1), target.clamp(-1, 1))


class ClampedDistance(LPIPS):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target).clamp(-3, 3)
