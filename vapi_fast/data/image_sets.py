"""Sets of 8-bit images to score: an `.npz` file, a folder of pictures, a labelled image set, or generated samples."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vapi_fast.data import npz
from vapi_fast.data.dataset import DECODE_THREADS, ImageData
from vapi_fast.data.geneval import METADATA, numbered, read_samples
from vapi_fast.data.pixels import rgb
from vapi_fast.data.splits import IMAGE_FORMATS, class_images, pictures_in
from vapi_fast.runtime.checkpoint import read_regular
from vapi_fast.runtime.errors import DataError, warn

IMAGES_KEY = "arr_0"  # of the ADM evaluator's files
LARGEST_STORED = 4096  # pixels: a batch has to fit into memory
WIDEST = 1 << 13  # features: a covariance has to fit into memory
LARGEST_STATISTIC = 1e30  # no network's features are: their products stay finite
MANIFEST = "manifest.json"
SAMPLES_FILE = "samples.npz"
SAMPLES_FOLDER = "images"
TOLERANCE = 1e-3  # of a covariance, as part of its largest variance


class ImageSet(Protocol):
    """Images in a fixed order. captions: what they were drawn from, one each; empty where it is not known."""

    captions: tuple[str, ...]

    def __len__(self) -> int: ...

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        """Images start … stop − 1 as uint8 `[n,3,H,W]`, n ≤ batch_size; raises DataError for a damaged one."""


def open_image_set(source: Path, image_size: int, split: str | None = None) -> ImageSet:
    """The images at `source`, in one of these forms:

    - what `vapi-fast generate` wrote (its folder);
    - a folder in GenEval's layout;
    - an `.npz` file with uint8 `arr_0` `[N,H,W,3]`, the ADM evaluator's layout;
    - a folder of pictures of one size, in the order of their names;
    - anything `--data` takes, in which case images are cropped to `image_size`²; by default the held-out split.

    Raises DataError where there is none of these, or a damaged one.
    """
    if os.path.lexists(source / MANIFEST):
        return open_generated(source)
    if source.suffix.lower() == ".npz":
        return NpzImages(source)
    if os.path.isdir(source) and any((place / METADATA).is_file() for place in numbered(source)):
        prompts, samples = read_samples(source)
        return FolderImages([each.path for each in samples], tuple(prompts[each.prompt].text for each in samples))
    if os.path.isdir(source) and (pictures := pictures_in(source)):
        if any(class_images(source)):
            warn(f"{source}: pictures directly in it ({len(pictures)}) are taken, those of its folders are not")
        return FolderImages(pictures)
    return LabelledImages(source, image_size, split)


def open_generated(folder: Path) -> ImageSet:
    """The finished samples that `vapi-fast generate` left in `folder`."""
    try:
        listed = json.loads(read_regular(folder / MANIFEST).decode())["images"]
        paths = [folder / each["file"] for each in listed]
        captions = tuple(str(each["prompt"]) for each in listed if "prompt" in each)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged or not one of vapi-fast generate's: {error}") from error
    samples = folder / SAMPLES_FILE
    images: ImageSet = NpzImages(samples) if samples.exists() else FolderImages(paths)
    present = len(images) if samples.exists() else sum(map(os.path.isfile, paths))
    if present != len(paths) or not present:
        raise DataError(
            f"{folder} holds {present} of {len(paths)} samples: run the same vapi-fast generate again to finish it"
        )
    images.captions = captions if len(captions) == len(paths) else ()
    return images


class NpzImages:
    """uint8 `arr_0` `[N,H,W,3]` of an `.npz` file, read in passing: 50 000 images need not fit into memory."""

    captions: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        array = npz.open_array(path, IMAGES_KEY)
        self.shape = array.shape
        if array.dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or 0 in self.shape:
            raise DataError(
                f"{path}: {IMAGES_KEY} is {array.dtype} {list(self.shape)}, expected images as uint8 [N, H, W, 3]"
            )
        if array.fortran_order:
            raise DataError(
                f"{path}: {IMAGES_KEY} lies in Fortran's order, expected C's: save numpy.ascontiguousarray of it"
            )
        if max(self.shape[1:]) > LARGEST_STORED:
            raise DataError(
                f"{path}: its images are {self.shape[2]}x{self.shape[1]}, at most {LARGEST_STORED} are taken"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        size = math.prod(self.shape[1:])
        stream = npz.open_array(self.path, IMAGES_KEY).stream
        with stream:
            with npz.damage_named(self.path):
                stream.seek(stream.tell() + start * size)
            for first in range(start, stop, batch_size):
                count = min(batch_size, stop - first)
                with npz.damage_named(self.path):
                    raw = stream.read(count * size)
                if len(raw) != count * size:
                    raise DataError(f"{self.path}: damaged, ends inside {IMAGES_KEY}; copy or make it again")
                pixels = np.frombuffer(raw, dtype=np.uint8).reshape(count, *self.shape[1:])
                yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def read_statistics(path: Path) -> dict[str, Tensor] | None:
    """`mu`, `sigma` and, where they are there, `mu_s`, `sigma_s` of a file, in float64; None if it has no statistics.

    Raises DataError for a damaged file, or arrays that are not a mean `[F]` with a covariance `[F,F]`.
    """
    if path.suffix.lower() != ".npz" or not os.path.isfile(path):
        return None
    there = npz.names(path)
    if "mu" not in there:
        return None
    found: dict[str, Tensor] = {}
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean not in there:
            continue
        keys = (mean, covariance)
        arrays = [npz.open_array(path, key) for key in keys if key in there]
        width = math.prod(arrays[0].shape)
        if not 0 < width <= WIDEST or [a.shape for a in arrays] != [(width,), (width, width)]:
            raise DataError(f"{path}: {mean} and {covariance} are not a mean [F] and its covariance [F, F]")
        if any(array.dtype.kind not in "fiu" for array in arrays):
            raise DataError(f"{path}: {mean} and {covariance} are {arrays[0].dtype} and {arrays[1].dtype}, no numbers")
        found |= {key: torch.from_numpy(npz.read_all(path, key)) for key in keys}
        if not all((found[key].abs() <= LARGEST_STATISTIC).all() for key in keys):  # and no NaN
            raise DataError(f"{path}: {mean} or {covariance} has values that are not finite, or past any feature's")
        if not is_covariance(found[covariance]):
            raise DataError(
                f"{path}: {covariance} is not a covariance, which is symmetric and has no negative eigenvalue: make "
                "the statistics again"
            )
    return found


def is_covariance(matrix: Tensor) -> bool:
    """Whether a float64 matrix `[F,F]` is symmetric and positive semidefinite, up to float32 rounding."""
    scale = matrix.diagonal().max().clamp(min=1e-300)
    if (matrix - matrix.T).abs().max() > TOLERANCE * scale:
        return False
    # With every eigenvalue moved up by the tolerance there is a Cholesky factor if none was below its negative.
    _, failed = torch.linalg.cholesky_ex(matrix + TOLERANCE * scale * torch.eye(len(matrix), dtype=matrix.dtype))
    return not failed


def has_images(path: Path) -> bool:
    """Whether an `.npz` file holds images beside its statistics, as the ADM evaluator's reference batches do."""
    return IMAGES_KEY in npz.names(path)


