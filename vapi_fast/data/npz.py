"""Arrays of an `.npz` file: what they say of themselves is held against what is there before any of it is read."""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vapi_fast.runtime.errors import DataError


class Array(NamedTuple):
    """An array in the file; `stream` stands at its first element."""

    stream: zipfile.ZipExtFile
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The file; raises DataError where it is none, or for damage that is met inside the `with` block."""
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "not a regular file" if os.path.exists(path) else "no such file"
        raise DataError(f"{path}: {found}, expected an .npz file")
    with damage_named(path), zipfile.ZipFile(path) as archive:
        yield archive


def names(path: Path) -> list[str]:
    """The arrays in the file; raises DataError where it is none of NumPy's."""
    with opened(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def open_array(path: Path, key: str) -> Array:
    """The array `key`; raises DataError where there is none, or one that does not fill the room it says it does."""
    with opened(path) as archive:
        if f"{key}.npy" not in archive.namelist():
            raise DataError(f"{path}: has no array {key}, only {', '.join(sorted(names(path))) or 'nothing'}")
        about = archive.getinfo(f"{key}.npy")
        stream = archive.open(about)
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
        held, said = about.file_size - stream.tell(), math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or held != said:
            raise DataError(
                f"{path}: damaged: {key} is {dtype} {list(shape)}, which is {said} bytes, and it holds {held}; copy or "
                "make it again"
            )
    return Array(stream, shape, dtype, fortran_order and len(shape) > 1)


def read_all(path: Path, key: str) -> np.ndarray:
    """The values of an array, which `open_array` has looked at, in float64."""
    with damage_named(path), np.load(path, allow_pickle=False) as file:
        return np.asarray(file[key]).astype(np.float64)


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """DataError for whatever zipfile and NumPy raise: of a password or a compression they have no one kind."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path}: truncated or not an .npz file ({error}); copy or make it again") from error
