"""From a picture file to 8-bit RGB pixels, as LlamaGen's training code sees them, and the crop that it takes.

Alpha is dropped, not composited; an EXIF orientation is not applied; of an animation the first frame counts: that is
`Image.open(path).convert("RGB")`. What Pillow would clip, grey of 16 bits and floats, is scaled to 8 bits instead.
"""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image

# Pillow refuses what is twice as large as its limit; before that it warns, and what is taken is taken.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

ROUNDING = 0.01  # by which floats of 0 … 1 may leave that range
PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}


def rgb(picture: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB; raises ValueError for values whose range is not that of 8 or 16 bits, or of 0 … 1."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return Image.fromarray(eight_bits(np.asarray(picture))).convert("RGB")
    if picture.mode in PREMULTIPLIED:
        picture = picture.convert(PREMULTIPLIED[picture.mode])
    return picture.convert("RGB")


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey of more than 8 bits as uint8: integers of 0 … 65535 and floats of 0 … 1, or else of 0 … 255, are scaled.

    Floats that pass 0 … 1 by rounding are clipped. Raises ValueError for other ranges, and for what could be of two:
    floats whose largest value is between 1.01 and 2, 32-bit integers whose largest is below 256.
    """
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("its values are not finite: save it with 8 bits a channel")
    floats = values.dtype.kind == "f"
    largest = (1 if high <= 1 + ROUNDING else 255) if floats else 65535
    beyond = ROUNDING if largest == 1 else 0
    if low < -beyond or high > largest + beyond:
        raise ValueError(f"its values are {low:g} to {high:g}, expected 0 to {largest}: save it with 8 bits a channel")
    if 1 + ROUNDING < high <= 2 if floats else values.dtype.itemsize > 2 and 0 < high <= 255:
        both = "0 to 1 or to 255" if floats else "0 to 255 or to 65535"
        raise ValueError(f"its values are {low:g} to {high:g}, which may be of {both}: save it with 8 bits a channel")
    return np.rint(values.astype(np.float64).clip(0, largest) * (255 / largest)).astype(np.uint8)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central `size`² of an image shrunk or grown until its shorter side is `size` (the crop of ADM and LlamaGen).

    Halved by averaging while that leaves the shorter side at `size` or more, then resized bicubically. Raises
    `Image.DecompressionBombError` where the image is so long and thin that the resized one passes Pillow's limit.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} becomes {width}x{height}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
