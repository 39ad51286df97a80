"""Splits, class folders and class ids: what a folder's names say."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from vapi_fast.runtime.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
HELD_OUT = ("validation", "test", "train")  # in the order of choice for a measurement
SYSTEM = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
T = TypeVar("T")


def split_of(name: str) -> str:
    """The split that a file's or folder's name has as a word (`train-00000.parquet`, `Val`), or an empty string."""
    return next((SPLITS[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLITS), "")


def choose_split(found: Sequence[str], wanted: str | None, held_out: bool, source: Path) -> str:
    """Which of a source's splits is read: the wanted one, or by default training images, or the held-out ones.

    A single split is taken whatever it is called. Raises DataError where the wanted one is not there, or none of
    several is the default.
    """
    there = ", ".join(dict.fromkeys(found))
    if wanted is not None:
        for name in found:
            if name.lower() == wanted.lower() or SPLITS.get(name.lower(), name) == SPLITS.get(wanted.lower(), wanted):
                return name
        raise DataError(f"{source} has no split {wanted!r}; it has {there}")
    canonical = {SPLITS.get(name.lower(), name): name for name in reversed(found)}
    for name in HELD_OUT if held_out else ("train",):
        if name in canonical:
            return canonical[name]
    if len(canonical) > 1:
        raise DataError(f"{source} has the splits {there}: choose one with --split")
    return found[0]


def subfolders(folder: Path) -> list[Path]:
    """The folders in it, those of the system left out; in numeric order where all names are numbers."""
    found = [path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]
    numbers = all(path.name.isdecimal() for path in found)
    return sorted(found, key=lambda path: (int(path.name) if numbers else 0, path.name))


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def images_below(folder: str | Path, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Paths of the regular files that are named like images, each real folder once; `seen` gets the folders."""
    about = os.stat(folder)
    if (about.st_dev, about.st_ino) in seen:
        return
    seen.add((about.st_dev, about.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from images_below(entry.path, seen)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
                yield entry.path


def class_folders(source: Path, wanted: str | None, held_out: bool) -> tuple[str | None, dict[str, list[str]]]:
    """The split that was chosen, if there are any, and the image paths of each class folder that holds some."""
    folders = subfolders(source)
    splits = [each.name for each in folders if each.name.lower() in SPLITS and any(class_images(each))]
    # Looked into only until a first image is found: another split's files are never listed.
    if splits and not any(any(images_below(each, set())) for each in folders if each.name.lower() not in SPLITS):
        split = choose_split(splits, wanted, held_out, source)
        return split, images_of(source / split)
    return None, images_of(source)


def images_of(folder: Path) -> dict[str, list[str]]:
    """Sorted image paths below each sub-folder that holds some, by the sub-folder's name."""
    found: dict[str, list[str]] = {}
    for name, path in class_images(folder):
        found.setdefault(name, []).append(path)
    return {name: sorted(paths) for name, paths in found.items()}


def class_images(folder: Path) -> Iterator[tuple[str, str]]:
    """Image paths below each sub-folder, each behind the sub-folder's name."""
    about = os.stat(folder)
    seen = {(about.st_dev, about.st_ino)}  # a link back up leads nowhere
    for each in subfolders(folder):
        yield from ((each.name, path) for path in images_below(each, seen))


def read_class_index(path: Path) -> dict[str, int]:
    """Class ids by the names that folders may have, from a JSON or text file.

    JSON: `{"n01440764": 0, …}`, `{"0": ["n01440764", "tench"], …}` or `["n01440764", …]`; text: a name a line, in the
    order of the ids, or a name and its id. Raises DataError for anything else.
    """
    expected = "expected names of classes and their ids, as JSON or a name a line"
    try:
        text = path.read_text(encoding="utf-8")
        as_json = text.lstrip()[:1] in ("{", "[")
        pairs = list(from_json(json.loads(text)) if as_json else from_lines(text.splitlines()))
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise DataError(f"--class-index {path}: {expected} ({type(error).__name__}: {str(error)[:80]})") from error
    index: dict[str, int] = {}
    for name, number in pairs:
        if not 0 <= number < 2**31 or index.setdefault(name, number) != number:
            raise DataError(f"--class-index {path}: {name[:80]!r} has the id {number}, which is taken or none")
    if not index:
        raise DataError(f"--class-index {path}: holds no names: {expected}")
    return index


def from_json(value: object) -> Iterator[tuple[str, int]]:
    if isinstance(value, list):
        value = {str(number): name for number, name in enumerate(value)}
    for key, entry in value.items():
        if isinstance(entry, int) and not isinstance(entry, bool):
            yield key, entry
        else:
            for name in [entry] if isinstance(entry, str) else entry:
                yield str(name), int(key)


def from_lines(lines: list[str]) -> Iterator[tuple[str, int]]:
    named = [line.split() for line in lines if line.strip()]
    for number, words in enumerate(named):
        numbered = len(words) > 1 and words[-1].isdecimal()
        yield words[0], int(words[-1]) if numbered else number
