"""Labelled images on disk, in a seeded order that does not depend on the number of ranks."""

from __future__ import annotations

import glob
import itertools
import os
import re
import tarfile
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.exceptions import DatasetsError
from PIL import Image
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls")
SPLITS = ("train", "validation", "val", "test")
TAR_FEATURES = datasets.Features(
    {"image": datasets.Value("string"), "cls": datasets.Value("int64"), "tar": datasets.Value("string")}
    | {"offset": datasets.Value("int64"), "size": datasets.Value("int64")}
)
LAYOUTS = "one sub-folder of images per class, a save_to_disk folder, *.parquet, or WebDataset *.tar"
UNREADABLE_LIMIT = 0.01
DECODE_THREADS = 4
PREFETCH_STEPS = 2


class DataError(ValueError):
    """The image set cannot be used; the message says what is wrong with which file."""


class ImageBatch(NamedTuple):
    """One rank's part of a step: `b = batch_size / world_size` images."""

    images: Tensor  # float32 [b, 3, H, W] in [-1, 1]
    labels: Tensor  # int64 [b]
    sample_ids: Tensor  # int64 [b]: slot of the image in its step, 0 .. batch_size - 1 over all ranks
    image_ids: Tensor  # int64 [b]: row of the image in the data set

    def to(self, device: torch.device) -> ImageBatch:
        """The same on `device`, from pinned memory without waiting for it."""
        return ImageBatch(*(value.to(device, non_blocking=True) for value in self))


