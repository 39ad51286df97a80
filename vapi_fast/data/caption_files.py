"""Images and their captions as rows of a table; captions alone where that is all there is."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from vapi_fast.data.captions import Caption, has_words
from vapi_fast.data.image_files import TAR_CAPTIONS, ImageRows, Kind, files_of, open_source, texts_of
from vapi_fast.runtime.checkpoint import read_regular
from vapi_fast.runtime.errors import DataError

CAPTION_COLUMNS = ("caption", "text", "caption_original", "prompt", "captions", "txt")
STEM, LINE = "_stem", "_line"  # columns of what was read from lists
PATH_COLUMNS = ("file_name", "image_path")  # of Hugging Face's imagefolder, of LlamaGen's lists
LAYOUTS = (
    "a save_to_disk folder, *.parquet, WebDataset *.tar with key.txt or key.json, or lists of image paths and "
    "captions: *.jsonl, or metadata.csv in a folder of images"
)


class Captions:
    """The captions of a source, those that are not taken left out, and the rows that have them.

    taken: of a caption, by default whether cleaning leaves words of it. Of several captions of an image the first such
    one is, or with `column` `NAME:K` the K-th, from 0 on. Raises DataError for a source that cannot be read, or has no
    captions.
    """

    def __init__(
        self,
        source: Path,
        split: str | None,
        held_out: bool,
        column: str | None,
        taken: Callable[[str], bool] = has_words,
    ) -> None:
        name, entry = parted(column)
        names = CAPTION_COLUMNS if name is None else (name,)
        kind = Kind(names, LAYOUTS, partial(listed, names=names), captions=True)
        self.split, rows = open_source(source, split, held_out, kind)
        self.column, values = text_column(rows, names, source)
        if not is_text(values.type):
            raise DataError(f"column {self.column!r} of {source} is {values.type}, expected text or lists of text")
        if STEM in rows.column_names:
            stems, lines = (values_of(rows, name).to_pylist() for name in (STEM, LINE))
        else:
            stem = "-".join(filter(None, [stem_of(source), self.split]))
            stems, lines = itertools.repeat(stem, len(rows)), range(len(rows))
        kept: list[int] = []
        self.captions: list[Caption] = []
        for row, (texts, stem, line) in enumerate(zip(each_of(values), stems, lines, strict=True)):
            if text := next(filter(taken, texts if entry is None else texts[entry : entry + 1]), None):
                kept.append(row)
                self.captions.append(Caption(text, stem, line))
        self.left_out = len(rows) - len(kept)
        if not kept:
            which = f"{self.column}:{entry}" if entry is not None else self.column
            raise DataError(
                f"none of the {len(rows)} images in {source} has a caption in {which!r} of which cleaning leaves a "
                "word; name another column with --caption-column"
            )
        self.rows = rows.select(kept) if self.left_out else rows


class CaptionedRows(ImageRows):
    """The images that have captions, and these; as `Captions`, and a DataError where no image is named."""

    def __init__(
        self, source: Path, split: str | None, held_out: bool, column: str | None, taken: Callable[[str], bool]
    ) -> None:
        found = Captions(source, split, held_out, column, taken)
        if STEM in found.rows.column_names and "image" not in found.rows.column_names:
            raise DataError(f"{source} names no images: expected {' or '.join(PATH_COLUMNS)} beside the captions")
        super().__init__(source, found.split, found.rows)
        self.captions, self.column, self.left_out = found.captions, found.column, found.left_out


def parted(column: str | None) -> tuple[str | None, int | None]:
    """`text:1` is entry 1 of the lists in column `text`."""
    name, colon, entry = (column or "").rpartition(":")
    return (name, int(entry)) if colon and name and entry.isdecimal() else (column, None)


def stem_of(path: Path) -> str:
    """What LlamaGen calls the features' folder of a list: its name up to the first dot."""
    return path.absolute().name.split(".")[0]


def text_column(rows: datasets.Dataset, names: tuple[str, ...], source: Path) -> tuple[str, pa.ChunkedArray]:
    """The first known column; of a WebDataset from the hub, which has its JSON in one, the first known key of that."""
    for name in (*names, TAR_CAPTIONS, "json"):
        if name in rows.column_names:
            values = values_of(rows, name)
            if name != "json" or name in names:
                return name, values
            for key in names:
                if pa.types.is_struct(values.type) and values.type.get_field_index(key) >= 0:
                    return f"json.{key}", pc.struct_field(values, key)
    raise no_captions(source, names, rows.column_names)


def values_of(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    return rows.select_columns(column).with_format("arrow")[:][column]


def no_captions(source: Path, names: tuple[str, ...], there: Iterable[str]) -> DataError:
    return DataError(
        f"{source} has no captions: looked for {' or '.join(names)} among {', '.join(map(str, there))}; name the "
        "column with --caption-column"
    )


def is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def each_of(values: pa.ChunkedArray) -> Iterator[list[str]]:
    """Chunk by chunk: all of them are many Python objects."""
    for chunk in values.chunks:
        yield from map(texts_of, chunk.to_pylist())


def listed(
    source: Path, split: str | None, held_out: bool, names: tuple[str, ...]
) -> tuple[str | None, datasets.Dataset]:
    """Lists of image paths and captions: `.jsonl` and `.csv` files, in a folder's split folders those of metadata."""
    for suffix, pattern in ((".jsonl", "*"), (".csv", "metadata"), (".jsonl", "*/metadata"), (".csv", "*/metadata")):
        split_found, paths = files_of(source, suffix, split, held_out, pattern)
        if paths:
            return split_found, read_lists(paths, names, split_found if "/" in pattern else None)
    raise DataError(f"{source} has no captions (expected {LAYOUTS})")


def read_lists(paths: list[Path], names: tuple[str, ...], split: str | None) -> datasets.Dataset:
    """Columns `image` (where paths are named), the captions under their name, `STEM` and `LINE`.

    split: of lists that are all called the same, in a folder each.
    """
    columns: dict[str, list[Any]] = {"image": [], "captions": [], STEM: [], LINE: []}
    name = key = None
    stems: dict[str, Path] = {}
    for path in paths:
        stem = f"{stem_of(path)}-{split}" if split else stem_of(path)
        if (other := stems.setdefault(stem, path)) != path:
            raise DataError(f"{other} and {path} are both {stem} to a folder of features: rename one")
        for line, entry in entries(path):
            name = name or next((each for each in names if each in entry), None)
            key = key or next((each for each in PATH_COLUMNS if each in entry), None)
            image = entry.get(key)
            columns["image"].append(os.path.join(path.parent, image) if isinstance(image, str) and image else None)
            columns["captions"].append(texts_of(entry.get(name)))
            columns[STEM].append(stem)
            columns[LINE].append(line)
            known = entry.keys()
    if not columns[LINE]:
        raise DataError(f"{paths[0]} has no lines")
    if name is None:
        raise no_captions(paths[0], names, known)
    text = datasets.Value("string")
    features = {"image": text, "captions": [text], STEM: text, LINE: datasets.Value("int64")}
    if key is None:
        del columns["image"], features["image"]
    columns[name], features[name] = columns.pop("captions"), features.pop("captions")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a list, numbered from 0 as LlamaGen numbers its features; blank ones count and are passed over."""
    try:
        text = read_regular(path).decode("utf-8-sig")
        if path.suffix == ".csv":
            yield from enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True))
            return
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("expected an object")
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: line {number + 1} is no JSON object with a path and a caption ({error})"
            ) from error
        yield number, entry
