"""Images on disk, in a seeded order that does not depend on the number of ranks; of `ImageData` with class labels."""

from __future__ import annotations

import copy
import itertools
import numbers
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vapi_fast.runtime.errors import DataError
from vapi_fast.runtime.packages import require

if TYPE_CHECKING:
    from typing_extensions import Self

    from vapi_fast.data.features import FeatureSource
    from vapi_fast.data.image_files import ImageRows

UNREADABLE_LIMIT = 0.01
DECODE_THREADS = 4
PREFETCH_STEPS = 2
SHOWN_CLASSES = 5


class ImageBatch(NamedTuple):
    """One rank's part of a step: `b = batch_size / world_size` images."""

    images: Tensor  # float32 [b, 3, H, W] in [-1, 1]
    labels: Tensor  # int64 [b]: class ids
    sample_ids: Tensor  # int64 [b]: slot of the image in its step, 0 .. batch_size - 1 over all ranks
    image_ids: Tensor  # int64 [b]: row of the image in the data set
    # Of captions, whose labels are the images' rows:
    # float [b, tokens, width], or token ids int64 [b, tokens], behind zeros where the caption is shorter
    features: Tensor | None = None
    mask: Tensor | None = None  # bool [b, tokens], False at those zeros

    def map(self, function: Callable[[Tensor], Tensor]) -> ImageBatch:
        """The batch with every tensor that is there replaced."""
        return ImageBatch(*(None if value is None else function(value) for value in self))

    def take(self, rows: slice | Tensor) -> ImageBatch:
        return self.map(lambda value: value[rows])

    def trimmed(self) -> ImageBatch:
        """Without the positions of padding that all of its captions have."""
        if self.mask is None:
            return self
        used = int(self.mask.any(0).sum())
        return self._replace(features=self.features[:, -used:], mask=self.mask[:, -used:])

    def to(self, device: torch.device) -> ImageBatch:
        """The same on `device`, from pinned memory without waiting for it."""
        return self.map(lambda value: value.to(device, non_blocking=True))


