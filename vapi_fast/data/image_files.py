"""Image files and what goes with them as rows of a table, by Hugging Face `datasets`; how an image becomes pixels."""

from __future__ import annotations

import glob
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vapi_fast.data.pixels import center_crop, rgb
from vapi_fast.data.splits import (
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    choose_split,
    class_folders,
    is_hidden,
    read_class_index,
    split_of,
)
from vapi_fast.runtime.checkpoint import read_regular
from vapi_fast.runtime.errors import DataError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls")
TAR_FEATURES = {"image": datasets.Value("string"), "tar": datasets.Value("string")} | dict.fromkeys(
    ("offset", "size"), datasets.Value("int64")
)
TAR_CAPTIONS = "captions"  # column of the texts found beside an image in a tar
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it raises is said once, in our line
LARGEST_PADDING = 1 << 20  # bytes that a tar is filled up with: the largest record in use
BLOCK = 1 << 20
LAYOUTS = "one sub-folder of images per class, a save_to_disk folder, *.parquet, or WebDataset *.tar"


class Kind(NamedTuple):
    """What goes with images: labels or captions."""

    columns: tuple[str, ...]  # that may hold it
    layouts: str  # for messages
    others: Callable[[Path, str | None, bool], tuple[str | None, datasets.Dataset]]  # opens what no table or tar is
    captions: bool = False


