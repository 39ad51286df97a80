"""Search faster launch settings on this machine's GPU, and write them into the launch tables.

    python -m vapi_fast.kernels.tune [--only NAME] [--seconds N] [--output-dir DIR]

Kernel by kernel, coordinate descent from the settings in use: one setting at a time is changed, block sizes and other
powers of two by factors of ½, 2 and 4, warps to 1…16, stages to 1…4, and kept if the kernel's launches in the
production entries (`vapi_fast.ops.fused.production`) become faster. Only those launches are timed, and only in the
entries of LlamaGen-XXL in bf16: the others just have to run. What does not compile, does not fit or spills is passed
over.

The tables get the settings under this GPU's architecture, or lose that entry where it would repeat what is inherited.
Run `python -m vapi_fast.kernels.check` and the tests on the GPU afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import triton

from vapi_fast.kernels import tables
from vapi_fast.ops.fused.launch import Launch, device_architecture, overridden, recorded
from vapi_fast.ops.fused.production import PRODUCTION, inputs_on

WARPS = (1, 2, 4, 8, 16)
STAGES = (1, 2, 3, 4)
GAIN = 0.98  # new time over old, at most: less of a gain is noise
WARM_UP_MS, REPEAT_MS = 5, 40
UNTIMED = ("fp32", "V 65536", "3B")  # in the names of entries that are not of LlamaGen-XXL in bf16

Settings = dict[str, int]
# Kernel, settings, seconds to beat → seconds; inf if the settings cannot be used, or at once if they are too slow.
Measure = Callable[[str, Settings, float], float]


def variations(settings: Settings, name: str) -> Iterator[Settings]:
    """The settings with another value of `name`."""
    value = settings[name]
    if name == "num_warps":
        values: Sequence[int] = WARPS
    elif name == "num_stages":
        values = STAGES
    elif value > 0 and value & (value - 1) == 0:
        values = (value // 2, 2 * value, 4 * value)
    else:
        values = ()
    for other in values:
        if other not in (0, value):
            yield settings | {name: other}


def descend(
    start: Settings, measure: Callable[[Settings, float], float], deadline: float
) -> tuple[Settings, float, float]:
    """The fastest settings found until `deadline` (of `time.monotonic`), their time and that of `start`."""
    best, first = start, measure(start, math.inf)
    fastest, tried = first, [start]
    changed = True
    while changed:
        changed = False
        for name in start:
            for candidate in variations(best, name):
                if candidate in tried:
                    continue
                if time.monotonic() > deadline:
                    return best, fastest, first
                tried.append(candidate)
                seconds = measure(candidate, GAIN * fastest)
                if seconds < GAIN * fastest:
                    best, fastest, changed = candidate, seconds, True
    return best, fastest, first


def confirmed(
    start: Settings, best: Settings, measure: Callable[[Settings, float], float]
) -> tuple[bool, float, float]:
    """Whether `best` beats `start` also when both are timed in turns; the two times."""
    rounds = [(measure(start, math.inf), measure(best, math.inf)) for _ in range(3)]
    old, new = (min(times) for times in zip(*rounds, strict=True))
    return new < GAIN * old, old, new


def tune(kernels: Sequence[str], architecture: str, folder: Path, seconds: float, measure: Measure) -> None:
    """Tune one kernel after the other, the time shared out evenly, and rewrite the tables in `folder` as it goes."""
    end = time.monotonic() + seconds
    for index, kernel in enumerate(kernels):
        remaining = end - time.monotonic()
        if remaining <= 0:
            print(f"time is up: {', '.join(kernels[index:])} not tuned")
            return
        start = tables.nearest(table_of(folder, kernel)[1][kernel], architecture)
        timed = partial(measure, kernel)
        best, new, old = descend(start, timed, time.monotonic() + remaining / (len(kernels) - index))
        faster = best != start
        if faster:
            faster, old, new = confirmed(start, best, timed)
        write_settings(folder, kernel, architecture, best if faster else start)
        outcome = f"→ {1e3 * new:.4f} ms  {json.dumps(best)}" if faster else "kept"
        print(f"{index + 1:>3}/{len(kernels)} {kernel:<32} {1e3 * old:.4f} ms {outcome}", flush=True)


def table_of(folder: Path, kernel: str) -> tuple[Path, dict[str, dict[str, Settings]]]:
    """The file in `folder` that has the settings of `kernel`, and what it holds."""
    for path in sorted(folder.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        if kernel in table:
            return path, table
    raise KeyError(f"{folder}: no table has the kernel {kernel}")


def write_settings(folder: Path, kernel: str, architecture: str, settings: Settings) -> None:
    path, table = table_of(folder, kernel)
    others = {name: entry for name, entry in table[kernel].items() if name != architecture}
    if tables.nearest(others, architecture) != settings:
        others[architecture] = settings
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(formatted(table | {kernel: others}), encoding="utf-8")
    os.replace(temporary, path)


def formatted(table: dict[str, dict[str, Settings]]) -> str:
    """The text of a table: a line for each kernel, architectures in ascending order."""

    def order(architecture: str) -> tuple[int, str]:
        return len(architecture), architecture  # default, sm_80, sm_90, sm_100: all but "default" ascend by length

    lines = []
    for kernel, entries in table.items():
        names = sorted(set(entries) - {"default"}, key=order)
        ordered = {name: entries[name] for name in ["default", *names]}
        lines.append(f"  {json.dumps(kernel)}: {json.dumps(ordered)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def entries_by_kernel(architecture: str) -> dict[str, list[str]]:
    """The production entries that launch each kernel."""
    found: dict[str, list[str]] = {}
    for entry, run in PRODUCTION.items():
        with recorded(architecture) as recording:
            run()
        for kernel in dict.fromkeys(launch.kernel.__name__ for launch in recording.launches):
            found.setdefault(kernel, []).append(entry)
    return found


def measured(kernel: str, settings: Settings, beat: float, entries: Sequence[str], device: torch.device) -> float:
    """Seconds that the kernel's launches take in these production entries."""
    timed = [entry for entry in entries if not any(word in entry for word in UNTIMED)] or entries
    total = 0.0
    for entry in sorted(entries, key=lambda entry: entry not in timed):
        try:
            launches = carried_out(entry, kernel, settings, device)
            if any(spills(launch) for launch in launches):
                return math.inf
            if entry in timed:
                total += timed_together(launches)
        except Exception:  # the compiler and the driver raise many kinds for what they cannot do
            torch.cuda.synchronize()  # raises again if the device is lost, where going on is no use
            return math.inf
        if total >= beat:
            return math.inf
    return total


