"""Kernels compiled elsewhere: a folder that takes the compiler's place where VAPI_FAST_KERNELS names it.

It holds a folder for each key of Triton's cache, with the machine code and its description, and `manifest.json`, which
says what it was made with. Triton's keys cover kernel, specialisation, architecture and compiler: what does not fit is
not found, and compiled as ever.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import FileCacheManager, get_cache_manager

LIBRARY = "VAPI_FAST_KERNELS"
MANIFEST = "manifest.json"


@functools.cache
def sources() -> str:
    """Digest of the device code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What a library must have in common with those who use it."""
    return {"triton": triton.__version__, "kernels": sources()}


def keep(kernel: Any, library: Path) -> None:
    """Put what Triton needs to launch a compiled kernel into a library."""
    name = f"{kernel.metadata.name}.json"
    cached = get_cache_manager(kernel.hash)
    entry = library / cached.key
    entry.mkdir(parents=True, exist_ok=True)
    for file, path in (cached.get_group(name) or {}).items():
        if file.endswith((".json", ".cubin")):
            temporary = entry / f"{file}.tmp"
            shutil.copyfile(path, temporary)
            os.replace(temporary, entry / file)


def write_manifest(library: Path, architectures: Sequence[str], count: int) -> None:
    """Last, so that a library that was not finished is none."""
    record = {"versions": versions(), "architectures": list(architectures), "kernels": count}
    temporary = library / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(temporary, library / MANIFEST)


class LibraryCache(FileCacheManager):
    """Triton's cache with a library before it."""

    folder: Path

    def get_group(self, filename: str) -> dict[str, str] | None:
        entry = self.folder / self.key
        if (entry / filename).exists():
            return {path.name: str(path) for path in entry.iterdir()}
        return super().get_group(filename)


def use_library(folder: Path) -> None:
    """Take kernels from `folder` from now on; warns and compiles where it is for other versions.

    Raises ValueError for a folder that holds no library.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{LIBRARY}={folder}: no library of kernels ({error}); build one by cmake -B build && cmake --build build, "
            "or unset the variable"
        ) from error
    other = [name for name, version in versions().items() if found.get(name) != version]
    if other:
        warnings.warn(f"{LIBRARY}={folder} is for another version of {' and '.join(other)}: not used", stacklevel=2)
        return
    manager = type("LibraryCache", (LibraryCache,), {"folder": folder})
    triton.knobs.cache.manager_class = manager
