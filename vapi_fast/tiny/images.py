"""Render the tiny preset's images: the glyphs of Noto Color Emoji at 32×32, labelled by Unicode group."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian: fonts-noto-color-emoji
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")  # Debian: unicode-data
BITMAP_SIZE = 109  # the only size the font's bitmaps come in; glyphs are 136×128 pixels
SKIN_TONES = range(0x1F3FB, 0x1F400)
IMAGE_SIZE = 32


class Glyph(NamedTuple):
    """One emoji: its text, name, Unicode group (the class) and subgroup."""

    text: str
    name: str
    group: str
    subgroup: str


def read_glyphs(emoji_test: Path = EMOJI_TEST) -> list[Glyph]:
    """The fully qualified emoji of Unicode's emoji-test.txt, in its order."""
    glyphs, group, subgroup = [], "", ""
    for line in emoji_test.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        elif "; fully-qualified" in line:
            codes, comment = line.split(";", 1)
            text = "".join(chr(int(code, 16)) for code in codes.split())
            name = comment.split("#", 1)[1].split(maxsplit=2)[2]  # "# 😀 E1.0 grinning face"
            glyphs.append(Glyph(text, name, group, subgroup))
    return glyphs


def thin(glyphs: list[Glyph]) -> list[Glyph]:
    """Keep every glyph without a skin tone, and one skin tone (in turn) of each that has five."""
    kept, variants = [], {}
    for glyph in glyphs:
        tones = [ord(c) for c in glyph.text if ord(c) in SKIN_TONES]
        if not tones:
            kept.append(glyph)
        elif len(set(tones)) == 1:
            variants.setdefault((glyph.subgroup, glyph.name.split(":")[0]), []).append(glyph)
    kept += [found[i % len(found)] for i, found in enumerate(variants.values())]
    order = {glyph.text: i for i, glyph in enumerate(glyphs)}
    return sorted(kept, key=lambda glyph: order[glyph.text])


def glyph_image(text: str, font: ImageFont.FreeTypeFont, margin: int = 0) -> Image.Image:
    """One glyph in the middle of a transparent square, `margin` pixels wider than it; ValueError where it is none."""
    if not 100 <= font.getlength(text) <= 160:  # an unsupported sequence falls apart into several glyphs, or none
        raise ValueError(f"the font has no single glyph for {text!r}")
    canvas = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((12, 16), text, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for {text!r}")
    glyph = canvas.crop(box)
    side = max(glyph.size) + margin
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.alpha_composite(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square


def render(text: str, font: ImageFont.FreeTypeFont, size: int = IMAGE_SIZE) -> Image.Image | None:
    """Draw one glyph on white, fitted into `size`×`size`; None when the font has no single glyph for it."""
    try:
        glyph = glyph_image(text, font, margin=8)
    except ValueError:
        return None
    square = Image.new("RGBA", glyph.size, (255, 255, 255, 255))
    square.alpha_composite(glyph)
    return square.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def render_all(font_path: Path = FONT, emoji_test: Path = EMOJI_TEST) -> Iterator[tuple[Glyph, bytes]]:
    """Yield every distinct rendered glyph of the thinned list with its PNG bytes."""
    for path, package in ((font_path, "fonts-noto-color-emoji"), (emoji_test, "unicode-data")):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: install Debian's package {package}")
    font = ImageFont.truetype(str(font_path), BITMAP_SIZE)
    seen = set()
    for glyph in thin(read_glyphs(emoji_test)):
        image = render(glyph.text, font)
        if image is None or np.asarray(image).tobytes() in seen:
            continue
        seen.add(np.asarray(image).tobytes())
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        yield glyph, buffer.getvalue()
