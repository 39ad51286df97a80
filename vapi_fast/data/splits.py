"""Splits, class folders and class ids: what a folder's names say."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vapi_fast.runtime.checkpoint import read_regular
from vapi_fast.runtime.errors import DataError, warn

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# What they are opened as, whatever their names say: for others Pillow starts programs, Ghostscript for one.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
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
SYNSET = re.compile(r"n\d{8}")  # a class of ImageNet, whose lists have words behind it


def split_of(name: str) -> str:
    """The split that a file's or folder's name has as a word (`train-00000.parquet`, `Val`), or an empty string."""
    return next((SPLITS[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLITS), "")


def canonical(name: str) -> str:
    """A split's usual name, whatever a source calls it."""
    return SPLITS.get(name.lower(), name)


def choose_split(found: Sequence[str], wanted: str | None, held_out: bool, source: Path) -> str:
    """Which of a source's splits is read: the wanted one, or by default training images, or the held-out ones.

    A single split is taken whatever it is called, and none (an empty string) where there are none. Raises DataError
    where the wanted one is not there, or none of several is the default.
    """
    if not found:
        if wanted is not None:
            raise DataError(f"{source} has no split {wanted!r}, nor any other: leave out --split")
        return ""
    there = ", ".join(dict.fromkeys(found))
    if wanted is not None:
        for name in found:
            if name.lower() == wanted.lower() or canonical(name) == canonical(wanted):
                return name
        raise DataError(f"{source} has no split {wanted!r}; it has {there}")
    usual = {canonical(name): name for name in reversed(found)}
    for name in HELD_OUT if held_out else ("train",):
        if name in usual:
            return usual[name]
    if len(usual) > 1:
        raise DataError(f"{source} has the splits {there}: choose one with --split")
    return found[0]


def subfolders(folder: Path) -> list[Path]:
    """The folders in it, those of the system left out; in numeric order where all names are numbers."""
    found = [path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]
    numbers = all(path.name.isdecimal() for path in found)
    return sorted(found, key=lambda path: (int(path.name) if numbers else 0, path.name))


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def pictures_in(folder: Path) -> list[Path]:
    """The picture files directly in `folder`, in the order of their names; hidden ones do not count."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path.name) and path.is_file()
    )


def images_below(folder: str | Path, seen: set[tuple[int, int]], links: list[str]) -> Iterator[str]:
    """Paths of the regular files that are named like images, each real folder once; `seen` gets the folders.

    Links to folders are not followed but put into `links`.
    """
    about = os.stat(folder)
    if (about.st_dev, about.st_ino) in seen:
        return
    seen.add((about.st_dev, about.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from images_below(entry.path, seen, links)
            elif entry.is_dir():
                links.append(entry.path)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
                yield entry.path


def class_folders(source: Path, wanted: str | None, held_out: bool) -> tuple[str, dict[str, list[str]]]:
    """The split that was chosen, if there are any, and the image paths of each class folder that holds some."""
    folders = subfolders(source)
    splits = [each.name for each in folders if each.name.lower() in SPLITS and any(class_images(each))]
    # Looked into only until a first image is found: another split's files are never listed.
    others = (each for each in folders if each.name.lower() not in SPLITS)
    split = ""
    if splits and not any(any(labelled_images([each], set())) for each in others):
        split = choose_split(splits, wanted, held_out, source)
    else:
        choose_split([], wanted, held_out, source)
    found = images_of(source / split)
    for folder in {source, source / split} if found else ():
        if beside := len(pictures_in(folder)):
            warn(f"{folder}: pictures beside its class folders ({beside}) are not taken: move them into a class folder")
    return split, found


def images_of(folder: Path) -> dict[str, list[str]]:
    """Sorted image paths below each sub-folder that holds some, by the sub-folder's name."""
    found: dict[str, list[str]] = {each.name: [] for each in subfolders(folder)}
    for name, path in class_images(folder):
        found[name].append(path)
    return {name: sorted(paths) for name, paths in found.items() if paths}


def class_images(folder: Path) -> Iterator[tuple[str, str]]:
    """Image paths below each sub-folder, each behind the sub-folder's name."""
    about = os.stat(folder)
    return labelled_images(subfolders(folder), {(about.st_dev, about.st_ino)})  # a link back up leads nowhere


def labelled_images(folders: Iterable[Path], seen: set[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Image paths below the folders, each behind its folder's name; a folder that two lead to is its own parent's.

    So links come last, those that are classes themselves before those that lie in one.
    """
    waiting = deque(sorted(((each.name, str(each)) for each in folders), key=lambda each: os.path.islink(each[1])))
    while waiting:
        name, folder = waiting.popleft()
        links: list[str] = []
        yield from ((name, path) for path in images_below(folder, seen, links))
        waiting.extend((name, link) for link in links)


def read_class_index(path: Path) -> dict[str, int]:
    """Class ids by the names that folders may have, from a JSON or text file.

    JSON: `{"n01440764": 0, …}`, `{"0": ["n01440764", "tench"], …}` or `["n01440764", …]`; text: a name a line, in the
    order of the ids, or a name and its id; of `n01440764 tench, Tinca tinca` the first word is a name too. Raises
    DataError for anything else.
    """
    index: dict[str, int] = {}
    for name, number in listed_classes("--class-index", path):
        if not 0 <= number < 2**31 or index.setdefault(name, number) != number:
            raise DataError(f"--class-index {path}: {name[:80]!r} has the id {number}, which is taken or none")
    return index


def read_class_names(path: Path) -> dict[int, str]:
    """What people call the classes, by id, from a file in the forms of `read_class_index`: ImageNet's numbers do not
    count, and of several names of a class the first does. Raises DataError for another file.
    """
    names: dict[int, str] = {}
    for name, number in listed_classes("--class-names", path):
        first, _, rest = name.partition(" ")
        if called := (rest.strip() if SYNSET.fullmatch(first) else name):
            names.setdefault(number, called)
    return names


def listed_classes(flag: str, path: Path) -> list[tuple[str, int]]:
    """Names and ids in a file; raises DataError where there are none."""
    expected = "expected names of classes and their ids, as JSON or a name a line"
    try:
        text = read_regular(path).decode("utf-8-sig")
        as_json = text.lstrip()[:1] in ("{", "[")
        pairs = list(
            from_json(json.loads(text, object_pairs_hook=no_key_twice)) if as_json else from_lines(text.splitlines())
        )
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise DataError(f"{flag} {path}: {expected} ({type(error).__name__}: {str(error)[:200]})") from error
    if not pairs:
        raise DataError(f"{flag} {path}: holds no names: {expected}")
    return pairs


def no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object's keys and values; of two equal keys `json` would drop one without a word."""
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


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
    for number, line in enumerate(filter(None, map(str.strip, lines))):
        name, *last = line.rsplit(maxsplit=1)
        name, number = (name, int(last[0])) if last and last[0].isdecimal() else (line, number)
        yield name, number
        if SYNSET.fullmatch(first := name.split()[0]) and first != name:
            yield first, number
