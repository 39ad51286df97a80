"""CLIP as `transformers` has it: embeddings of images and texts, whose cosines say how well they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vapi_fast.evaluation.config import CLIP
from vapi_fast.runtime.hub import see
from vapi_fast.runtime.packages import loaded

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import CLIPModel, CLIPTokenizer

BATCH = 64  # images or texts in the network at once
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of all CLIPs' pixels


class Clip:
    """A frozen CLIP with its tokenizer."""

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer, device: torch.device, *, as_pillow: bool = True
    ) -> None:
        """as_pillow: as `network_pixels` has it."""
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.as_pillow = as_pillow

    @classmethod
    def load(cls, source: str, device: torch.device) -> Clip:
        """From the hub or a folder; raises CheckpointError for what is no CLIP."""
        advice = f"put the files of {CLIP} into a folder, and pass --clip-network FOLDER"
        return cls(*loaded(f"--clip-network {source}", advice, lambda: read_clip(source)), device)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Embeddings of unit length, float32 `[N,D]`, of images `[N,3,H,W]` of 8 bits; of their middle squares."""
        height, width = pixels.shape[-2:]
        short, side = min(height, width), self.model.config.vision_config.image_size
        top, left = (height - short) // 2, (width - short) // 2
        found = []
        for part in pixels[..., top : top + short, left : left + short].split(BATCH):
            prepared = network_pixels(part.float(), side, self.as_pillow).to(self.model.dtype)
            states = self.model.vision_model(pixel_values=prepared).pooler_output
            found.append(F.normalize(self.model.visual_projection(states).float(), dim=-1))
        return torch.cat(found)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of unit length, float32 `[N,D]`; longer texts are cut, the end sign last."""
        longest = self.model.config.text_config.max_position_embeddings
        found = []
        for first in range(0, len(texts), BATCH):
            part = list(texts[first : first + BATCH])
            words = self.tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            words = words.to(self.model.device)
            states = self.model.text_model(input_ids=words.input_ids, attention_mask=words.attention_mask)
            found.append(F.normalize(self.model.text_projection(states.pooler_output).float(), dim=-1))
        return torch.cat(found)


def read_clip(source: str | Path) -> tuple[CLIPModel, CLIPTokenizer]:
    """A CLIP in `transformers`' layout, in a folder or on the hub; raises whatever that raises."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.utils.logging import disable_progress_bar

    see(str(source))
    disable_progress_bar()
    model, about = CLIPModel.from_pretrained(source, output_loading_info=True)
    if missing := sorted(key for key in about["missing_keys"] if not key.endswith("position_ids")):
        raise ValueError(f"it lacks {len(missing)} weights of a CLIP, {missing[0]} for one")
    return model, CLIPTokenizer.from_pretrained(source)


def network_pixels(pixels: Tensor, side: int, as_pillow: bool) -> Tensor:
    """Square images of 8 bits, float32, as the networks take them: `[N,3,side,side]`, bicubic, in CLIP's units.

    as_pillow: resize rows, then columns, each to 8 bits; else at once, to any number.
    """
    if pixels.shape[-1] != side:
        for size in ((pixels.shape[-2], side), (side, side)) if as_pillow else ((side, side),):
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
            pixels = pixels.round().clamp(0, 255) if as_pillow else pixels
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std
