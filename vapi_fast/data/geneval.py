"""GenEval's prompts: what they ask of an image, how they are read, checked and made, and their layout on disk.

A prompt is a line of JSON, `{tag, include: [{class, count, color?, position: [relation, index]?}], exclude?, prompt}`
(Ghosh et al. 2023, arXiv 2310.11513; github.com/djghosh13/geneval). `position` is relative to the objects of the
include clause with that index, which comes before.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch

from vapi_fast.data.prompts import parsed
from vapi_fast.runtime.checkpoint import read_regular
from vapi_fast.runtime.errors import DataError

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("two", "three", "four")  # of counting
# COCO's 80 classes in COCO's order, by the names that the prompts have.
NAMES = (
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|"
    "parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|"
    "handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|"
    "surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|"
    "broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|toilet|tv|"
    "laptop|computer mouse|tv remote|computer keyboard|cell phone|microwave|oven|toaster|sink|"
    "refrigerator|book|clock|vase|scissors|teddy bear|hair drier|toothbrush"
)
OBJECTS = tuple(NAMES.split("|"))
COLORLESS = "person"  # is never asked for in a color

METADATA = "metadata.jsonl"
SAMPLES = "samples"

COMMIT = "af4902f24d3ca90ebbb446dd9891a59e0f82725f"
PROMPTS_URL = f"https://raw.githubusercontent.com/djghosh13/geneval/{COMMIT}/prompts/evaluation_metadata.jsonl"
PROMPTS_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"


@dataclass(frozen=True)
class Clause:
    """Objects of one class: so many of them, perhaps of a color, perhaps placed relative to another clause's."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None  # one of RELATIONS, and the index of the include clause it refers to

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"class": self.name, "count": self.count}
        if self.color is not None:
            found["color"] = self.color
        if self.position is not None:
            found["position"] = list(self.position)
        return found


@dataclass(frozen=True)
class Prompt:
    """One prompt: an image is right that has everything of `include` and nothing of `exclude`."""

    tag: str  # one of TASKS
    text: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @classmethod
    def from_json(cls, value: Any) -> Prompt:
        """Raises ValueError, which says what is wrong, for what is no prompt of GenEval's."""
        expect(isinstance(value, dict), "is no JSON object")
        expect(value.get("tag") in TASKS, f"has the tag {value.get('tag')!r}, none of {', '.join(TASKS)}")
        text = value.get("prompt")
        expect(isinstance(text, str) and bool(text.strip()), "has no prompt")
        clauses = [value.get("include"), value.get("exclude", [])]
        expect(all(isinstance(each, list) for each in clauses) and bool(clauses[0]), "has no list of what to include")
        include, exclude = (tuple(clause(each, place) for place, each in enumerate(part)) for part in clauses)
        expect(not any(each.color or each.position for each in exclude), "excludes by color or position")
        return cls(value["tag"], text, include, exclude)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"tag": self.tag, "include": [each.to_json() for each in self.include]}
        if self.exclude:
            found["exclude"] = [each.to_json() for each in self.exclude]
        return found | {"prompt": self.text}


def clause(value: Any, place: int) -> Clause:
    expect(isinstance(value, dict), "has a clause that is no JSON object")
    name, count, color, position = (value.get(key) for key in ("class", "count", "color", "position"))
    expect(isinstance(name, str) and bool(name), "has a clause without a class")
    expect(isinstance(count, int) and not isinstance(count, bool) and count > 0, f"has the count {count!r} of {name}")
    expect(color is None or color in COLORS, f"has the color {color!r}, none of {', '.join(COLORS)}")
    if position is not None:
        expect(
            isinstance(position, list)
            and len(position) == 2
            and position[0] in RELATIONS
            and type(position[1]) is int
            and 0 <= position[1] < place,
            f"has the position {position!r}: expected one of {', '.join(RELATIONS)} and the index of a clause before",
        )
    return Clause(name, count, color, None if position is None else tuple(position))


def expect(holds: bool, wrong: str) -> None:
    if not holds:
        raise ValueError(wrong)


