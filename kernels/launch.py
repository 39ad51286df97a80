"""What every kernel's launch needs: the launch itself, or its record for compilation elsewhere, and tensors' forms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHE_DTYPES = (*DTYPES, torch.float8_e4m3fn, torch.int8)  # of keys and values
MIN_DOT = 16  # the least that a matrix product takes in any dimension


class Launch(NamedTuple):
    """One launch of a kernel: `kernel[grid](*args, **constants)`."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass
class Recording:
    """Launches that were asked for, in order: each as `describe` has it."""

    carry_out: bool
    describe: Callable[[Launch], Any]
    launches: list[Any] = field(default_factory=list)


_recording: Recording | None = None


@contextmanager
def recorded(
    *, carry_out: bool = False, describe: Callable[[Launch], Any] = lambda launch: launch
) -> Iterator[Recording]:
    """Note what is launched inside the `with` block.

    carry_out: launch as well; otherwise nothing is, so tensors need no memory behind them.
    describe: makes what is noted of a launch, for who must not hold its tensors.
    """
    global _recording
    _recording = Recording(carry_out, describe)
    try:
        yield _recording
    finally:
        _recording = None


@functools.cache
def device_architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; elsewhere a small number, so that every code path is taken."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run `kernel` over `grid` on the device of its tensors; an empty grid runs nothing.

    constants: the kernel's compile-time arguments, num_warps and num_stages.
    """
    if _recording is not None:
        _recording.launches.append(_recording.describe(Launch(kernel, grid, args, constants)))
        if not _recording.carry_out:
            return
    if 0 in grid:
        return
    device = next(each.device for each in map(tensor_of, args) if each is not None)
    if device.type == "cuda":
        library.served()
        with torch.cuda.device(device):
            kernel[grid](*args, **constants)
    elif isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"vapi_fast: Triton kernels run on CUDA tensors, got one on {device}; use_backend('reference') runs "
            "anywhere, and TRITON_INTERPRET=1 in the environment interprets the kernels on CPU tensors"
        )
    else:
        kernel[grid](*args, **constants)


def tensor_of(argument: Any) -> Tensor | None:
    """The tensor that an argument is, or describes."""
    if isinstance(argument, TensorDescriptor):
        argument = argument.base
    return argument if isinstance(argument, Tensor) else None


def check_dtypes(operation: str, dtypes: tuple[torch.dtype, ...] = DTYPES, /, **tensors: Tensor | None) -> None:
    """TypeError for a tensor of a dtype that the kernel does not take (float64, float8)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in dtypes:
            *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(
                f"{operation}: {name} must be {', '.join(others)} or {last} on the 'triton' backend, got "
                f"{str(tensor.dtype).removeprefix('torch.')}; use_backend('reference') takes any floating dtype"
            )


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as 0-d int64 tensor on the device, so that a captured graph reads it anew at every replay."""
    if isinstance(seed, Tensor):
        return seed.to(device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least n, for a block that holds n elements; 1 for none."""
    return 1 << max(n - 1, 0).bit_length()  # Triton's own function costs the host as much as a launch


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def rows_of(x: Tensor) -> Tensor:
    """`[..., D]` as `[rows, D]` with adjacent columns; a view where the strides allow it."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def channel_blocks(settings: dict[str, int], channels: int, rows: str) -> dict[str, int]:
    """A kernel's settings with BLOCK_ELEMENTS split into all channels and as many rows (named `rows`) as remain."""
    block_c = next_power_of_2(channels)
    rest = {name: value for name, value in settings.items() if name != "BLOCK_ELEMENTS"}
    return rest | {"BLOCK_C": block_c, rows: max(1, settings["BLOCK_ELEMENTS"] // block_c)}
