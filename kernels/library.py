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
    """Digest of the device code, its settings and its launches."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.json")]):
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


@functools.cache
def served() -> frozenset[str]:
    """Architectures whose kernels come from the library that VAPI_FAST_KERNELS names, from this call on.

    Warns and serves none where the library is of other versions. Raises ValueError for a folder that holds none.
    """
    name = os.environ.get(LIBRARY)
    if not name:
        return frozenset()
    try:
        manifest = json.loads((Path(name) / MANIFEST).read_text(encoding="utf-8"))
        found, architectures = manifest["versions"], frozenset(manifest["architectures"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{LIBRARY}={name}: no library of kernels ({error}); build one by cmake -B build && cmake --build build, "
            "or unset the variable"
        ) from error
    other = [part for part, version in versions().items() if found.get(part) != version]
    if other:
        warnings.warn(f"{LIBRARY}={name} is for another version of {' and '.join(other)}: not used", stacklevel=2)
        return frozenset()
    triton.knobs.cache.manager_class = type("LibraryCache", (LibraryCache,), {"folder": Path(name)})
    return architectures
