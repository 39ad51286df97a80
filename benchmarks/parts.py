"""Parts of a check: commands bounded in time, side by side or in turn, none of which hides another's result."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE = 5.0  # last seconds of a bound: a part that is still there is asked to stop
INTERVAL = 0.5  # seconds between two looks at the parts, at clocks and at power
LOG_BYTES, TAIL = 8 * 2**20, 3000
REFUSED = "Device not supported"  # by compute-sanitizer, of a virtual machine's GPU
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)
now = time.monotonic


@dataclass(frozen=True)
class Part:
    """commands: run side by side in `folder`. bound: seconds after which nothing of them is left.

    rest: it gets what is left of the check's time, if that is no less than the bound.
    needs: Python modules and programs, without which it is left out. compiled: folder of Triton's cache.
    figures, failures: what its output, and the files that it writes, say; read while it runs too.
    """

    name: str
    bound: float
    commands: Sequence[list[str]]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    compiled: Path | None = None
    rest: bool = False
    figures: Callable[[str], Any] = lambda output: None
    failures: Callable[[str], list[str]] = lambda output: []

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None and shutil.which(name) is None]


class Running:
    """A part under way. `result`: its status (running, passed, failed, timed out, refused) and what it has measured."""

    def __init__(self, part: Part, log: Path) -> None:
        self.part, self.log, self.start, self.asked = part, log, now(), False
        self.processes: list[subprocess.Popen[bytes]] = []
        self.readings: list[dict[str, float]] = []
        start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.result: dict[str, Any] = {"status": "running", "start": start, "bound": part.bound, "figures": None}
        if part.compiled is not None:
            self.result["triton_cache"] = "warm" if any(part.compiled.glob("*")) else "cold"
        # The parts decide for themselves whether to interpret kernels.
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        options = {"cwd": part.folder, "env": inherited | part.environment, "stdin": subprocess.DEVNULL}
        try:
            with log.open("wb") as file:
                options |= {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
                for command in part.commands:
                    self.processes.append(subprocess.Popen(command, preexec_fn=die_with_the_check, **options))
        except OSError as error:  # one could not even be started
            self.kill()
            self.result |= {"status": "failed", "seconds": 0.0, "tail": str(error)}

    def look(self, reading: dict[str, float] | None) -> bool:
        """Note what is new, stop it where its time is over; whether it has ended."""
        self.readings += [reading] if reading else []
        if self.result["status"] != "running":
            return True
        spent, over = now() - self.start, all(each.poll() is not None for each in self.processes)
        if not over and spent >= self.part.bound:
            self.kill()
            over = True
        elif not over and spent >= self.part.bound - GRACE and not self.asked:
            self.asked = True  # so that pytest writes what it has
            self.signal(signal.SIGINT)
        output = tail_of(self.log, LOG_BYTES)
        with contextlib.suppress(Exception):  # nothing is written yet, or half of it
            self.result["figures"] = self.part.figures(output)
        if over:
            self.finish(output, spent)
        return over

    def finish(self, output: str, spent: float) -> None:
        self.kill()  # what it has left behind
        codes = [each.returncode for each in self.processes]
        status = "timed out" if self.asked or spent >= self.part.bound else "failed" if any(codes) else "passed"
        self.result |= {"status": status, "seconds": spent, "returncodes": codes, "gpu": spans(self.readings)}
        try:
            self.result["failures"] = self.part.failures(output)
        except Exception as error:
            self.result["failures"] = [f"no report: {type(error).__name__}: {error}"]
        if status != "passed":
            self.result |= {"tail": output[-TAIL:], "status": "refused" if REFUSED in output else status}

    def signal(self, number: signal.Signals) -> None:
        """Signal it and everything that it started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def die_with_the_check() -> None:
    """In a part's process: if the check is killed, it goes too, and with it what it holds of the GPU's memory.

    Until then it hears when it is asked to stop, also where a shell has had that ignored (of what it starts with `&`).
    """
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_together(parts: Sequence[Part], folder: Path, note: Callable[[str, dict[str, Any]], None]) -> None:
    """Run parts side by side, their logs in `folder`; `note` gets a part's name and result whenever that changes."""
    running: list[Running] = []
    try:
        for part in parts:
            running.append(Running(part, folder / f"{part.name}.log"))
            note(part.name, running[-1].result)
        reading = gpu_reading()
        while running:
            time.sleep(INTERVAL)
            reading = reading and gpu_reading()
            for each in list(running):
                before = dict(each.result)
                if each.look(reading):
                    running.remove(each)
                if each.result != before or each not in running:
                    note(each.part.name, each.result)
    finally:
        for each in running:
            each.kill()


def tail_of(log: Path, size: int) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return file.read().decode(errors="replace")


def gpu_reading() -> dict[str, float] | None:
    """Clocks in MHz, power in W, temperature in °C of the first GPU; None without one."""
    fields = nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")
    if not fields or not all(each.replace(".", "", 1).isdigit() for each in fields):  # "[N/A]"
        return None
    return dict(zip(("sm_clock", "memory_clock", "power", "temperature"), map(float, fields), strict=True))


def nvidia_smi(query: str) -> list[str]:
    """Fields of the first GPU; none if they cannot be had."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [each.strip() for each in ended.stdout.partition("\n")[0].split(",") if each.strip()]


def spans(readings: Sequence[dict[str, float]]) -> dict[str, dict[str, float]] | None:
    """Least, median and greatest of each."""
    columns = {name: [each[name] for each in readings] for name in (readings[0] if readings else ())}
    found = {"min": min, "median": statistics.median, "max": max}
    return {name: {key: of(values) for key, of in found.items()} for name, values in columns.items()} or None