class ImageStream:
    """Images by their rows: decoded, cropped to `image_size`² and served in batches; an image's id is its row."""

    features: FeatureSource | None = None  # of captions

    def __init__(self, rows: ImageRows, labels: np.ndarray, image_size: int) -> None:
        """labels: int64 `[rows]`."""
        self.image_size = checked_side(image_size)
        self.source = rows.source
        self.split: str | None = rows.split
        self._rows = rows
        self._labels = labels
        self._read = np.zeros(len(rows), dtype=bool)
        self._unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, image_size: int) -> Self:
        """The same images, cropped to another size; which of them are unreadable is found anew."""
        other = copy.copy(self)
        other.image_size = checked_side(image_size)
        other._read, other._unreadable = np.zeros_like(self._read), {}
        return other

    def condition(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """What images with labels int64 `[n]` are drawn from, and its mask; of classes the labels themselves."""
        return labels, None

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
            raise DataError(f"cannot read {self._rows.name(image_id)}: {error}") from error

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
        check_whole_numbers(
            batch_size=batch_size, steps=steps, seed=seed, start_step=start_step, rank=rank, world_size=world_size
        )
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
                    room = self._room(len(slots))
                    in_flight.append((room, pool.map(self._decode_into, zip(*room, strict=True), image_ids)))
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

    def _room(self, count: int) -> tuple[np.ndarray, ...]:
        """What is filled for `count` slots: images and, of other sets, more."""
        return (np.empty((count, 3, self.image_size, self.image_size), dtype=np.float32),)

    def _fill(self, out: tuple[np.ndarray, ...], image_id: int) -> None:
        """Decode an image into a slot's part of the room; what it raises makes the image unreadable."""
        out[0][:] = self._decode(image_id)

    def _decode_into(self, out: tuple[np.ndarray, ...], image_id: int) -> tuple[int | None, dict[int, str]]:
        """Fill one slot from the first readable id at or after `image_id`; return that id and the failures before it.

        The id is None after a run of failures that is over the limit on its own: more than 1 % of the whole data set.
        """
        failures: dict[int, str] = {}
        for candidate in itertools.chain(range(image_id, len(self)), range(image_id)):
            try:
                self._fill(out, candidate)
            except Exception as error:  # a damaged file makes Pillow raise nearly anything, SyntaxError included
                failures[candidate] = f"{type(error).__name__}: {error}"
                if len(failures) > UNREADABLE_LIMIT * max(len(self), 100):
                    break
            else:
                return candidate, failures
        return None, failures

    def _collect(self, slots: np.ndarray, room: tuple[np.ndarray, ...], decoded: Iterator) -> ImageBatch:
        image_ids = []
        for image_id, failures in decoded:
            for failed, reason in failures.items():
                if failed not in self._unreadable:
                    self._unreadable[failed] = self._rows.name(failed)
                    warnings.warn(f"skipped unreadable image {self._unreadable[failed]} ({reason})", stacklevel=3)
            self._read[[*failures, *([] if image_id is None else [image_id])]] = True
            self._check_unreadable(none_left=image_id is None)
            image_ids.append(image_id)
        images, *others = map(torch.from_numpy, room)
        return ImageBatch(
            images,
            torch.from_numpy(self._labels[image_ids]),
            torch.from_numpy(slots.astype(np.int64)),
            torch.tensor(image_ids, dtype=torch.int64),
            *others,
        )

    def _check_unreadable(self, none_left: bool) -> None:
        count, read = len(self._unreadable), int(self._read.sum())
        if none_left or count > UNREADABLE_LIMIT * max(read, min(max(len(self), 100), 1000)):
            raise DataError(
                f"{count} of the {read} images read so far from {self.source} are unreadable ({count / read:.1%}, "
                f"allowed {UNREADABLE_LIMIT:.0%}): {', '.join(self.skipped[:3])}{', …' if count > 3 else ''}"
            )

    def _decode(self, image_id: int) -> np.ndarray:
        return self._rows.pixels(image_id, self.image_size)


class ImageData(ImageStream):
    """A labelled image set: decoded, cropped to `image_size`² and served in batches; an image's id is its row.

    `source` is a local path, read through Hugging Face `datasets`: a folder of class folders (labels follow the sorted
    folder names, in numeric order where all are numbers), a folder written by `save_to_disk`, a `.parquet` file or a
    folder of them, a WebDataset `.tar` file or a folder of them (`key.jpg` beside `key.cls`). Where the source has
    splits, `split` picks one; by default the training images, or with `held_out` those of validation or test.
    `class_index` is a file with the ids of the classes' names (`vapi_fast.data.splits.read_class_index`).
    Of parquet and tar files the names say the split; those that say none are training's beside others that do.
    Parquet rows and tar indices are cached by `datasets`, keyed by the files' paths and modification times.

    Raises `DataError` for a missing or unknown source, no such split, no rows, no image or label column, an absent
    label, a label outside 0 .. num_classes - 1 (only negative ones when `num_classes` is None), or where `datasets` is
    not installed.
    """

    def __init__(
        self,
        source: str | Path,
        image_size: int,
        *,
        num_classes: int | None = None,
        split: str | None = None,
        held_out: bool = False,
        class_index: Path | None = None,
    ) -> None:
        checked_side(image_size)  # before the images are looked for
        rows = reader().LabelledRows(Path(source), split, held_out, class_index)
        super().__init__(rows, rows.labels(num_classes), image_size)
        self.class_names: dict[int, str] | None = rows.class_names

    def summary(self) -> dict[str, Any]:
        """What the set is made of, for `run.json` and to tell it from another: images and their number by class."""
        ids, counts = np.unique(self._labels, return_counts=True)
        names = self.class_names or {}
        classes = {
            str(i): {"name": names.get(i), "images": n} for i, n in zip(ids.tolist(), counts.tolist(), strict=True)
        }
        return {"split": self.split, "images": len(self), "classes": classes}


def checked_side(image_size: int) -> int:
    check_whole_numbers(image_size=image_size)
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    return image_size


def check_whole_numbers(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number, got {value!r}")


def described(summary: dict[str, Any], num_classes: int) -> str:
    """A summary's images and classes, or captions, in a line; a second one where the generator has more classes."""
    if captions := summary.get("captions"):
        split = f" of split {summary['split']}" if summary["split"] else ""
        left_out = f"; {captions['left_out']} without are left out" if captions["left_out"] else ""
        return f"{summary['images']} images with captions{split}, from {captions['column']!r}{left_out}"
    classes = summary["classes"]
    shown = [f"{entry['name'] or 'class'}={label}" for label, entry in list(classes.items())[:SHOWN_CLASSES]]
    split = f" of split {summary['split']}" if summary["split"] else ""
    text = f"{summary['images']} images in {len(classes)} classes{split}: {', '.join(shown)}"
    text += ", …" if len(classes) > SHOWN_CLASSES else ""
    if len(classes) < num_classes:
        text += (
            f"\nwarning: the generator has {num_classes} classes, these images {len(classes)}: are their ids the "
            "generator's? --class-index gives them by the folders' names"
        )
    return text


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What tells two summaries apart, in a few words; nothing if they are the same."""
    for label in sorted(before["classes"].keys() | now["classes"].keys(), key=int):
        one, other = (summary["classes"].get(label, {"name": None, "images": 0}) for summary in (before, now))
        if one != other:
            one, other = (
                f"{each['images']} images{' of ' + each['name'] if each['name'] else ''}" for each in (one, other)
            )
            return f"class {label} had {one}, now it has {other}"
    if before["split"] == now["split"] and before.get("captions") != now.get("captions"):
        return f"it had {before['images']} with other captions than the {now['images']} now have"
    return "" if before == now else f"it was split {before['split']}, now it is {now['split']}"


def reader() -> ModuleType:
    """`vapi_fast.data.image_files`; raises `DataError` where a package that it needs is not installed."""
    require(DataError, "reading images", "datasets", "PIL")
    from vapi_fast.data import image_files

    return image_files


def ahead(batches: Iterator[ImageBatch], device: torch.device) -> Iterator[ImageBatch]:
    """The same batches, the next one made in the background; pinned, so that a GPU can fetch it meanwhile."""
    gpu = device.type == "cuda"

    def following() -> ImageBatch | None:
        batch = next(batches, None)
        batch = batch and batch.trimmed()
        return batch.map(Tensor.pin_memory) if batch and gpu else batch

    # A thread starts on GPU 0, and pinning memory would take some of it.
    start = {"initializer": torch.cuda.set_device, "initargs": (device,)} if gpu else {}
    with ThreadPoolExecutor(1, thread_name_prefix="vapi-fast-data", **start) as thread:
        coming = thread.submit(following)
        while (batch := coming.result()) is not None:
            coming = thread.submit(following)
            yield batch


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)
