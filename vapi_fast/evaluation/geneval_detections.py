"""Objects in images, and the file that says which: `--detections`, one image a line (docs/geneval.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vapi_fast.data.geneval import COLORS
from vapi_fast.runtime.checkpoint import read_regular
from vapi_fast.runtime.errors import DataError


class Mask(NamedTuple):
    """Which pixels are an object's, as COCO has it uncompressed: lengths of runs down the columns, outside first."""

    height: int
    width: int
    runs: np.ndarray

    @classmethod
    def of(cls, pixels: np.ndarray) -> Mask:
        """From booleans `[H,W]`."""
        flat = pixels.T.ravel()
        ends = np.flatnonzero(np.diff(flat, prepend=False)) if flat.size else np.zeros(0, int)
        return cls(*pixels.shape, np.diff(ends, prepend=0, append=flat.size))

    def pixels(self) -> np.ndarray:
        """Booleans `[H,W]`."""
        flat = np.repeat(np.arange(len(self.runs)) % 2 == 1, self.runs)
        return flat.reshape(self.width, self.height).T


class Found(NamedTuple):
    """An object in an image."""

    name: str
    score: float
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    color: str | None = None  # where it was asked for
    mask: Mask | None = None


def to_json(image: str, objects: Sequence[Found]) -> dict[str, Any]:
    """A line of `--detections`, without masks: the colors that they were for are there."""
    return {
        "image": image,
        "objects": [
            {"class": o.name, "score": o.score, "box": list(o.box)} | ({"color": o.color} if o.color else {})
            for o in objects
        ],
    }


def read_detections(path: Path) -> dict[str, list[Found]]:
    """Objects by image, of lines `{"image": "00000/samples/0000.png", "objects": [{class, score, box, …}]}`.

    Raises DataError, which says in which line, for anything else.
    """
    found: dict[str, list[Found]] = {}
    try:
        lines = read_regular(path).splitlines()
    except OSError as error:
        raise DataError(f"--detections {path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if value["image"] in found:
                raise ValueError(f"{value['image']} is there twice")
            found[value["image"]] = [from_json(each) for each in value["objects"]]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
            raise DataError(
                f"--detections {path}, line {number}: expected an image and its objects, each with class, score and "
                f"box ({type(error).__name__}: {str(error)[:200]})"
            ) from error
    return found


def from_json(value: dict[str, Any]) -> Found:
    """An object; raises ValueError, TypeError or LookupError for what is none."""
    name, color, mask = value["class"], value.get("color"), value.get("mask")
    numbers = [float(each) for each in (value["score"], *value["box"])]
    if not isinstance(name, str) or len(numbers) != 5 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"no class, score and box of four numbers: {value}")
    score, left, top, right, bottom = numbers
    if not 0 <= score <= 1 or left > right or top > bottom:
        raise ValueError(f"a score outside of 0 to 1, or a box whose corners are swapped: {value}")
    if color is not None and color not in COLORS:
        raise ValueError(f"the color {color!r}, none of {', '.join(COLORS)}")
    if mask is not None:
        height, width = map(int, mask["size"])
        runs = np.array(mask["counts"], dtype=np.int64)
        if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
            raise ValueError(f"a mask whose runs are not {height} × {width} pixels")
        mask = Mask(height, width, runs)
    return Found(name, score, (left, top, right, bottom), color, mask)
