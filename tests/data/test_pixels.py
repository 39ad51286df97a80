"""Pictures of every mode become the 8-bit RGB that they show, or are refused; only regular files are read."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vapi_fast.data.pixels import eight_bits, rgb
from vapi_fast.runtime.checkpoint import read_regular

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def saved(picture: Image.Image, kind: str) -> Image.Image:
    """The picture as it is read back from a file."""
    file = io.BytesIO()
    picture.save(file, kind)
    file.seek(0)
    return Image.open(file)


def grey(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(rgb(picture))
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled(kind: str) -> None:
    wide = RAMP.astype(np.uint16) * 257
    assert (grey(saved(Image.fromarray(wide), kind)) == RAMP).all()
    assert grey(saved(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), kind)).max() == 156


def test_big_endian_and_32_bit_integers() -> None:
    wide = (RAMP.astype(np.uint16) * 257).astype(">u2")
    big = Image.frombytes("I;16B", (16, 16), wide.tobytes())
    assert (grey(big) == RAMP).all()
    assert (grey(Image.fromarray(RAMP.astype(np.int32) * 257)) == RAMP).all()


def test_floats_of_0_to_1_and_of_0_to_255() -> None:
    assert (grey(saved(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF")) == RAMP).all()
    assert (grey(saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF")) == RAMP).all()


def test_floats_that_pass_1_by_rounding_are_clipped() -> None:
    values = RAMP.astype(np.float32) / 255
    values[0, 0], values[15, 15] = -0.001, 1.001
    assert (grey(Image.fromarray(values)) == RAMP).all()


@pytest.mark.parametrize("values", [RAMP.astype(np.float32) / 255 * 1.5, RAMP.astype(np.int32), np.ones((4, 4), int)])
def test_what_could_be_of_two_ranges_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"which may be of 0 to (1 or to 255|255 or to 65535): save it with 8 bits"):
        eight_bits(values)
    assert (eight_bits(values * 0) == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 300.0])
def test_floats_of_another_range_are_refused(value: float) -> None:
    values = np.zeros((4, 4), np.float32)
    values[1, 2] = value
    with pytest.raises(ValueError, match="save it with 8 bits a channel"):
        rgb(Image.fromarray(values))


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_of_more_than_16_bits_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to 65535"):
        eight_bits(np.array([[0, value]]))


def test_alpha_palettes_and_other_colour_spaces_as_the_training_code_sees_them() -> None:
    picture = Image.fromarray(COLOURS)
    with_alpha = picture.copy()
    with_alpha.putalpha(7)
    assert (np.asarray(rgb(saved(with_alpha, "PNG"))) == COLOURS).all()  # dropped, not composited
    palette = picture.quantize(16)
    assert (np.asarray(rgb(saved(palette, "PNG"))) == np.asarray(palette.convert("RGB"))).all()
    assert (grey(saved(Image.merge("LA", [Image.fromarray(RAMP)] * 2), "PNG")) == RAMP).all()
    assert np.asarray(rgb(with_alpha.convert("RGBa"))).shape == (16, 16, 3)
    assert (np.asarray(rgb(Image.new("CMYK", (4, 4), (0, 0, 0, 0)))) == 255).all()
    assert grey(Image.new("1", (4, 4), 1)).min() == 255


def test_an_animation_is_its_first_frame_and_an_orientation_is_not_applied() -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    file.seek(0)
    assert np.asarray(rgb(Image.open(file)))[0, 0].tolist() == [255, 0, 0]
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    frames[0].save(file, "JPEG", exif=exif)
    file.seek(0)
    assert rgb(Image.open(file)).size == (8, 4)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "link").symlink_to("a")
    assert read_regular(tmp_path / "link") == b"12"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            read_regular(path)
