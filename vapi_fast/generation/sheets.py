"""A contact sheet: many images on one picture, each with its caption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vapi_fast.data.pictures import BACKGROUND, GAP, INK, MARGIN, MIN_CELL
from vapi_fast.runtime.checkpoint import write_atomically

COLUMNS = 8
CAPTION_HEIGHT = 18


def save_sheet(path: str | Path, images: Tensor, captions: Sequence[str]) -> None:
    """Write a PNG of uint8 images `[N,3,H,W]`, eight in a row in their order, each under its caption.

    The file appears whole or not at all. Raises ValueError unless there is one caption for each of N ≥ 1 images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"expected uint8 images [N, 3, H, W], got {images.dtype} {list(images.shape)}")
    if len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions given for {len(images)} images; give one each")
    height, width = images.shape[2:]
    factor = max(1, math.ceil(MIN_CELL / min(height, width)))
    cell_width, cell_height = width * factor, height * factor
    step_x, step_y = cell_width + GAP, cell_height + CAPTION_HEIGHT + GAP
    columns = min(COLUMNS, len(images))
    size = (
        2 * MARGIN + columns * step_x - GAP,
        2 * MARGIN + math.ceil(len(images) / columns) * step_y - GAP,
    )
    picture = Image.new("RGB", size, BACKGROUND)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for position, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = MARGIN + position % columns * step_x, MARGIN + position // columns * step_y
        draw.text((left + cell_width / 2, top + CAPTION_HEIGHT / 2 - 1), caption, fill=INK, font=font, anchor="mm")
        cell = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        picture.paste(cell.resize((cell_width, cell_height), Image.Resampling.NEAREST), (left, top + CAPTION_HEIGHT))
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", optimize=True))
