"""Pictures of a run: a grid of samples side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vapi_fast.runtime.checkpoint import write_atomically

MIN_CELL = 96  # pixels; smaller images are enlarged by a whole factor, without smoothing
MARGIN, GAP, BLOCK_GAP = 16, 6, 24
LANDSCAPE = 3 / 2
BACKGROUND, INK = (243, 244, 246), (31, 41, 55)


def save_grid(path: str | Path, columns: Sequence[tuple[str, Tensor]]) -> None:
    """Write a labelled PNG: one column per (label, images [N, 3, H, W] in [−1, 1]), row n showing image n of each.

    Many rows are broken into blocks side by side, so that the picture is about 3:2. The file appears whole or not at
    all. Raises ValueError when there are no images, the shapes differ or a value is not finite.
    """
    _check_columns(columns)
    count, _, height, width = columns[0][1].shape
    factor = max(1, math.ceil(MIN_CELL / min(height, width)))
    cell_height, cell_width = height * factor, width * factor
    font = _fitting_font([label for label, _ in columns], cell_width)
    header = 2 * int(font.size)
    rows = _rows_per_block(count, len(columns) * (cell_width + GAP), cell_height + GAP, header)
    blocks = math.ceil(count / rows)
    block_width = len(columns) * (cell_width + GAP) - GAP

    size = (
        2 * MARGIN + blocks * (block_width + BLOCK_GAP) - BLOCK_GAP,
        2 * MARGIN + header + rows * (cell_height + GAP) - GAP,
    )
    picture = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for block in range(blocks):
        for position, (label, images) in enumerate(columns):
            left = MARGIN + block * (block_width + BLOCK_GAP) + position * (cell_width + GAP)
            draw.text((left + cell_width / 2, MARGIN + header / 2 - 2), label, fill=INK, font=font, anchor="mm")
            for row, image in enumerate(images[block * rows : (block + 1) * rows]):
                top = MARGIN + header + row * (cell_height + GAP)
                cell = _to_picture(image).resize((cell_width, cell_height), Image.Resampling.NEAREST)
                picture.paste(cell, (left, top))
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", optimize=True))


def _rows_per_block(count: int, block_width: int, row_height: int, header: int) -> int:
    """Rows in each block such that the picture is as near to 3:2 as it can be, whatever the last block leaves empty."""

    def misfit(rows: int) -> float:
        blocks = math.ceil(count / rows)
        aspect = (blocks * (block_width + BLOCK_GAP)) / (rows * row_height + header)
        return abs(math.log(aspect / LANDSCAPE))

    best = min(range(1, count + 1), key=misfit)
    return math.ceil(count / math.ceil(count / best))  # the same number of blocks, evenly filled


def _fitting_font(labels: Sequence[str], width: int) -> ImageFont.FreeTypeFont:
    size = max(13, width // 14)
    while size > 7 and max(ImageFont.load_default(size).getlength(label) for label in labels) > width:
        size -= 1
    return ImageFont.load_default(size)


def _to_picture(image: Tensor) -> Image.Image:
    pixels = (image.detach().float().cpu().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _check_columns(columns: Sequence[tuple[str, Tensor]]) -> None:
    if not columns or not len(columns[0][1]):
        raise ValueError("no images for the picture grid; expected at least one column of images [N, 3, H, W]")
    shape = columns[0][1].shape
    for label, images in columns:
        if images.ndim != 4 or images.shape[1] != 3 or images.shape != shape:
            raise ValueError(
                f"column '{label}' has shape {list(images.shape)}; every column must be [N, 3, H, W] "
                f"and alike, the first is {list(shape)}"
            )
        if not images.isfinite().all():
            raise ValueError(f"column '{label}' has values that are not finite; expected images in [-1, 1]")
