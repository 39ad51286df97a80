"""Clocks for the benchmarks: the GPU's own time line by events, this thread's on a CPU."""

from __future__ import annotations

import ctypes
import functools
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

MOST_HELD = 0.05  # seconds that the GPU is kept waiting for the host at most
SLACK = 1e-4  # beyond what the host is expected to need
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class Moment:
    """A point on the GPU's time line; later minus earlier is in seconds, and waits until the GPU got there."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


# On a CPU all of the work is in this thread (see THREADS in conftest.py), whose own time leaves out what others take.
clock: Callable[[], Any] = Moment if torch.cuda.is_available() else time.thread_time


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_seconds(run: Callable[[], object]) -> float:
    """Time until `run` returns, its work on the GPU perhaps still under way."""
    synchronize()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    synchronize()
    return seconds


@functools.cache
def cycles_per_second() -> float:
    cycles = 20_000_000
    torch.cuda._sleep(cycles)
    start = Moment()
    torch.cuda._sleep(cycles)
    return cycles / (Moment() - start)


def hold(seconds: float) -> None:
    """Keep the GPU busy for that long, so that the host is ahead of it and launch gaps stay out of the times."""
    if torch.cuda.is_available():
        torch.cuda._sleep(int(min(seconds + SLACK, MOST_HELD) * cycles_per_second()))


def timed(run: Callable[[], object], held: float) -> float:
    """Seconds of `run` on the device; `held`: what the host needs to launch it."""
    hold(held)
    start = clock()
    run()
    return clock() - start


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as PyTorch does on a GPU.

    Else page faults are up to half of the time of an operation on a CPU, depending on what ran before it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