def parse_prompt(line: bytes) -> Prompt:
    """A line of GenEval's `evaluation_metadata.jsonl`; raises ValueError, which says what is wrong, for any other."""
    try:
        return Prompt.from_json(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no prompt of GenEval's: {str(error)[:300]}") from error


def fetch_prompts() -> Path:
    """GenEval's own 553 prompts: torch.hub's cached copy, downloaded where there is none. Raises DataError offline."""
    place = Path(torch.hub.get_dir()) / "checkpoints" / f"geneval-{PROMPTS_SHA256[:8]}.jsonl"
    if not place.exists():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(PROMPTS_URL, os.fspath(place), PROMPTS_SHA256, progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise DataError(
                f"geneval: its prompts cannot be downloaded ({str(error).splitlines()[0]}): fetch {PROMPTS_URL} on a "
                f"machine that is online and pass it as --prompts FILE --format geneval, or put it at {place}"
            ) from error
    return place


def make_prompts(each: int, seed: int, names: Sequence[str] = OBJECTS) -> list[Prompt]:
    """New prompts by GenEval's rules, none twice: one of each class alone, then up to `each` of every other task.

    names: of at least three classes.
    """
    draw = random.Random(seed)
    colored = [name for name in names if name != COLORLESS]
    prompts = [alone(name) for name in draw.sample(names, len(names))]
    for task in TASKS[1:]:
        prompts += (make_prompt(task, draw, names, colored) for _ in range(each))
    return list(dict.fromkeys(prompts))


def make_prompt(task: str, draw: random.Random, names: Sequence[str], colored: Sequence[str]) -> Prompt:
    """One of any task but the first."""
    (first, second), (red, blue) = draw.sample(names, 2), draw.sample(COLORS, 2)
    if task == "two_object":
        return Prompt(task, f"a photo of {a(first)} and {a(second)}", (Clause(first, 1), Clause(second, 1)))
    if task == "counting":
        count = draw.randrange(len(NUMBERS))
        text = f"a photo of {NUMBERS[count]} {plural(first)}"
        return Prompt(task, text, (Clause(first, count + 2),), (Clause(first, count + 3),))
    if task == "position":
        relation = draw.choice(RELATIONS)
        text = f"a photo of {a(first)} {relation} {a(second)}"
        return Prompt(task, text, (Clause(second, 1), Clause(first, 1, position=(relation, 0))))
    first, second = draw.sample(colored, 2)
    if task == "colors":
        return Prompt(task, f"a photo of {a(red)} {first}", (Clause(first, 1, red),))
    text = f"a photo of {a(red)} {first} and {a(blue)} {second}"
    return Prompt(task, text, (Clause(first, 1, red), Clause(second, 1, blue)))


def alone(name: str) -> Prompt:
    """The one of the first task for a class."""
    return Prompt(TASKS[0], f"a photo of {a(name)}", (Clause(name, 1),))


def plural(name: str) -> str:
    return f"{name}{'es' if name.endswith('s') else 's'}"


def a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Sample:
    """An image in GenEval's layout."""

    folder: Path
    prompt: int  # which of the prompts it is of
    name: str  # its path in the folder

    @property
    def path(self) -> Path:
        return self.folder / self.name


def folder_name(prompt: int) -> str:
    return f"{prompt:05d}"


def sample_name(prompt: int, number: int) -> str:
    """Where GenEval looks for an image."""
    return f"{folder_name(prompt)}/{SAMPLES}/{number:04d}.png"


def read_samples(folder: Path) -> tuple[list[Prompt], list[Sample]]:
    """Prompts and images of a folder in GenEval's layout: `00000/metadata.jsonl`, `00000/samples/0000.png`, ….

    As in GenEval's own scorer a prompt's folder is one whose name is digits, an image a PNG whose name is. Raises
    DataError where there are none, or a prompt without images or metadata.
    """
    prompts: list[Prompt] = []
    samples: list[Sample] = []
    for place in filter(Path.is_dir, numbered(folder)):
        try:
            text = read_regular(place / METADATA)
        except OSError as error:
            raise DataError(f"{place / METADATA}: cannot be read: {error.strerror or error}") from error
        inside = place / SAMPLES
        images = numbered(inside, ".png") if inside.is_dir() else []
        if not images:
            raise DataError(f"{place} has no images in {SAMPLES}/0000.png, …: draw them, or take the folder away")
        samples += (Sample(folder, len(prompts), path.relative_to(folder).as_posix()) for path in images)
        prompts.append(parsed(text, parse_prompt, place / METADATA))
    if not prompts:
        raise DataError(f"{folder} is not in GenEval's layout: expected 00000/{METADATA}, 00000/{SAMPLES}/0000.png, …")
    return prompts, samples


def numbered(folder: Path, suffix: str = "") -> list[Path]:
    """What in the folder is named by digits, in the order of the numbers."""
    found = [path for path in folder.iterdir() if path.suffix == suffix and path.stem.isdecimal()]
    return sorted(found, key=lambda path: (int(path.stem), path.name))
