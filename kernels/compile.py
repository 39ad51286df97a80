"""Compile what production launches (`launches.json`), in parallel, for GPUs that need not be there.

    python -m vapi_fast.kernels.compile --arch sm_90

fills Triton's cache; an alignment does so while its weights are made. `vapi_fast.kernels.check --output-dir` leaves a
library instead: a folder with the machine code of every kernel and a manifest of the versions that it is good for. With
VAPI_FAST_KERNELS naming such a folder nothing is compiled that it holds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import library
from .launches import Descriptor, Pointer, Specialisation, load

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MOST_PROCESSES = 32  # at once; Triton's compiler takes half a gigabyte each
FP8, DESCRIPTORS = 89, 90  # compute capabilities from which GPUs have them


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
        self.number = number(architecture)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.number, 32)


def stand_in(argument: Any) -> Any:
    """For the tensor or the descriptor of one that a launch has, the argument itself for anything else."""
    if isinstance(argument, Pointer):
        return Tensor(dtype=getattr(torch, argument.dtype), pointer=argument.data_ptr())
    if isinstance(argument, Descriptor):
        base = Tensor(dtype=getattr(torch, argument.dtype), pointer=4096)
        strides = [16] * (len(argument.block) - 1) + [1]
        return TensorDescriptor(base, list(argument.block), strides, list(argument.block))
    return argument


def compiled(each: Specialisation, architecture: str) -> Any:
    """Triton's compiled kernel, from its cache if it is there; specialised as by a launch.

    For a process that launches nothing: Triton's driver is gone afterwards.
    """
    arguments = [stand_in(argument) for argument in each.arguments]
    driver.set_active(Absent(architecture))
    return each.function.run(*arguments, grid=(1,), warmup=True, **dict(each.constants))


def wanted(architecture: str) -> list[Specialisation]:
    """What is launched on GPUs of this architecture."""
    return [each for each in load() if number(architecture) >= needed(each)]


def number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))


def needed(each: Specialisation) -> int:
    """The least compute capability that has what the kernel takes, 0 for any."""
    tensors = [argument for argument in each.arguments if isinstance(argument, Pointer | Descriptor)]
    if any(isinstance(argument, Descriptor) for argument in tensors):
        return DESCRIPTORS
    return FP8 if any("float8" in argument.dtype for argument in tensors) else 0


def in_parallel(function: Any, work: Sequence[tuple[Any, ...]], processes: int | None) -> Iterator[Any]:
    """Results of `function(*arguments)` in the order of `work`, by forked processes: Triton is imported once."""
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=fork, initializer=end_with_parent) as pool:
        yield from pool.map(function, *zip(*work, strict=True))


def end_with_parent() -> None:
    """Ask Linux to end this process when the one that started it is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def in_background(architecture: str) -> Iterator[None]:
    """Fill Triton's cache by other processes during the `with` block, unless that was done before on this machine.

    The block ends when they have. What they could not compile is said in a line, and left to the first launch. A
    library that serves the architecture takes their place.
    """
    if architecture in library.served() or marker(architecture).exists():
        yield
        return
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, "--arch", architecture]
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with subprocess.Popen(command, env=environment, **silent) as process:
        try:
            yield
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        print("not all kernels could be compiled ahead: the first launches will", file=sys.stderr)


def marker(architecture: str) -> Path:
    """The file that says that Triton's cache holds everything."""
    key = json.dumps([library.versions(), architecture])
    return Path(triton.knobs.cache.dir) / f"vapi-fast-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def fill_cache(each: Specialisation, architecture: str) -> str | None:
    """Compile one specialisation; what went wrong."""
    try:
        link_launcher(compiled(each, architecture))
    except Exception as error:  # the others are to be compiled all the same
        return f"{each.kernel} on {architecture}: {type(error).__name__}: {error}"
    return None


def link_launcher(kernel: Any) -> None:
    """Build the C stub that Triton before 3.7 launches each signature through, where there is a driver to link with."""
    from triton.backends.nvidia import driver as nvidia

    if hasattr(nvidia, "make_launcher"):
        with contextlib.suppress(AssertionError):  # no libcuda
            nvidia.CudaLauncher(kernel.src, kernel.metadata)


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.compile", description="Fill Triton's cache.")
    parser.add_argument("--arch", default="sm_90", metavar="sm_90", help="architecture to compile for")
    parser.add_argument("--processes", type=int, default=min(len(os.sched_getaffinity(0)), MOST_PROCESSES))
    parser.add_argument("--only", default="", metavar="NAME", help="only kernels whose name contains NAME")
    options = parser.parse_args()
    end_with_parent()
    work = [(each, options.arch) for each in wanted(options.arch) if options.only in each.kernel]
    failures = [each for each in in_parallel(fill_cache, work, options.processes) if each]
    print(*failures, sep="\n", file=sys.stderr)
    if not failures and not options.only:
        done = marker(options.arch)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
