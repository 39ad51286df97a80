"""Parts of a check: commands with a time limit each, side by side or in turn, none of which hides another's result."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE = 15.0  # seconds between the request to stop and the end of a part that goes on
INTERVAL = 0.5  # seconds between two readings of clocks and power
LOG_BYTES, TAIL = 8 * 2**20, 3000


@dataclass(frozen=True)
class Part:
    """command: of the seconds that it may take. needs: Python modules and programs, without which it is skipped.

    reserved: seconds that the stages before leave to it.
    figures: reads what it measured from its folder and its output; failures: messages, likewise.
    """

    name: str
    command: Callable[[float], list[str]]
    limit: float
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    reserved: float = 0.0
    optional: bool = False
    figures: Callable[[str], Any] = lambda output: None
    failures: Callable[[str], list[str]] = lambda output: []


def missing(name: str) -> bool:
    return importlib.util.find_spec(name) is None and shutil.which(name) is None


def run(part: Part, limit: float, log: Path) -> dict[str, Any]:
    """Result of one part: status passed, failed, timed out or skipped; its output goes to `log`."""
    absent = [name for name in part.needs if missing(name)]
    if absent:
        return {"status": "skipped", "optional": part.optional, "reason": f"not installed: {', '.join(absent)}"}
    if limit <= 0:
        return {"status": "timed out", "optional": part.optional, "reason": "no time was left for it", "seconds": 0.0}
    # The parts decide for themselves whether to interpret kernels.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = time.monotonic()
    with log.open("w+b") as file:
        process = subprocess.Popen(
            part.command(limit),
            cwd=part.folder,
            env=environment | part.environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        timed_out = not ended(process, limit)
        if timed_out:  # asked first, so that pytest writes what it has
            stop(process, signal.SIGINT)
            if not ended(process, GRACE):
                stop(process, signal.SIGKILL)
                process.wait()
    output = tail_of(log, LOG_BYTES)
    result = {
        "status": "timed out" if timed_out else "passed" if process.returncode == 0 else "failed",
        "optional": part.optional,
        "seconds": time.monotonic() - start,
        "limit": limit,
        "returncode": process.returncode,
    }
    try:
        result |= {"figures": part.figures(output), "failures": part.failures(output)}
    except Exception as error:  # stopped before it had written them, or halfway
        result |= {"figures": None, "failures": [f"no figures: {type(error).__name__}: {error}"]}
    if result["status"] != "passed":
        result["tail"] = output[-TAIL:]
        if part.optional and "Device not supported" in output:
            result |= {"status": "skipped", "reason": "compute-sanitizer: Device not supported"}
    return result


def ended(process: subprocess.Popen[bytes], limit: float) -> bool:
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        return False
    return True


def stop(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal a part and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def tail_of(log: Path, size: int) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return file.read().decode(errors="replace")


def run_together(stage: Sequence[Part], folder: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """Results by name of parts that run side by side, all ended within `seconds`; their logs go into `folder`."""
    results: dict[str, dict[str, Any]] = {}

    def work(part: Part) -> None:
        try:
            result = run(part, min(part.limit, seconds - GRACE), folder / f"{part.name}.log")
        except Exception as error:  # it could not even be started
            result = {"status": "failed", "optional": part.optional, "tail": f"{type(error).__name__}: {error}"}
        results[part.name] = result | {"gpu": readings.summary()}

    threads = [threading.Thread(target=work, args=(part,)) for part in stage]
    with Readings() as readings:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for part in stage:
        print(f"{part.name}: {results[part.name]['status']}", flush=True)
    return {part.name: results[part.name] for part in stage}


def gpu_reading() -> dict[str, float] | None:
    """Clocks in MHz, power in W, temperature in °C of the first GPU; None without one."""
    names = ("sm_clock", "memory_clock", "power", "temperature")
    if not missing("pynvml"):
        import pynvml

        try:
            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
            values = (
                pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
                pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
                pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
                pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
            )
            return dict(zip(names, map(float, values), strict=True))
        except pynvml.NVMLError:
            return None
    fields = nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")
    if not fields or not all(each.replace(".", "", 1).isdigit() for each in fields):  # "[N/A]"
        return None
    return dict(zip(names, map(float, fields), strict=True))


def nvidia_smi(query: str) -> list[str]:
    """Fields of the first GPU; none if they cannot be had."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = ended.stdout.splitlines()
    return [field.strip() for field in lines[0].split(",")] if lines else []


class Readings:
    """Clocks and power, read in the background inside a `with` block."""

    def __enter__(self) -> Readings:
        self.over = threading.Event()
        self.taken: list[dict[str, float]] = []
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def read(self) -> None:
        while not self.over.wait(INTERVAL):
            reading = gpu_reading()
            if reading is None:
                return
            self.taken.append(reading)

    def summary(self) -> dict[str, dict[str, float]] | None:
        """Least, median and greatest of each."""
        taken = list(self.taken)
        if not taken:
            return None
        columns = {name: [reading[name] for reading in taken] for name in taken[0]}
        return {
            name: {"min": min(values), "median": statistics.median(values), "max": max(values)}
            for name, values in columns.items()
        }