def carried_out(entry: str, kernel: str, settings: Settings, device: torch.device) -> list[Launch]:
    """Run a production entry on random data; its launches of `kernel`."""
    torch.manual_seed(0)
    architecture = device_architecture(device.index) if device.type == "cuda" else "sm_90"
    with inputs_on(device), overridden(kernel, settings), recorded(architecture, carry_out=True) as recording:
        PRODUCTION[entry]()
    return [launch for launch in recording.launches if launch.kernel.__name__ == kernel]


def repeat(launch: Launch) -> triton.compiler.CompiledKernel:
    return launch.kernel[launch.grid](*launch.args, **launch.constants)


def spills(launch: Launch) -> bool:
    return repeat(launch).n_spills > 0


def timed_together(launches: Sequence[Launch]) -> float:
    milliseconds = triton.testing.do_bench(
        lambda: [repeat(launch) for launch in launches], warmup=WARM_UP_MS, rep=REPEAT_MS, return_mode="median"
    )
    return milliseconds / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vapi_fast.kernels.tune", description="Search faster launch settings on this machine's GPU."
    )
    parser.add_argument("--only", default="", metavar="NAME", help="only kernels whose name contains NAME")
    parser.add_argument("--seconds", type=float, default=1200, help="time for all of it (default: 1200)")
    parser.add_argument("--output-dir", type=Path, help="write the tables here; default: over the ones in use")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: settings are tuned on the GPU that they are for")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter: unset it")
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = device_architecture(device.index)
    entries = entries_by_kernel(architecture)
    kernels = [kernel for kernel in tables.launch_table() if options.only in kernel and kernel in entries]
    if not kernels:
        parser.error(f"--only {options.only}: no such kernel; there are {', '.join(entries)}")
    folder = options.output_dir or tables.FOLDER
    if folder != tables.FOLDER:
        folder.mkdir(parents=True, exist_ok=True)
        for path in tables.FOLDER.glob("*.json"):
            shutil.copy(path, folder)
    print(f"{torch.cuda.get_device_name(device)}, {architecture}: {len(kernels)} kernels, tables in {folder}")
    tune(
        kernels,
        architecture,
        folder,
        options.seconds,
        lambda kernel, settings, beat: measured(kernel, settings, beat, entries[kernel], device),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
