"""Compile what production launches (`launches.json`), in parallel, for GPUs that need not be there.

    python -m vapi_fast.kernels.compile --arch sm_90 [--scene align]

fills Triton's cache, or a library in the cache's place: a folder with the machine code of every kernel and a manifest
of the versions that it is good for (`--output-dir`, with the report of `vapi_fast.kernels.check`). With
VAPI_FAST_KERNELS naming such a folder nothing is compiled that it holds.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import FileCacheManager, get_cache_manager
from triton.runtime.driver import driver

from .launches import Pointer, Specialisation, load

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
WITHOUT_FP8 = ("sm_80",)  # fp8 needs a GPU of compute capability 8.9 or more
LIBRARY = "VAPI_FAST_KERNELS"
MANIFEST = "manifest.json"


class Tensor(SimpleNamespace):
    """Stands for a tensor in a launch that compiles only. dtype: PyTorch's; pointer: its address."""

    def data_ptr(self) -> int:
        return self.pointer

    def ptr_range(self) -> int:
        return 2**31


class Absent:
    """Triton's driver where there is no GPU, or it is not to be touched: the device's index is its architecture."""

    launcher_cls = object

    def __init__(self, architecture: str) -> None:
        self.number = int(architecture.removeprefix("sm_"))

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.number, 32)


def compiled(each: Specialisation, architecture: str) -> Any:
    """Triton's compiled kernel, from its cache if it is there; specialised as by a launch.

    For a process that launches nothing: Triton's driver is gone afterwards.
    """
    arguments = [
        Tensor(dtype=getattr(torch, a.dtype), pointer=a.data_ptr()) if isinstance(a, Pointer) else a
        for a in each.arguments
    ]
    driver.set_active(Absent(architecture))
    return each.function.run(*arguments, grid=(1,), warmup=True, **dict(each.constants))


def wanted(architecture: str, scenes: Iterable[str] = ()) -> list[Specialisation]:
    """What the architecture can run of the launches of these scenes; of none: of all."""
    scenes = set(scenes)
    return [
        each
        for each, launched_by in load().items()
        if (not scenes or scenes & set(launched_by)) and not (needs_fp8(each) and architecture in WITHOUT_FP8)
    ]


def needs_fp8(each: Specialisation) -> bool:
    return any(isinstance(argument, Pointer) and "float8" in argument.dtype for argument in each.arguments)


def in_parallel(function: Any, work: Sequence[tuple[Any, ...]], processes: int | None) -> Iterator[Any]:
    """Results of `function(*arguments)` in the order of `work`, by forked processes: Triton is imported once."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(function, *zip(*work, strict=True))


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


def start(architecture: str, scenes: Sequence[str]) -> subprocess.Popen[bytes] | None:
    """Fill Triton's cache in the background; None where that was done before. To be waited for."""
    if marker(architecture, scenes).exists():
        return None
    command = [sys.executable, "-m", __name__, "--arch", architecture, "--scene", *scenes]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def marker(architecture: str, scenes: Sequence[str]) -> Path:
    """The file that says that Triton's cache holds all of these."""
    key = json.dumps([versions(), architecture, sorted(scenes)])
    folder = Path(triton.knobs.cache.dir)
    return folder / f"vapi-fast-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def compile_quietly(each: Specialisation, architecture: str) -> None:
    compiled(each, architecture)


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__name__}", description="Fill Triton's cache.")
    parser.add_argument("--arch", default="sm_90", metavar="sm_90", help="architecture to compile for")
    parser.add_argument("--scene", nargs="*", default=[], help="scenes of launches.json; default: all")
    parser.add_argument("--processes", type=int, default=min(len(os.sched_getaffinity(0)), 32))
    options = parser.parse_args()
    work = [(each, options.arch) for each in wanted(options.arch, options.scene)]
    for _ in in_parallel(compile_quietly, work, options.processes):
        pass
    done = marker(options.arch, options.scene)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
