"""Pictures of samples: labelled sheets side by side, an image in the same place on each.

An image's cell is 96 to 192 pixels wide: smaller images are enlarged without smoothing, larger ones averaged down, by a
whole factor. A sheet of cells has about 800 pixels a side: 64 images of 32 pixels, 36 of 256, 16 of 384. So four
sheets are below 8 MB, whatever they show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vapi_fast.runtime.checkpoint import write_atomically

MIN_CELL, MAX_CELL = 96, 192  # pixels
SHEET_SIDE = 800  # pixels, without the gaps
SHEET_COLUMNS = 8
MARGIN, GAP, SHEET_GAP = 16, 6, 32
LABEL_SIZE, CAPTION_SIZE, CAPTION_HEIGHT = 28, 11, 18
MAX_CAPTION = 400  # letters: more than a row of narrow ones has room for
BACKGROUND, INK = (243, 244, 246), (31, 41, 55)
MISSED, BOX_COLOURS = (185, 28, 28), ((21, 128, 61), (29, 78, 216), (126, 34, 206), (180, 83, 9))


def spread(labels: Tensor, side: int, rows: bool = False) -> tuple[Tensor, int]:
    """Which of the images with class ids int64 `[N]` to show on a sheet, in order of class, and in how many columns.

    Args:
        side: pixels of an image, which decide how many there is room for. All classes get the same number, where they
            have as many; a row is then a class, or a class is some whole rows, or a row some whole classes. Of more
            classes than there is room for, one image each of some that are evenly spaced.
        rows: no row has two classes, where all have at least two images.
    """
    cell = math.ceil(side * _enlargement(side) / _reduction(side))  # one of the two is 1
    across = min(SHEET_COLUMNS, SHEET_SIDE // cell)
    room = across**2
    classes, counts = labels.unique(return_counts=True)
    columns = min(across, int(counts.min())) if rows else 1
    shown = min(room // columns, len(classes))
    each = room // shown
    if columns > 1:
        each = min(each, int(counts.min()))
        each -= each % columns if shown > 1 else 0
    classes = classes[torch.arange(shown) * len(classes) // shown]
    positions = [(labels == label).nonzero()[:each, 0] for label in classes]
    if columns > 1:
        return torch.cat(positions), columns
    count = sum(map(len, positions))
    fitting = [columns for columns in range(room, 0, -1) if each % columns == 0 or columns % each == 0]
    return torch.cat(positions), min(fitting, key=lambda columns: abs(math.log(columns / math.sqrt(count))))


def save_sheets(
    path: str | Path, sheets: Sequence[tuple[str, Tensor]], columns: int, captions: Sequence[str] = ()
) -> None:
    """Write a PNG of one sheet per (label, images `[N,3,H,W]`, uint8 or in [−1, 1]), side by side, rows of `columns`.

    captions: one for each of the N places, written above it, once above neighbours in a row that have the same, and
    cut where there is no more room. Labels stand above the sheets, where there are any. The file appears whole or not
    at all. Raises ValueError when there are no images, the shapes differ, a value is not finite, or captions are not as
    many as images.
    """
    _check(sheets, captions)
    cells = [[_cell(image) for image in images] for _, images in sheets]
    count, (width, height) = len(cells[0]), cells[0][0].size
    columns = min(columns, count)
    step_x, step_y = width + GAP, height + GAP + (CAPTION_HEIGHT if captions else 0)
    sheet_width = columns * step_x - GAP
    label_font = _fitting_font([label for label, _ in sheets], sheet_width)
    header = 2 * int(label_font.size) if any(label for label, _ in sheets) else 0
    size = (
        2 * MARGIN + len(sheets) * (sheet_width + SHEET_GAP) - SHEET_GAP,
        2 * MARGIN + header + math.ceil(count / columns) * step_y - GAP,
    )
    picture = Image.new("RGB", size, BACKGROUND)
    draw, caption_font = ImageDraw.Draw(picture), ImageFont.load_default(CAPTION_SIZE)
    for sheet, (label, _) in enumerate(sheets):
        left = MARGIN + sheet * (sheet_width + SHEET_GAP)
        draw.text((left + sheet_width / 2, MARGIN + header / 2 - 4), label, fill=INK, font=label_font, anchor="mm")
        for place, cell in enumerate(cells[sheet]):
            x, y = left + place % columns * step_x, MARGIN + header + place // columns * step_y
            picture.paste(cell, (x, y + (CAPTION_HEIGHT if captions else 0)))
        for text, first, last in _runs(captions, columns):
            x, y = left + first % columns * step_x, MARGIN + header + first // columns * step_y
            room = (last - first) * step_x + width
            middle = (x + room / 2, y + CAPTION_HEIGHT / 2 - 1)
            draw.text(middle, _fitting(text, room, caption_font), fill=INK, font=caption_font, anchor="mm")
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", optimize=True))


def marked(pixels: np.ndarray, boxes: Sequence[tuple[Sequence[float], str]], missed: str = "") -> Tensor:
    """A cell uint8 `[3,MAX_CELL,MAX_CELL]` of an image uint8 `[H,W,3]`, with labelled boxes, and `missed` below them.

    boxes: (left, top, right, bottom) in the image's pixels, and what stands at it. Equal labels have equal colours.
    """
    picture = Image.fromarray(pixels)
    scale = MAX_CELL / max(picture.size)
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    cell = Image.new("RGB", (MAX_CELL, MAX_CELL), BACKGROUND)
    cell.paste(picture.resize([max(round(side * scale), 1) for side in picture.size], resampling))
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(CAPTION_SIZE)
    labels = list(dict.fromkeys(label for _, label in boxes))
    for box, label in boxes:
        left, top, right, bottom = (min(max(round(side * scale), 0), MAX_CELL - 1) for side in box)
        right, bottom = max(left, right), max(top, bottom)
        colour = BOX_COLOURS[labels.index(label) % len(BOX_COLOURS)]
        draw.rectangle((left, top, right, bottom), outline=colour, width=2)
        width = font.getlength(label) + 4
        left = max(min(left, MAX_CELL - width), 0)
        draw.rectangle((left, top, left + width, top + CAPTION_SIZE + 2), fill=colour)
        draw.text((left + 2, top), label, fill="white", font=font)
    if missed:
        draw.rectangle((0, MAX_CELL - CAPTION_HEIGHT, MAX_CELL, MAX_CELL), fill=MISSED)
        draw.text((4, MAX_CELL - CAPTION_HEIGHT + 2), missed, fill="white", font=font)
    return torch.from_numpy(np.array(cell)).permute(2, 0, 1)


def _enlargement(side: int) -> int:
    return math.ceil(MIN_CELL / side)


def _reduction(side: int) -> int:
    return math.ceil(side / MAX_CELL)


def _cell(image: Tensor) -> Image.Image:
    if image.dtype != torch.uint8:
        image = (image.detach().float().cpu().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if min(picture.size) >= MIN_CELL:
        return picture.reduce(_reduction(max(picture.size)))
    factor = _enlargement(min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _fitting_font(labels: Sequence[str], width: int) -> ImageFont.FreeTypeFont:
    size = LABEL_SIZE
    while size > 7 and max(ImageFont.load_default(size).getlength(label) for label in labels) > width:
        size -= 1
    return ImageFont.load_default(size)


def _runs(captions: Sequence[str], columns: int) -> Iterator[tuple[str, int, int]]:
    """Captions, each with the first and the last of the places in a row that have it."""
    places = range(len(captions))
    for (_, text), run in itertools.groupby(places, lambda place: (place // columns, captions[place])):
        first, *others = run
        yield text, first, (others or [first])[-1]


def _fitting(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """The text in one line, cut to `width` pixels; first what GenEval's prompts all begin with."""
    text = " ".join(text.split())[:MAX_CAPTION]
    if font.getlength(text) > width:
        text = text.removeprefix("a photo of ")
    kept = text
    while kept and font.getlength(text) > width:
        kept = kept[:-1].rstrip()
        text = f"{kept}…"
    return text


def _check(sheets: Sequence[tuple[str, Tensor]], captions: Sequence[str]) -> None:
    if not sheets or not len(sheets[0][1]):
        raise ValueError("no images for the picture; expected at least one sheet of images [N, 3, H, W]")
    shape = sheets[0][1].shape
    for label, images in sheets:
        if images.ndim != 4 or images.shape[1] != 3 or images.shape != shape:
            raise ValueError(
                f"sheet '{label}' has shape {list(images.shape)}; every sheet must be [N, 3, H, W] "
                f"and alike, the first is {list(shape)}"
            )
        if not images.isfinite().all():
            raise ValueError(f"sheet '{label}' has values that are not finite; expected images in [-1, 1]")
    if captions and len(captions) != shape[0]:
        raise ValueError(f"{len(captions)} captions given for {shape[0]} images; give one each")
