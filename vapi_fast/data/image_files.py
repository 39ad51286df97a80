"""Image files and their labels as rows of a table, by Hugging Face `datasets`; and how one becomes pixels."""

from __future__ import annotations

import glob
import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from PIL import Image

from vapi_fast.data.dataset import IMAGE_SUFFIXES
from vapi_fast.runtime.errors import DataError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls")
SPLITS = ("train", "validation", "val", "test")
TAR_FEATURES = datasets.Features(
    {"image": datasets.Value("string"), "cls": datasets.Value("int64"), "tar": datasets.Value("string")}
    | {"offset": datasets.Value("int64"), "size": datasets.Value("int64")}
)
LAYOUTS = "one sub-folder of images per class, a save_to_disk folder, *.parquet, or WebDataset *.tar"


class ImageRows:
    """The rows of `source`, an image and a label each; `ImageData` says what may lie there, and what is a DataError."""

    def __init__(self, source: Path, split: str) -> None:
        Image.init()  # Pillow's first lookup of the rarer formats is not thread-safe
        self.source = source
        rows = _open_source(source, split)
        if len(rows) == 0:
            raise DataError(f"{source} holds no images")
        image, label = (_find_column(rows, names, source) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
        self.class_names: list[str] | None = getattr(rows.features[label], "names", None)
        self._label_column = rows.select_columns(label).with_format("arrow")[:][label]
        try:
            rows = rows.cast_column(image, datasets.Image(decode=False))
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise DataError(f"column {image!r} of {source} is {rows.features[image]}, expected images") from error
        kept = [image, *(name for name in ("tar", "offset", "size") if name in rows.column_names)]
        self._image_column = image
        self._rows = rows.select_columns(kept)

    def __len__(self) -> int:
        return len(self._rows)

    def labels(self, num_classes: int | None) -> np.ndarray:
        """int64 `[rows]`, all of them in 0 … num_classes − 1 (None: 0 and up)."""
        column = self._label_column
        if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
            raise DataError(f"labels of {self.source} are of type {column.type}, expected integers")
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise DataError(f"{self.name(row)} has no label ({column.null_count} such images in {self.source})")
        labels = column.to_numpy().astype(np.int64)
        outside = np.flatnonzero((labels < 0) | (labels >= (np.inf if num_classes is None else num_classes)))
        if len(outside):
            allowed = "0 and up" if num_classes is None else f"0..{num_classes - 1}"
            row = int(outside[0])
            raise DataError(
                f"label {labels[row]} of {self.name(row)} is out of range: "
                f"expected {allowed} ({len(outside)} such images in {self.source})"
            )
        return labels

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
            encoded = Path(image["path"]).read_bytes()
        else:
            raise DataError("the row has no image")
        if not encoded:
            raise DataError("zero bytes")
        with Image.open(BytesIO(encoded)) as picture:
            cropped = center_crop(picture.convert("RGB"), size)
        return np.asarray(cropped, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1

    def name(self, row: int) -> str:
        """The path of a row's image, or else its number."""
        image = self._rows[row][self._image_column]
        return image["path"] if image and image["path"] else f"row {row} of {self.source}"


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


def _find_column(rows: datasets.Dataset, names: tuple[str, ...], source: str | Path) -> str:
    for name in names:
        if name in rows.column_names:
            return name
    raise DataError(f"{source} has the columns {', '.join(rows.column_names)}; expected one of {', '.join(names)}")


def _open_source(source: Path, split: str) -> datasets.Dataset:
    """All rows of a source, its kind told by what lies there."""
    if not source.exists():
        raise DataError(f"no such file or folder: {source} (expected {LAYOUTS})")
    try:
        if (source / "state.json").exists() or (source / "dataset_dict.json").exists():
            return _load_saved(source, split)
        if parquet := _files(source, ".parquet", split):
            return _read_parquet(parquet)
        if tars := _files(source, ".tar", split):
            shards = tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in tars)
            return datasets.Dataset.from_generator(_index_tars, features=TAR_FEATURES, gen_kwargs={"shards": shards})
    except DataError:
        raise
    except (DatasetsError, pa.ArrowException, OSError, ValueError, LookupError) as error:
        cause = error.__cause__ or error  # `datasets` wraps what _index_tars raises
        raise DataError(str(cause) if isinstance(cause, DataError) else f"cannot read {source}: {cause}") from error
    if source.is_file():
        raise DataError(f"{source} is not a known kind of data (expected {LAYOUTS})")
    return _scan_class_folders(source, split)


def _files(source: Path, suffix: str, split: str) -> list[Path]:
    if source.is_file():
        return [source] if source.suffix == suffix else []
    return _of_split(sorted(source.glob(f"*{suffix}")), split, source)


def _of_split(paths: list[Path], split: str, source: Path) -> list[Path]:
    """The paths with `split` as a word of their name (train-00000.parquet, val/), or all where none names a split."""
    named = {
        path: next((word for word in re.split("[^a-z]+", path.name.lower()) if word in SPLITS), "") for path in paths
    }
    found = sorted(set(named.values()) - {""})
    if found and split not in found:
        raise DataError(f"{source} has no split {split!r}; it has {', '.join(found)}")
    return [path for path, name in named.items() if name == split] if found else paths


def _load_saved(source: Path, split: str) -> datasets.Dataset:
    if not any(source.rglob("*.arrow")):  # what saving no rows leaves behind cannot be loaded
        raise DataError(f"{source} holds no images")
    saved = datasets.load_from_disk(str(source))
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise DataError(f"{source} has no split {split!r}; it has {', '.join(saved)}")
    return saved[split]


def _read_parquet(paths: list[Path]) -> datasets.Dataset:
    filled = [path for path in paths if pq.read_metadata(path).num_rows]  # `datasets` fails on a file without rows
    if not filled:
        raise DataError(f"{paths[0]} holds no images")
    return datasets.Dataset.from_parquet([glob.escape(str(path)) for path in filled], split="train")


def _scan_class_folders(source: Path, split: str) -> datasets.Dataset:
    folders = _subfolders(source)
    split_folders = [folder for folder in folders if folder.name in SPLITS and _subfolders(folder)]
    if split_folders:
        folders = _subfolders(_of_split(split_folders, split, source)[0])
    paths, labels = [], []
    for label, folder in enumerate(folders):
        found = sorted(
            os.path.join(parent, name)
            for parent, _, names in os.walk(folder, followlinks=True)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        )
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise DataError(f"{source} holds no images in class sub-folders (expected {LAYOUTS})")
    classes = datasets.ClassLabel(names=[folder.name for folder in folders])
    features = datasets.Features({"image": datasets.Value("string"), "label": classes})
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _index_tars(shards: tuple[tuple[str, int, int], ...]) -> Iterator[dict[str, object]]:
    """Where each sample's image lies in its tar, and its class: the bytes themselves stay in the tar.

    Shards are (path, size, modification time); the last two only make the cached index follow the file.
    """
    empty = True
    for tar, _, _ in shards:
        with tarfile.open(tar, "r:") as archive:
            files = (member for member in archive if member.isfile() and _sample_key(member.name)[1])
            for key, members in itertools.groupby(files, key=lambda member: _sample_key(member.name)[0]):
                row = {"image": None, "cls": None, "tar": tar, "offset": 0, "size": 0}
                for member in members:
                    extension = _sample_key(member.name)[1]
                    if extension == "cls":
                        row["cls"] = _read_class(archive, member, tar)
                    elif f".{extension}" in IMAGE_SUFFIXES:
                        row |= {"image": f"{tar}/{member.name}", "offset": member.offset_data, "size": member.size}
                if row["image"] is not None or row["cls"] is not None:
                    empty = False
                    yield row | {"image": row["image"] or f"{tar}/{key}"}  # no image: unreadable, met as such
    if empty:
        raise DataError(f"{shards[0][0]} holds no images (expected members key.jpg and key.cls)")


def _sample_key(name: str) -> tuple[str, str]:
    """A member's sample key and lower-case extension, parted at the first dot of its base name."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower() if key else ""


def _read_class(archive: tarfile.TarFile, member: tarfile.TarInfo, tar: str) -> int:
    text = archive.extractfile(member).read()
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{tar}/{member.name} holds {text[:20]!r}, expected a class number") from None
