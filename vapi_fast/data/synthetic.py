"""Made-up labelled images, to time a model where there are no data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from vapi_fast.data.dataset import ImageBatch

COARSE = 8  # pixels a side of the noise that an image is enlarged from: smooth, as photographs are
EPOCH = 1 << 20  # images


class SyntheticData:
    """Serves batches as `vapi_fast.data.dataset.ImageData` does; an image is a function of its id alone."""

    skipped: tuple[str, ...] = ()

    def __init__(self, image_size: int, num_classes: int) -> None:
        self.image_size = image_size
        self.num_classes = num_classes

    def __len__(self) -> int:
        return EPOCH

    def summary(self) -> dict[str, Any]:
        """As `ImageData.summary`, but for the counts: they are no property of the images."""
        return {"split": None, "images": EPOCH, "classes": {}}

    def batches(
        self, batch_size: int, steps: int, *, seed: int, start_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[ImageBatch]:
        """Batches of steps `start_step` … `steps − 1`; rank r has the r-th of `world_size` equal runs of slots."""
        share = batch_size // world_size
        slots = torch.arange(rank * share, (rank + 1) * share)
        for step in range(start_step, steps):
            yield self.batch(slots, (seed + step * batch_size + slots) % EPOCH)

    def batch(self, slots: torch.Tensor, image_ids: torch.Tensor) -> ImageBatch:
        noise = torch.stack(
            [torch.randn(3, COARSE, COARSE, generator=torch.Generator().manual_seed(i)) for i in image_ids.tolist()]
        )
        size = [self.image_size, self.image_size]
        images = F.interpolate(noise, size, mode="bicubic", align_corners=False).clamp(-1, 1)
        return ImageBatch(images, image_ids % self.num_classes, slots, image_ids)
