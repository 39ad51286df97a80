"""Made-up images with classes or captions, to time a model where there are no data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from vapi_fast.data.dataset import ImageBatch

COARSE = 8  # pixels a side of the noise that an image is enlarged from: smooth, as photographs are
EPOCH = 1 << 20  # images
SENTENCE = 64  # tokens


class SyntheticData:
    """Serves batches as `vapi_fast.data.dataset.ImageData` does; an image is a function of its id alone."""

    skipped: tuple[str, ...] = ()
    class_names: dict[int, str] | None = None

    def __init__(
        self,
        image_size: int,
        num_classes: int = 0,
        *,
        caption: tuple[int, int] = (0, 0),
        prompt: tuple[int, int, int, int] | None = None,
    ) -> None:
        """caption: positions of one and their width, in place of classes; or prompt: its positions, the vocabulary, its
        first token and its last."""
        self.image_size = image_size
        self.num_classes = num_classes
        self.caption_shape = caption
        self.prompt = prompt

    def __len__(self) -> int:
        return EPOCH

    def caption(self, image_id: int) -> str:
        """What its caption's made-up features stand for."""
        return f"image {image_id}"

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
        draws = [torch.Generator().manual_seed(i) for i in image_ids.tolist()]
        noise = torch.stack([torch.randn(3, COARSE, COARSE, generator=draw) for draw in draws])
        size = [self.image_size, self.image_size]
        images = F.interpolate(noise, size, mode="bicubic", align_corners=False).clamp(-1, 1)
        if self.num_classes:
            return ImageBatch(images, image_ids % self.num_classes, slots, image_ids)
        if self.prompt:
            return ImageBatch(images, image_ids, slots, image_ids, *self.prompts(image_ids, draws))
        tokens, width = self.caption_shape
        features = torch.stack([torch.randn(tokens, width, generator=draw) for draw in draws])
        mask = torch.arange(tokens) >= (image_ids % tokens)[:, None]  # of all lengths
        return ImageBatch(images, image_ids, slots, image_ids, features * mask[..., None], mask)

    def prompts(self, image_ids: torch.Tensor, draws: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, of the lengths that prompts of a sentence have."""
        tokens, vocabulary, first, last = self.prompt
        used = 2 + image_ids % min(tokens - 1, SENTENCE)
        rows = torch.stack([torch.randint(vocabulary, (tokens,), generator=draw) for draw in draws])
        rows[torch.arange(len(rows)), tokens - used], rows[:, -1] = first, last
        mask = torch.arange(tokens) >= (tokens - used)[:, None]
        return rows * mask, mask