class FolderImages:
    """Pictures, all of one size."""

    def __init__(self, paths: list[Path], captions: tuple[str, ...] = ()) -> None:
        self.paths = paths
        self.captions = captions

    @cached_property
    def size(self) -> tuple[int, ...]:
        """Height and width of the first picture, whichever thread or rank asks."""
        return read_picture(self.paths[0]).shape[:2]

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        return decoded(self._load, start, stop, batch_size)

    def _load(self, index: int) -> np.ndarray:
        path = self.paths[index]
        pixels = read_picture(path)
        if pixels.shape[:2] != self.size:
            (height, width), (others_height, others_width) = pixels.shape[:2], self.size
            raise DataError(
                f"{path} is {width}x{height} pixels, others are {others_width}x{others_height}: make them one size, or "
                "put them into class folders, which are cropped"
            )
        return pixels.transpose(2, 0, 1)


def read_picture(path: Path) -> np.ndarray:
    """A picture as uint8 `[H,W,3]`; raises DataError for a damaged one."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as picture:
            return np.asarray(rgb(picture))
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise DataError(f"cannot read {path}: {error}") from error


class LabelledImages:
    """A labelled image set, as `--data` takes it, cropped to `image_size`²; labels are not used."""

    captions: tuple[str, ...] = ()

    def __init__(self, source: Path, image_size: int, split: str | None) -> None:
        self.data = ImageData(source, image_size, split=split, held_out=True)

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        return decoded(self._load, start, stop, batch_size)

    def _load(self, index: int) -> np.ndarray:
        image, _ = self.data.load(index)
        return (image * 127.5 + 127.5).round().to(torch.uint8).numpy()


def decoded(load: Callable[[int], np.ndarray], start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
    """Batches of `load(start)` … `load(stop − 1)`, one batch ahead in threads."""
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        ahead: list[Iterator[np.ndarray]] = []
        for first in range(start, stop, batch_size):
            ahead.append(pool.map(load, range(first, min(first + batch_size, stop))))
            if len(ahead) > 1:
                yield torch.from_numpy(np.stack(list(ahead.pop(0))))
        for images in ahead:
            yield torch.from_numpy(np.stack(list(images)))
