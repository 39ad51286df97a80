"""Sets of 8-bit images to score: an `.npz` file, a folder of pictures, a labelled image set, or generated samples."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vapi_fast.data.dataset import DECODE_THREADS, ImageData
from vapi_fast.data.pixels import rgb
from vapi_fast.data.splits import IMAGE_SUFFIXES, is_hidden
from vapi_fast.runtime.errors import DataError

IMAGES_KEY = "arr_0"  # of the ADM evaluator's files
STATISTICS_KEYS = ("mu", "sigma", "mu_s", "sigma_s")
MANIFEST = "manifest.json"
SAMPLES_FILE = "samples.npz"
SAMPLES_FOLDER = "images"
TOLERANCE = 1e-3  # of a covariance, as part of its largest variance
DAMAGE = (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error)  # what reading a bad .npz raises


class ImageSet(Protocol):
    """Images in a fixed order."""

    def __len__(self) -> int: ...

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        """Images start … stop − 1 as uint8 `[n,3,H,W]`, n ≤ batch_size; raises DataError for a damaged one."""


def open_image_set(source: Path, image_size: int, split: str | None = None) -> ImageSet:
    """The images at `source`, in one of these forms:

    - what `vapi-fast generate` wrote (its folder);
    - an `.npz` file with uint8 `arr_0` `[N,H,W,3]`, the ADM evaluator's layout;
    - a folder of pictures of one size, in the order of their names;
    - anything `--data` takes, in which case images are cropped to `image_size`²; by default the held-out split.

    Raises DataError where there is none of these, or a damaged one.
    """
    if source.is_dir() and (source / MANIFEST).is_file():
        return open_generated(source)
    if source.suffix == ".npz":
        return NpzImages(source)
    if source.is_dir() and pictures_in(source):
        return FolderImages(source)
    return LabelledImages(source, image_size, split)


def open_generated(folder: Path) -> ImageSet:
    """The finished samples that `vapi-fast generate` left in `folder`."""
    try:
        expected = len(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["images"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged or not one of vapi-fast generate's: {error}") from error
    npz = folder / SAMPLES_FILE
    if npz.exists():
        images: ImageSet = NpzImages(npz)
        present = len(images)
    else:
        present = len(pictures_in(folder / SAMPLES_FOLDER)) if (folder / SAMPLES_FOLDER).is_dir() else 0
    if present != expected:
        raise DataError(
            f"{folder} holds {present} of {expected} samples: run the same vapi-fast generate again to finish it"
        )
    return images if npz.exists() else FolderImages(folder / SAMPLES_FOLDER)


class NpzImages:
    """uint8 `arr_0` `[N,H,W,3]` of an `.npz` file, read in passing: 50 000 images need not fit into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as member:
            self.shape, order, dtype = read_header(member, self.path)
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or order or 0 in self.shape:
            raise DataError(
                f"{path}: {IMAGES_KEY} is {dtype} {list(self.shape)}, expected images as uint8 [N, H, W, 3]"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        size = int(np.prod(self.shape[1:]))
        with self._open() as member:
            read_header(member, self.path)
            member.seek(member.tell() + start * size)
            for first in range(start, stop, batch_size):
                count = min(batch_size, stop - first)
                try:
                    raw = member.read(count * size)
                except DAMAGE as error:
                    raise DataError(f"{self.path}: damaged ({error}); copy or make it again") from error
                if len(raw) != count * size:
                    raise DataError(f"{self.path}: damaged, ends inside {IMAGES_KEY}; copy or make it again")
                pixels = np.frombuffer(raw, dtype=np.uint8).reshape(count, *self.shape[1:])
                yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    def _open(self) -> zipfile.ZipExtFile:
        return open_npz_member(self.path, IMAGES_KEY)


def open_npz_member(path: Path, key: str) -> zipfile.ZipExtFile:
    """The array `key` of an `.npz` file, a stream that starts at its `.npy` header; DataError where there is none."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if f"{key}.npy" in names:
                return archive.open(f"{key}.npy")
    except DAMAGE as error:
        raise DataError(f"{path}: truncated or not an .npz file ({error}); copy or make it again") from error
    raise DataError(f"{path}: has no array {key}, only {', '.join(sorted(names)) or 'nothing'}")


def read_header(member: zipfile.ZipExtFile, path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of a `.npy` stream, which then stands at the first element."""
    try:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(member)
    except DAMAGE as error:
        raise DataError(f"{path}: {IMAGES_KEY} is not a NumPy array ({error})") from error


def read_statistics(path: Path) -> dict[str, Tensor] | None:
    """`mu`, `sigma` and, where they are there, `mu_s`, `sigma_s` of a statistics file; None if it is not one.

    Raises DataError for a damaged file, or arrays that are not a mean `[F]` with a covariance `[F,F]`.
    """
    if path.suffix != ".npz" or not path.is_file():
        return None
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: truncated or not an .npz file; copy or make it again")
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" not in file.files:
                return None
            found = {key: torch.from_numpy(np.asarray(file[key])) for key in STATISTICS_KEYS if key in file.files}
    except DAMAGE as error:
        raise DataError(f"{path}: its statistics cannot be read ({error})") from error
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean not in found:
            continue
        width = found[mean].numel()
        if not width or covariance not in found or found[mean].ndim != 1 or found[covariance].shape != (width, width):
            raise DataError(f"{path}: {mean} and {covariance} are not a mean [F] and its covariance [F, F]")
        if not (found[mean].isfinite().all() and found[covariance].isfinite().all()):
            raise DataError(f"{path}: {mean} or {covariance} has values that are not finite")
        if not is_covariance(found[covariance].double()):
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
    with zipfile.ZipFile(path) as archive:
        return f"{IMAGES_KEY}.npy" in archive.namelist()


class FolderImages:
    """The pictures that lie directly in a folder, all of one size, in the order of their names."""

    def __init__(self, folder: Path) -> None:
        self.paths = pictures_in(folder)
        self.size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        return decoded(self._load, start, stop, batch_size)

    def _load(self, index: int) -> np.ndarray:
        path = self.paths[index]
        try:
            with Image.open(path) as picture:
                pixels = np.asarray(rgb(picture))
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            raise DataError(f"cannot read {path}: {error}") from error
        self.size = self.size or pixels.shape[:2]
        if pixels.shape[:2] != self.size:
            (height, width), (others_height, others_width) = pixels.shape[:2], self.size
            raise DataError(
                f"{path} is {width}x{height} pixels, others are {others_width}x{others_height}: make them one size, or "
                "put them into class folders, which are cropped"
            )
        return pixels.transpose(2, 0, 1)


class LabelledImages:
    """A labelled image set, as `--data` takes it, cropped to `image_size`²; labels are not used."""

    def __init__(self, source: Path, image_size: int, split: str | None) -> None:
        self.data = ImageData(source, image_size, split=split, held_out=True)

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        return decoded(self._load, start, stop, batch_size)

    def _load(self, index: int) -> np.ndarray:
        image, _ = self.data.load(index)
        return (image * 127.5 + 127.5).round().to(torch.uint8).numpy()


def pictures_in(folder: Path) -> list[Path]:
    """The picture files directly in `folder`, in the order of their names; hidden ones do not count."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path.name) and path.is_file()
    )


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