class ImageRows:
    """The images of a source, by row."""

    def __init__(self, source: Path, split: str | None, rows: datasets.Dataset) -> None:
        Image.init()  # Pillow's first lookup of the rarer formats is not thread-safe
        self.source = source
        self.split = split
        image = find_column(rows, IMAGE_COLUMNS, source)
        try:
            rows = rows.cast_column(image, datasets.Image(decode=False))
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise DataError(f"column {image!r} of {source} is {rows.features[image]}, expected images") from error
        kept = [image, *(name for name in ("tar", "offset", "size") if name in rows.column_names)]
        self._image_column = image
        self._rows = rows.select_columns(kept)

    def __len__(self) -> int:
        return len(self._rows)

    def pixels(self, row: int, size: int) -> np.ndarray:
        """A row's image, cropped: float32 `[3, size, size]` in [−1, 1]. A damaged one may raise nearly anything."""
        found = self._rows[row]
        image = found[self._image_column] or {"bytes": None, "path": None}
        if "tar" in found:
            with open(found["tar"], "rb") as file:
                file.seek(found["offset"])
                encoded = file.read(found["size"])
        elif image["bytes"] is not None:
            encoded = image["bytes"]
        elif image["path"]:
            encoded = read_regular(image["path"])
        else:
            raise DataError("the row has no image")
        if not encoded:
            raise DataError("zero bytes")
        with Image.open(BytesIO(encoded), formats=IMAGE_FORMATS) as picture:
            cropped = center_crop(rgb(picture), size)
        return np.asarray(cropped, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1

    def name(self, row: int) -> str:
        """The path of a row's image, or else its number."""
        image = self._rows[row][self._image_column]
        return image["path"] if image and image["path"] else f"row {row} of {self.source}"


class LabelledRows(ImageRows):
    """An image and a label a row; `ImageData` says what may lie at `source`, and what is a DataError."""

    def __init__(self, source: Path, split: str | None, held_out: bool, class_index: Path | None) -> None:
        chosen, rows = open_source(source, split, held_out, LABELS)
        super().__init__(source, chosen, rows)
        label = find_column(rows, LABEL_COLUMNS, source)
        names = getattr(rows.features[label], "names", None)
        self._ids = None if class_index is None else self._ids_of(names, class_index)
        self.class_names: dict[int, str] | None = None
        if names is not None:
            self.class_names = dict(
                zip(range(len(names)) if self._ids is None else self._ids.tolist(), names, strict=True)
            )
        self._label_column = rows.select_columns(label).with_format("arrow")[:][label]

    def labels(self, num_classes: int | None) -> np.ndarray:
        """int64 `[rows]`, all of them in 0 … num_classes − 1 (None: 0 and up)."""
        column = self._label_column
        if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
            raise DataError(f"labels of {self.source} are of type {column.type}, expected integers")
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise DataError(f"{self.name(row)} has no label ({column.null_count} such images in {self.source})")
        labels = column.to_numpy().astype(np.int64)
        if self._ids is not None and ((labels >= 0) & (labels < len(self._ids))).all():
            labels = self._ids[labels]
        outside = np.flatnonzero((labels < 0) | (labels >= (np.inf if num_classes is None else num_classes)))
        if len(outside):
            allowed = "0 and up" if num_classes is None else f"0..{num_classes - 1}"
            row = int(outside[0])
            raise DataError(
                f"label {labels[row]} of {self.name(row)} is out of range: "
                f"expected {allowed} ({len(outside)} such images in {self.source})"
            )
        return labels

    def _ids_of(self, names: list[str] | None, class_index: Path) -> np.ndarray:
        """The class index's ids of the source's own class names."""
        if names is None:
            raise DataError(f"--class-index needs names of classes, and the labels of {self.source} are numbers")
        index = read_class_index(class_index)
        if unknown := [name for name in names if name not in index]:
            raise DataError(
                f"--class-index {class_index} has no id for {len(unknown)} of the {len(names)} classes in "
                f"{self.source}: {', '.join(unknown[:5])}"
            )
        return np.array([index[name] for name in names], dtype=np.int64)


def find_column(rows: datasets.Dataset, names: tuple[str, ...], source: str | Path) -> str:
    for name in names:
        if name in rows.column_names:
            return name
    raise DataError(f"{source} has the columns {', '.join(rows.column_names)}; expected one of {', '.join(names)}")


def open_source(source: Path, split: str | None, held_out: bool, kind: Kind) -> tuple[str | None, datasets.Dataset]:
    """The split that was chosen, where there are any, and all of its rows; the layout is told by what lies there."""
    if not os.path.exists(source):  # of names that no system takes it says no, too
        raise DataError(f"no such file or folder: {source} (expected {kind.layouts})")
    try:
        chosen, rows = _opened(source, split, held_out, kind)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of damaged files `datasets` and what it reads with raise nearly anything
        cause = error.__cause__ or error  # `datasets` wraps what _index_tars raises
        raise DataError(str(cause) if isinstance(cause, DataError) else f"cannot read {source}: {cause}") from error
    if len(rows) == 0:
        raise DataError(f"{source} holds no images")
    return chosen or None, rows


def _opened(source: Path, split: str | None, held_out: bool, kind: Kind) -> tuple[str | None, datasets.Dataset]:
    if (source / "state.json").exists() or (source / "dataset_dict.json").exists():
        return _load_saved(source, split, held_out)
    for suffix, read in ((".parquet", _read_parquet), (".tar", _read_tars)):
        chosen, files = files_of(source, suffix, split, held_out)
        if files:
            return chosen, read(files, kind)
    return kind.others(source, split, held_out)


def files_of(
    source: Path, suffix: str, split: str | None, held_out: bool, pattern: str = "*"
) -> tuple[str, list[Path]]:
    """The files with this suffix, those of one split where their names say which they belong to.

    Beside files of validation or test, those that say nothing are training's; beside some of train they are refused.
    """
    if source.is_file():
        paths = [source] if source.suffix == suffix else []
    else:
        found = (path for path in source.glob(f"{pattern}{suffix}") if not path.is_dir())
        paths = sorted(path for path in found if not any(map(is_hidden, path.relative_to(source).parts)))
    for path in paths:
        check_regular(path)
    named = {path: split_of(path.name if path == source else str(path.relative_to(source))) for path in paths}
    splits = set(named.values()) - {""}
    if splits and (unnamed := [path for path, name in named.items() if not name]):
        splits.add("train")
        named |= dict.fromkeys(unnamed, "train")
    else:
        unnamed = []
    if not paths or (source.is_file() and split is None):
        return "", paths
    chosen = choose_split(sorted(splits), split, held_out, source)
    kept = [path for path, name in named.items() if name == chosen]
    if chosen == "train" and unnamed and (others := [path for path in kept if path not in unnamed]):
        raise DataError(
            f"{source}: {unnamed[0].name} says no split, and {others[0].name} beside it says train: rename one of "
            "them, or move it away"
        )
    return chosen, kept


def check_regular(path: Path) -> None:
    """Raise DataError for what is no regular file, or a link to none: a pipe or a device would never end."""
    if not path.is_file():
        raise DataError(f"{path} is not a regular file, or a link that leads nowhere: copy or download it again")


def _load_saved(source: Path, split: str | None, held_out: bool) -> tuple[str | None, datasets.Dataset]:
    for path in itertools.chain(source.glob("*"), source.glob("*/*")):
        if path.suffix in (".json", ".arrow") and not path.is_dir():
            check_regular(path)
        if path.name == "state.json":  # which may name any file
            for part in json.loads(path.read_bytes())["_data_files"]:
                check_regular(path.parent / part["filename"])
    if not any(source.rglob("*.arrow")):  # what saving no rows leaves behind cannot be loaded
        raise DataError(f"{source} holds no images")
    chosen, saved = None, datasets.load_from_disk(str(source))
    if not isinstance(saved, datasets.Dataset):
        chosen = choose_split(list(saved), split, held_out, source)
        saved = saved[chosen]
    elif split is not None:
        chosen = choose_split([str(saved.split)] if saved.split else [], split, held_out, source)
    return chosen, saved.with_format(None)


def _read_parquet(paths: list[Path], kind: Kind) -> datasets.Dataset:
    filled = [path for path in paths if pq.read_metadata(path).num_rows]  # `datasets` fails on a file without rows
    if not filled:
        raise DataError(f"{paths[0]} holds no images")
    columns = [pq.read_schema(path).names for path in filled]
    wanted = [next((name for name in names if name in columns[0]), "") for names in (IMAGE_COLUMNS, kind.columns)]
    for path, names in zip(filled, columns, strict=True):
        if all(wanted) and (missing := [name for name in wanted if name not in names]):
            raise DataError(f"{path} has no column {missing[0]!r}, which {filled[0].name} beside it has")
    features = [datasets.Features.from_arrow_schema(pq.read_schema(path)) for path in filled]
    names = {path: getattr(each.get(wanted[1]), "names", None) for path, each in zip(filled, features, strict=True)}
    named = [path for path in filled if names[path] is not None]
    for path in named:
        if names[path] != names[named[0]]:
            raise DataError(
                f"{path} and {named[0].name} beside it number their classes differently (column {wanted[1]!r}): write "
                "them again with the same names in the same order"
            )
    # Other columns may differ from shard to shard.
    return datasets.Dataset.from_parquet(
        [glob.escape(str(path)) for path in filled], split="train", columns=wanted if all(wanted) else None
    )


def _read_tars(paths: list[Path], kind: Kind) -> datasets.Dataset:
    shards = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    if kind.captions:
        column, value, names = TAR_CAPTIONS, [datasets.Value("string")], {"names": kind.columns}
    else:
        column, value, names = "cls", datasets.Value("int64"), {}
    features = datasets.Features(TAR_FEATURES | {column: value})
    return datasets.Dataset.from_generator(_index_tars, features=features, gen_kwargs={"shards": shards, **names})


def _class_rows(source: Path, split: str | None, held_out: bool) -> tuple[str | None, datasets.Dataset]:
    if source.is_file():
        raise DataError(f"{source} is not a known kind of data (expected {LAYOUTS})")
    chosen, found = class_folders(source, split, held_out)
    return chosen, _labelled(source, found)


LABELS = Kind(LABEL_COLUMNS, LAYOUTS, _class_rows)


def _labelled(source: Path, found: dict[str, list[str]]) -> datasets.Dataset:
    if not found:
        raise DataError(f"{source} holds no images in class sub-folders (expected {LAYOUTS})")
    columns = {
        "image": [path for paths in found.values() for path in paths],
        "label": [label for label, paths in enumerate(found.values()) for _ in paths],
    }
    try:
        features = {"image": datasets.Value("string"), "label": datasets.ClassLabel(names=list(found))}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: the name {error.object!r} is not UTF-8: rename it") from error


def _index_tars(
    shards: tuple[tuple[str, int, int], ...], names: tuple[str, ...] | None = None
) -> Iterator[dict[str, object]]:
    """Where each sample's image lies in its tar, and its class: the bytes themselves stay in the tar.

    Shards are (path, size, modification time); the last two only make the cached index follow the file. With `names`
    captions are read in place of classes: from members with such an extension, or under such a key of a `.json`.
    """
    empty, sought = True, "cls" if names is None else TAR_CAPTIONS
    for tar, _, _ in shards:
        with tarfile.open(tar, "r:") as archive:
            check_whole(archive, tar)
            files = (member for member in archive if member.isfile() and _sample_key(member.name)[1])
            for key, members in itertools.groupby(files, key=lambda member: _sample_key(member.name)[0]):
                row = {"image": None, sought: None, "tar": tar, "offset": 0, "size": 0}
                for member in members:
                    extension = _sample_key(member.name)[1]
                    if names is None and extension == "cls":
                        row["cls"] = _read_class(archive, member, tar)
                    elif f".{extension}" in IMAGE_SUFFIXES:
                        row |= {"image": f"{tar}/{member.name}", "offset": member.offset_data, "size": member.size}
                    elif names is not None and row[sought] is None and extension in ("json", *names):
                        row[sought] = _read_texts(archive, member, tar, names)
                if row["image"] is not None or row[sought] is not None:
                    empty = False
                    yield row | {"image": row["image"] or f"{tar}/{key}"}  # no image: unreadable, met as such
    if empty:
        expected = "key.cls" if names is None else "key.txt or key.json"
        raise DataError(f"{shards[0][0]} holds no images (expected members key.jpg and {expected})")


def check_whole(archive: tarfile.TarFile, tar: str) -> None:
    """Raise DataError for a tar that was cut off, wherever: its last member is there, and so is the mark of the end.

    `tarfile` itself takes a header that is not whole for the end, and one of zeros. So after the mark there may be
    only zeros, and no more than fill a record up.
    """
    last = archive.getmembers()[-1:]
    end = max(
        (member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for member in last), default=0
    )
    with open(tar, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{tar} is cut off, or was written over, after byte {end}: copy or download it again")
        rest = os.fstat(file.fileno()).st_size - end
        if rest > LARGEST_PADDING + tarfile.RECORDSIZE or any(map(any, iter(lambda: file.read(BLOCK), b""))):
            raise DataError(
                f"{tar} ends at byte {end}, and {rest} bytes follow: it was not downloaded whole, or is several tars "
                "in one file: download it again, or unpack and pack them anew"
            )


def _sample_key(name: str) -> tuple[str, str]:
    """A member's sample key and lower-case extension, parted at the first dot of its base name."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower() if key else ""


def _read_class(archive: tarfile.TarFile, member: tarfile.TarInfo, tar: str) -> int:
    text = archive.extractfile(member).read(40)
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{tar}/{member.name} holds {text[:20]!r}, expected a class number") from None


def _read_texts(
    archive: tarfile.TarFile, member: tarfile.TarInfo, tar: str, names: tuple[str, ...]
) -> list[str] | None:
    """The captions in a sample's text, or under the first known key of its JSON; None where there is none."""
    try:
        text = archive.extractfile(member).read().decode("utf-8-sig")
        if not member.name.lower().endswith(".json"):
            return [text]
        found = json.loads(text)
        return next((texts_of(found[name]) for name in names if found.get(name) is not None), None)
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{tar}/{member.name}: is not {'JSON' if 'json' in member.name else 'text'} ({error})"
        ) from error


def texts_of(value: Any) -> list[str]:
    """A caption, or several, as a list; nothing of what is no text keeps its place as an empty one."""
    return [each if isinstance(each, str) else "" for each in (value if isinstance(value, list) else [value])]
