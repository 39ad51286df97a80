"""Scenes of one to four objects in a 2×2 grid, captioned by GenEval's templates: the images of the text presets.

Objects are glyphs of Noto Color Emoji by the names that COCO has for them, in their own colors or in one of GenEval's
ten. A quarter of all combinations (a color on an object, a number of objects, two objects together without colors) is
held out: no caption that a generator is trained on has any of them. Half of these are aligned on, the others measured
on: each caption that is measured on has one that no generator has met, trained or aligned.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vapi_fast.data.geneval import COLORS, NUMBERS, RELATIONS, TASKS, Clause, Prompt, alone, make_prompt, plural

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SIZE = 32
CELLS = 4  # row by row
SIDE = 16  # pixels of a cell
SPRITE = 15  # pixels of an object: it lies in one of four places in its cell
BACKGROUND = (200, 206, 214)
HELDOUT_SHARE = 4  # one combination in four

GLYPHS: Mapping[str, str] = {
    **{"apple": "🍎", "banana": "🍌", "carrot": "🥕", "broccoli": "🥦", "pizza": "🍕", "donut": "🍩"},
    **{"car": "🚗", "bus": "🚌", "train": "🚂", "airplane": "✈", "boat": "⛵", "bicycle": "🚲"},
    **{"bird": "🐤", "cat": "🐱", "dog": "🐶", "elephant": "🐘", "umbrella": "☂", "clock": "⏰"},
    **{"chair": "🪑", "scissors": "✂", "cup": "☕", "tv": "📺", "vase": "🏺", "book": "📖"},
}
KINDS = tuple(GLYPHS)
SHADES: Mapping[str, tuple[int, int, int]] = {
    **{"red": (220, 30, 35), "orange": (245, 130, 20), "yellow": (250, 215, 30), "green": (40, 160, 60)},
    **{"blue": (35, 90, 220), "purple": (130, 50, 180), "pink": (250, 130, 190), "brown": (125, 75, 40)},
    **{"black": (25, 25, 28), "white": (250, 250, 250)},
}
PAINTS = (None, *COLORS)  # an object's own colors first


class Thing(NamedTuple):
    """An object of a scene. color: None for its own ones; cell: 0 … CELLS − 1."""

    kind: str
    color: str | None
    cell: int


SINGULAR = {plural(name): name for name in KINDS}


def parse(caption: str) -> Prompt:
    """What a caption of the templates asks for: the prompt that has this text; raises ValueError for any other text."""
    words = caption.removeprefix("a photo of ")
    if words != caption:
        for task, pattern in PATTERNS.items():
            if found := re.fullmatch(pattern, words):
                parts = found.groupdict()
                first = Clause(parts["first"], 1, parts.get("color"))
                if task == "counting":
                    name, count = SINGULAR[parts["first"]], NUMBERS.index(parts["number"]) + 2
                    return Prompt(task, caption, (Clause(name, count),), (Clause(name, count + 1),))
                if task == "position":
                    placed = Clause(parts["first"], 1, position=(parts["relation"], 0))
                    return Prompt(task, caption, (Clause(parts["second"], 1), placed))
                second = [Clause(parts["second"], 1, parts.get("other"))] if "second" in parts else []
                return Prompt(task, caption, (first, *second))
    raise ValueError(f"no caption of a scene: {caption[:80]!r}")


def alternatives(name: str, words: Iterable[str]) -> str:
    return f"(?P<{name}>{'|'.join(words)})"


_A, _ONE, _TWO = "an? ", alternatives("first", KINDS), alternatives("second", KINDS)
PATTERNS = dict(
    zip(
        TASKS,
        (
            f"{_A}{_ONE}",
            f"{_A}{_ONE} and {_A}{_TWO}",
            f"{alternatives('number', NUMBERS)} {alternatives('first', SINGULAR)}",
            f"{_A}{alternatives('color', COLORS)} {_ONE}",
            f"{_A}{_ONE} {alternatives('relation', RELATIONS)} {_A}{_TWO}",
            f"{_A}{alternatives('color', COLORS)} {_ONE} and {_A}{alternatives('other', COLORS)} {_TWO}",
        ),
        strict=True,
    )
)


def words() -> list[str]:
    """Every word that a caption can have, in alphabetical order."""
    found = {*["a", "an", "photo", "of", "and"], *KINDS, *SINGULAR, *COLORS, *NUMBERS}
    return sorted(found.union(*(relation.split() for relation in RELATIONS)))


def combinations(prompt: Prompt) -> list[str]:
    """What a prompt puts together."""
    names = sorted(clause.name for clause in prompt.include)
    found = [f"{clause.color} {clause.name}" for clause in prompt.include if clause.color]
    if prompt.tag == "counting":
        return [f"{prompt.include[0].count} {names[0]}"]
    return found if found or len(names) == 1 else [" ".join(names)]


def part_of(prompt: Prompt) -> str:
    """`trained`, where a generator has been trained on all that it puts together, else `aligned` or `measured`.

    What is held out of the training is either aligned on or measured on; a prompt with both is in neither ("").
    """
    digests = [hashlib.blake2b(each.encode()).digest() for each in combinations(prompt)]
    parts = {digest[10] % 2 for digest in digests if digest[1] % HELDOUT_SHARE == 0}
    return "trained" if not parts else ("aligned", "measured")[parts.pop()] if len(parts) == 1 else ""


def drawn_prompt(draw: random.Random, part: str) -> Prompt:
    """One of any task, of that part; one object alone, which is of every part, as often as any task."""
    while True:
        task = draw.choice(TASKS)
        if task == TASKS[0]:
            return alone(draw.choice(KINDS))
        prompt = make_prompt(task, draw, KINDS, KINDS)
        if part_of(prompt) == part:
            return prompt


def measured_prompts(each: int, seed: int) -> list[Prompt]:
    """Every kind alone, then up to `each` of every other task that are measured on; none twice."""
    draw = random.Random(seed)
    prompts = [alone(name) for name in KINDS]
    for task in TASKS[1:]:
        tries = (make_prompt(task, draw, KINDS, KINDS) for _ in range(400 * each))
        prompts += list(dict.fromkeys(prompt for prompt in tries if part_of(prompt) == "measured"))[:each]
    return prompts


def arrange(prompt: Prompt, draw: random.Random) -> list[Thing]:
    """Exactly what the prompt asks for, in cells at random; objects without a color have their own ones."""
    names = [(clause.name, clause.color) for clause in prompt.include for _ in range(clause.count)]
    cells = draw.sample(range(CELLS), len(names))
    if prompt.tag == "position":
        (relation, _), line = prompt.include[1].position or ("", 0), draw.randrange(2)
        before = (0, 1) if relation in ("right of", "below") else (1, 0)  # where the first clause's object is, and this
        cells = [2 * line + place if relation.endswith("of") else 2 * place + line for place in before]
    return [Thing(name, color, cell) for (name, color), cell in zip(names, cells, strict=True)]


class Sprites(NamedTuple):
    """The objects as they are painted: `[KINDS, PAINTS]` of them."""

    colors: np.ndarray  # float32 [24,11,15,15,3] in 0 … 1
    alpha: np.ndarray  # float32 [24,15,15]

    @classmethod
    def of(cls, glyphs: Iterable[Image.Image]) -> Sprites:
        """From one square RGBA image a kind."""
        from PIL import Image

        colors, alphas = [], []
        for glyph in glyphs:
            pixels = np.asarray(glyph, dtype=np.float32) / 255
            pixels[..., :3] *= pixels[..., 3:]  # what is transparent has no color to mix in
            channels = [
                Image.fromarray(pixels[..., i]).resize((SPRITE, SPRITE), Image.Resampling.LANCZOS) for i in range(4)
            ]
            small = np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 1)
            alpha = small[..., 3]
            own = (small[..., :3] / np.maximum(alpha[..., None], 1e-3)).clip(0, 1)
            colors.append(np.stack([painted(own, alpha, paint) for paint in PAINTS]))
            alphas.append(alpha)
        return cls(np.stack(colors), np.stack(alphas))


def painted(own: np.ndarray, alpha: np.ndarray, color: str | None) -> np.ndarray:
    """An object in another color: its light and dark parts become that color's."""
    if color is None:
        return own
    light = own @ np.array([0.3, 0.59, 0.11], dtype=np.float32)
    low, high = np.quantile(light[alpha > 0.5], (0.05, 0.95))
    light = ((light - low) / max(high - low, 0.05)).clip(0, 1)[..., None]
    shade = np.array(SHADES[color], dtype=np.float32) / 255
    darkest, lightest = (shade * 0.3, shade + 0.25) if color == "black" else (shade * 0.6, shade + 0.15 * (1 - shade))
    return darkest + (lightest - darkest) * light


def render(things: Iterable[Thing], sprites: Sprites, draw: random.Random) -> np.ndarray:
    """uint8 `[32,32,3]`: each object in one of four places in its cell."""
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), np.array(BACKGROUND, dtype=np.float32) / 255)
    for thing in things:
        kind = KINDS.index(thing.kind)
        top = thing.cell // 2 * SIDE + draw.randrange(2)
        left = thing.cell % 2 * SIDE + draw.randrange(2)
        place = image[top : top + SPRITE, left : left + SPRITE]
        alpha = sprites.alpha[kind, ..., None]
        place += alpha * (sprites.colors[kind, PAINTS.index(thing.color)] - place)
    return (image * 255).round().astype(np.uint8)


def stream(sprites: Sprites, seed: int, part: str = "trained") -> Iterator[tuple[Prompt, list[Thing], np.ndarray]]:
    """Endless scenes of a part of the prompts."""
    draw = random.Random(seed)
    while True:
        prompt = drawn_prompt(draw, part)
        things = arrange(prompt, draw)
        yield prompt, things, render(things, sprites, draw)