class ImageData:
    """A labelled image set: decoded, cropped to `image_size`² and served in batches; an image's id is its row.

    `source` is a local path, read through Hugging Face `datasets`: a folder of class folders (labels follow the sorted
    folder names), a folder written by `save_to_disk`, a `.parquet` file or a folder of them, a WebDataset `.tar` file
    or a folder of them (`key.jpg` beside `key.cls`). `split` picks among splits where the source has them.
    Parquet rows and tar indices are cached by `datasets`, keyed by the files' paths and modification times.

    Raises `DataError` for a missing or unknown source, no rows, no image or label column, an absent label, or a label
    outside 0 .. num_classes - 1 (only negative ones when `num_classes` is None).
    """

    def __init__(
        self, source: str | Path, image_size: int, *, num_classes: int | None = None, split: str = "train"
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        Image.init()  # Pillow's first lookup of the rarer formats is not thread-safe
        self.source = Path(source)
        self.image_size = image_size
        rows = _open_source(self.source, split)
        if len(rows) == 0:
            raise DataError(f"{source} holds no images")
        image, label = (_find_column(rows, names, source) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
        self.class_names: list[str] | None = getattr(rows.features[label], "names", None)
        label_column = rows.select_columns(label).with_format("arrow")[:][label]
        try:
            rows = rows.cast_column(image, datasets.Image(decode=False))
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise DataError(f"column {image!r} of {source} is {rows.features[image]}, expected images") from error
        kept = [image, *(name for name in ("tar", "offset", "size") if name in rows.column_names)]
        self._image_column = image
        self._rows = rows.select_columns(kept)
        self._labels = self._check_labels(label_column, num_classes)
        self._read = np.zeros(len(rows), dtype=bool)
        self._unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def skipped(self) -> list[str]:
        """Paths (or row names) of the unreadable images met in batches so far, each once, in the order met."""
        return list(self._unreadable.values())

    def load(self, image_id: int) -> tuple[Tensor, int]:
        """One image as float32 [3, H, W] in [-1, 1], and its label; raises `DataError` where it is unreadable."""
        if not 0 <= image_id < len(self):
            raise IndexError(f"image id {image_id} is outside 0..{len(self) - 1}")
        try:
            return torch.from_numpy(self._decode(image_id)).contiguous(), int(self._labels[image_id])
        except Exception as error:
            raise DataError(f"cannot read {self._name(image_id)}: {error}") from error

    def batches(
        self, batch_size: int, steps: int, *, seed: int, start_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[ImageBatch]:
        """Batches of steps `start_step` .. `steps - 1`, decoded ahead in background threads.

        The images form one endless stream, a fresh permutation of all ids per epoch drawn from (seed, epoch); slot k
        of step s is its entry `s * batch_size + k`, and rank r serves the r-th of `world_size` equal runs of slots.
        So neither the number of ranks nor a resumed start changes which image a slot holds.

        An unreadable image's slot goes to the next readable id (wrapping at the end), with a warning that names the
        file. The run stops with `DataError` once the distinct unreadable images pass 1 % of the distinct images read;
        before enough are read to tell, 1 % of the data set (taken as 100 to 1000 images) is the least allowance.
        Counts are the rank's own.
        Raises `ValueError` for a batch that does not divide over the ranks and other impossible arguments.
        """
        if batch_size < 1 or world_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} must be a positive multiple of the {world_size} ranks")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step must be in 0..{steps} (steps), got {start_step}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        per_rank = batch_size // world_size
        slots = np.arange(rank * per_rank, (rank + 1) * per_rank)
        return self._batches(slots, batch_size, range(start_step, steps), seed)

    def _batches(self, slots: np.ndarray, batch_size: int, steps: range, seed: int) -> Iterator[ImageBatch]:
        pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="vapi-fast-decode")
        in_flight = deque()
        try:
            for step in range(steps.start, steps.stop + PREFETCH_STEPS):
                if step < steps.stop:
                    image_ids = self._stream(step * batch_size + slots, seed)
                    images = np.empty((len(slots), 3, self.image_size, self.image_size), dtype=np.float32)
                    in_flight.append((images, pool.map(self._decode_into, images, image_ids)))
                if step >= steps.start + PREFETCH_STEPS:
                    yield self._collect(slots, *in_flight.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _stream(self, positions: np.ndarray, seed: int) -> list[int]:
        """Image ids at the given positions of the endless stream of permutations."""
        epochs, offsets = np.divmod(positions, len(self))
        return [
            int(_permutation(seed, int(epoch), len(self))[offset])
            for epoch, offset in zip(epochs, offsets, strict=True)
        ]

    def _decode_into(self, out: np.ndarray, image_id: int) -> tuple[int | None, dict[int, str]]:
        """Fill one slot from the first readable id at or after `image_id`; return that id and the failures before it.

        The id is None after a run of failures that is over the limit on its own: more than 1 % of the whole data set.
        """
        failures: dict[int, str] = {}
        for candidate in itertools.chain(range(image_id, len(self)), range(image_id)):
            try:
                out[:] = self._decode(candidate)
            except Exception as error:  # a damaged file makes Pillow raise nearly anything, SyntaxError included
                failures[candidate] = f"{type(error).__name__}: {error}"
                if len(failures) > UNREADABLE_LIMIT * max(len(self), 100):
                    break
            else:
                return candidate, failures
        return None, failures

    def _collect(self, slots: np.ndarray, images: np.ndarray, decoded: Iterator) -> ImageBatch:
        image_ids = []
        for image_id, failures in decoded:
            for failed, reason in failures.items():
                if failed not in self._unreadable:
                    self._unreadable[failed] = self._name(failed)
                    warnings.warn(f"skipped unreadable image {self._unreadable[failed]} ({reason})", stacklevel=3)
            self._read[[*failures, *([] if image_id is None else [image_id])]] = True
            self._check_unreadable(none_left=image_id is None)
            image_ids.append(image_id)
        return ImageBatch(
            torch.from_numpy(images),
            torch.from_numpy(self._labels[image_ids]),
            torch.from_numpy(slots.astype(np.int64)),
            torch.tensor(image_ids, dtype=torch.int64),
        )

    def _check_unreadable(self, none_left: bool) -> None:
        count, read = len(self._unreadable), int(self._read.sum())
        if none_left or count > UNREADABLE_LIMIT * max(read, min(max(len(self), 100), 1000)):
            raise DataError(
                f"{count} of the {read} images read so far from {self.source} are unreadable ({count / read:.1%}, "
                f"allowed {UNREADABLE_LIMIT:.0%}): {', '.join(self.skipped[:3])}{', …' if count > 3 else ''}"
            )

    def _decode(self, image_id: int) -> np.ndarray:
        row = self._rows[image_id]
        image = row[self._image_column] or {"bytes": None, "path": None}
        if "tar" in row:
            with open(row["tar"], "rb") as file:
                file.seek(row["offset"])
                encoded = file.read(row["size"])
        elif image["bytes"] is not None:
            encoded = image["bytes"]
        elif image["path"]:
            encoded = Path(image["path"]).read_bytes()
        else:
            raise DataError("the row has no image")
        if not encoded:
            raise DataError("zero bytes")
        with Image.open(BytesIO(encoded)) as picture:
            cropped = center_crop(picture.convert("RGB"), self.image_size)
        return np.asarray(cropped, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1

    def _name(self, image_id: int) -> str:
        image = self._rows[image_id][self._image_column]
        return image["path"] if image and image["path"] else f"row {image_id} of {self.source}"

    def _check_labels(self, column: pa.ChunkedArray, num_classes: int | None) -> np.ndarray:
        if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
            raise DataError(f"labels of {self.source} are of type {column.type}, expected integers")
        if column.null_count:
            image_id = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise DataError(f"{self._name(image_id)} has no label ({column.null_count} such images in {self.source})")
        labels = column.to_numpy().astype(np.int64)
        outside = np.flatnonzero((labels < 0) | (labels >= (np.inf if num_classes is None else num_classes)))
        if len(outside):
            allowed = "0 and up" if num_classes is None else f"0..{num_classes - 1}"
            image_id = int(outside[0])
            raise DataError(
                f"label {labels[image_id]} of {self._name(image_id)} is out of range: "
                f"expected {allowed} ({len(outside)} such images in {self.source})"
            )
        return labels


def ahead(batches: Iterator[ImageBatch], device: torch.device) -> Iterator[ImageBatch]:
    """The same batches, the next one made in the background; pinned, so that a GPU can fetch it meanwhile."""
    gpu = device.type == "cuda"

    def following() -> ImageBatch | None:
        batch = next(batches, None)
        return ImageBatch(*(value.pin_memory() for value in batch)) if batch is not None and gpu else batch

    # A thread starts on GPU 0, and pinning memory would take some of it.
    start = {"initializer": torch.cuda.set_device, "initargs": (device,)} if gpu else {}
    with ThreadPoolExecutor(1, thread_name_prefix="vapi-fast-data", **start) as thread:
        coming = thread.submit(following)
        while (batch := coming.result()) is not None:
            coming = thread.submit(following)
            yield batch


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


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


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
