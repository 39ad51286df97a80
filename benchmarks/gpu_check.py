"""What a GPU has to tell, in the order of its worth, in as many minutes as there are; see `gpu_check.sh`.

Rates and a smoke test; LlamaGen-XXL beside the published recipe; its sampling; then its hundred steps, the operations'
benchmarks, and the tests beside compute-sanitizer and the check of the machine code. Each is a process of its own and
bounded on its own. `gpu_check.json` in DIR is written anew whenever one of them has measured something: `headline`
first, then the device, then each part. Called again with the same DIR, for the same commit and device, it does what is
missing, has failed or ran out of time (not `align_both` with a published step measured); figures of the headline stay
until they are measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from parts import Part, gpu_reading, nvidia_smi, run_together
from summary import headline, ratios, rows_of, table

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
ARCHITECTURES = (80, 90, 100)  # that `vapi_fast.kernels.check` knows
START = 10.0  # seconds until the first part, at least

PROBE = """
import json, platform, numpy, torch, triton
found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
found |= {"numpy": numpy.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
found |= {"cuda_available": torch.cuda.is_available()}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found |= {"name": properties.name, "capability": [properties.major, properties.minor]}
    found |= {"multiprocessors": properties.multi_processor_count, "memory": properties.total_memory}
    found |= {"cache": properties.L2_cache_size, "free": torch.cuda.mem_get_info()[0]}
    from comparison import Comparison
    from vapi_fast.alignment import memory
    from vapi_fast.alignment.config import AlignConfig
    from vapi_fast.models import LLAMAGEN_CONFIGS
    config = AlignConfig(model="xxl", random_init=True, synthetic_data=True)
    beside = Comparison().memory(config, world_size=1)
    plan = memory.plan(config, LLAMAGEN_CONFIGS["xxl"], found["free"], beside=beside)
    found["needed"] = int(plan.total / memory.USABLE)
print(json.dumps(found))
"""


class CheckError(Exception):
    """The check cannot start: a line that says why, and the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


# ---- the parts


def stages(work: Path, capability: Sequence[int], cpu: bool = False) -> list[list[Part]]:
    """All parts, the most valuable first, those of a stage side by side; with `cpu` of the tiny sizes."""
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(work / "site"), os.environ.get("PYTHONPATH")]))}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    model = ["--model", "tiny", "--batch-size", "4", "--micro-batch", "4"] if cpu else ["--model", "xxl"]

    def part(name: str, bound: float, *commands: list[str], cache: str = "align", **options: Any) -> Part:
        variables = environment | options.pop("environment", {}) | {"TRITON_CACHE_DIR": str(work / "triton" / cache)}
        folder = options.pop("folder", ROOT / "benchmarks")
        return Part(name, bound, commands, folder, variables, compiled=work / "triton" / cache, **options)

    def script(name: str, bound: float, cache: str) -> Part:
        failures = functools.partial(lines_with, words=('"failure"', '"ok": false', "Error: "))
        command = [sys.executable, f"{name}.py", *["--cpu"] * cpu]
        return part(name, bound, command, cache=cache, figures=json_lines, failures=failures)

    def alignment(name: str, bound: float, *arguments: str, **options: Any) -> Part:
        output = work / name
        # Not by torchrun: it gives its processes sessions of their own, and they would outlive a part that is killed.
        command = [sys.executable, "e2e_align.py", *model, "--random-init", "--synthetic-data", *arguments]
        options |= {"figures": lambda text: aligned(output)}
        options |= {"failures": functools.partial(lines_with, words=("error:", "Error: "))}
        return part(name, bound, [*command, "--output-dir", str(output)], **options)

    def pytest(name: str, bound: float, *runs: list[str], **options: Any) -> Part:
        options = {
            "figures": tests_said,
            "failures": functools.partial(lines_with, words=("FAILED ", "ERROR ")),
        } | options
        return part(name, bound, *([*PYTEST, *run] for run in runs), **options)

    def tests(
        *runs: list[str], needs: tuple[str, ...] = ("pytest",)
    ) -> Part:  # not in ROOT: its vapi_fast lacks kernels
        runs = [["--continue-on-collection-errors", "--durations=5", *run] for run in runs]
        return pytest("tests", 120, *runs, cache="tests", folder=ROOT / "tests", needs=needs)

    def benchmarks(*arguments: str) -> Part:
        rows, needs = work / "benchmarks" / "rows.json", ("pytest", "pytest_benchmark")
        options = ["--benchmark-only", f"--benchmark-json={rows}", "--compile-seconds=0"]
        return pytest("benchmarks", 110, [*arguments, *options], needs=needs, figures=lambda text: benchmark_rows(rows))

    def memcheck(*tool: str) -> Part:
        figures = {"figures": lambda text: {"operations": len(lines_with(text, (": ran",)))}}
        figures |= {"failures": functools.partial(lines_with, words=("Invalid __", "Misaligned", "Error: "))}
        # PyTorch's allocator has blocks larger than a tensor, which would hide what is read or written past its end.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [*tool, sys.executable, "run_once.py"]
        return part("memcheck", 120, command, cache="tests", environment=uncached, needs=tool[:1], **figures)

    first = [
        [script("rates", 75, "rates")],
        [alignment("align_both", 90, "--path", "both", "--steps", "5")],
        [script("sampling", 60, "align")],
        [alignment("align", 375, "--steps", "6" if cpu else "100", "--checkpoint-every", "1000", rest=True)],
    ]
    if cpu:  # one operation timed, one operation's tests, and all operations interpreted, under no tool
        one = benchmarks("bench_perceptual.py", "-k", "mse and forward and not pairs and not backward")
        return [*first, [one], [tests(["ops/test_rms_norm.py"]), memcheck()]]
    number = 10 * capability[0] + capability[1]
    architecture = f"sm_{max((each for each in ARCHITECTURES if each <= number), default=ARCHITECTURES[0])}"
    code = [sys.executable, "-m", "vapi_fast.kernels.check", "--arch", architecture]
    kernels = part("kernels", 120, code, cache="kernels", folder=work, figures=last_line)
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99")
    spread = ["--dist", "worksteal", "-n"]
    runs = [
        ["ops", "-m", "not gpu", *spread, str(min(10, os.cpu_count() or 1))],
        [*gpu_tests(), "-m", "gpu", *spread, "2"],  # what they do fills the memory
    ]
    last = [tests(*runs, needs=("pytest", "xdist")), memcheck(*sanitizer), kernels]
    return [*first, [benchmarks(".", "--ignore=bench_generate.py")], last]


def gpu_tests() -> list[str]:
    """The files of tests that need a GPU; others may need what is not installed."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT / "tests")) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


# ---- what they have measured


def json_lines(output: str) -> list[dict[str, Any]]:
    """The figures that a script prints among other things, a line of JSON each."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError):  # half a line, or one that only looks like it
                found.append(json.loads(line))
    return found


def aligned(output: Path) -> dict[str, Any]:
    """`run.json`, or of a run under way the figures so far; with the steps done, the first one's, and our own peak."""
    lines = json_lines((output / "progress.jsonl").read_text(encoding="utf-8"))
    found = lines[-1]
    if (output / "run.json").exists():
        found = json.loads((output / "run.json").read_text(encoding="utf-8"))
    alone = [line["peak_memory"] for line in lines if "comparison" not in line]
    first = {"first_step_seconds": lines[0]["seconds"]["alignment"]}
    return found | first | {"steps_done": lines[-1]["step"], "own_peak_memory": alone[-1]}


def benchmark_rows(report: Path) -> list[dict[str, Any]]:
    """The rows of all benchmarks, each with pytest-benchmark's statistics of our own times."""
    measured = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    statistics = ("min", "max", "mean", "stddev", "median", "iqr", "rounds")
    finished = [each for each in measured if each["extra_info"]]  # one that was stopped halfway has none
    return [each["extra_info"] | {"stats": {key: each["stats"][key] for key in statistics}} for each in finished]


def tests_said(output: str) -> dict[str, str]:
    """The last lines of pytest's processes: how many tests passed, failed and were skipped, in what time."""
    return {"said": "; ".join(re.findall(r"^=* ?(\d+ \w+.* in [\d.]+s.*?) ?=*$", output, re.MULTILINE))}


def last_line(output: str) -> dict[str, str]:
    return {"said": output.strip().splitlines()[-1]}


def lines_with(output: str, words: Sequence[str]) -> list[str]:
    return [line.strip() for line in output.splitlines() if any(word in line for word in words)][:40]


# ---- the check


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="A GPU's figures and checks, as one JSON file.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="for gpu_check.json and the parts' logs")
    parser.add_argument("--minutes", type=float, default=4, help="in which to do what fits (4; 14 for everything)")
    parser.add_argument("--cpu", action="store_true", help="rehearse the parts, small, on a machine without a GPU")
    parser.add_argument("--commit", help="to record; default: the checkout's")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the parts under way
    try:
        return check(options, time.monotonic())
    except CheckError as error:
        print(f"gpu_check.sh: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"gpu_check.sh: {options.folder} cannot be written: {error}", file=sys.stderr)
        return 1


def check(options: argparse.Namespace, start: float) -> int:
    """Run what is missing and fits. Raises CheckError, with nothing written, where it cannot start."""
    folder, commit, cpu = options.folder.resolve(), commit_of(options.commit), options.cpu
    path, work = folder / "gpu_check.json", folder / "work"
    check_folder(folder)
    with contextlib.ExitStack() as stack:
        if folder.exists():
            stack.enter_context(alone(folder))
        before = read(path)
        if [before.get(key) for key in ("commit", "cpu")] != [commit, cpu]:
            before = {}
        every = list(itertools.chain(*stages(work, (0, 0), cpu)))
        check_minutes(options.minutes, missing(every, before.get("parts", {})), START)
        device = probe(cpu)
        if before and before["device"].get("name") != device.get("name"):
            before = {}
        parts = before.get("parts", {})
        check_minutes(options.minutes, missing(every, parts), max(START, time.monotonic() - start + 1))
        if not folder.exists():
            folder.mkdir(parents=True)
            stack.enter_context(alone(folder))
        if not before and path.exists():  # of another commit or device
            os.replace(path, path.with_name(f"gpu_check.{read(path)['started'].replace(':', '')}.json"))
        record: dict[str, Any] = {"headline": before.get("headline", {}), "passed": False, "left_out": {}}
        record |= {"cpu": cpu, "device": device, "commit": commit}
        record["commit_time"] = git("show", "-s", "--format=%cI", commit.removesuffix("-dirty"))
        record |= {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": 0.0, "parts": parts}
        link(work)
        for stage in stages(work, device.get("capability", (0, 0)), cpu):
            run_stage(fitting(missing(stage, parts), record, start + 60 * options.minutes), record, path, start)
        record["passed"] = all(done(name, result) for name, result in parts.items())
        write(record, path, start)
    print(report(record))
    return 0 if record["passed"] else 1


def run_stage(due: Sequence[Part], record: dict[str, Any], path: Path, start: float) -> None:
    parts = record["parts"]

    def note(name: str, result: dict[str, Any]) -> None:
        parts[name] = result
        write(record, path, start)

    for part in due:
        shutil.rmtree(path.parent / "work" / part.name, ignore_errors=True)
        (path.parent / "work" / part.name).mkdir()
    run_together(due, path.parent, note)
    for part in due:
        shutil.rmtree(path.parent / "work" / part.name, ignore_errors=True)  # a checkpoint of gigabytes
        print(f"{part.name}: {parts[part.name]['status']}, {parts[part.name]['seconds']:.0f} s", flush=True)
        if parts[part.name]["status"] == "refused":
            record["left_out"][part.name] = parts.pop(part.name)["tail"].strip().splitlines()[-1]


def missing(parts: Iterable[Part], results: dict[str, dict[str, Any]]) -> list[Part]:
    return [part for part in parts if not (part.name in results and done(part.name, results[part.name]))]


def done(name: str, result: dict[str, Any]) -> bool:
    """Passed, or of `align_both` ended after a published step: two may take longer than its bound, and one tells."""
    measured = name == "align_both" and "speedup_over_reference" in (result["figures"] or {})
    return result["status"] == "passed" or (result["status"] == "timed out" and measured)


def check_minutes(minutes: float, parts: Iterable[Part], spent: float) -> None:
    """Raises CheckError if some of these can be run, and none fits behind the seconds spent."""
    least = min((part for part in parts if not part.missing), key=lambda part: part.bound, default=None)
    if least and not 60 * minutes >= spent + least.bound:
        needed = math.ceil((spent + least.bound) / 6) / 10
        raise CheckError(f"--minutes {minutes:g} is too little for any part: {least.name} needs {needed:g}", 2)


def check_folder(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise CheckError(f"{folder}: {existing} is not a folder that can be written to: pass another DIR", 2)


def probe(cpu: bool) -> dict[str, Any]:
    """Versions and the device as torch sees them, with what the driver says of itself and of the limits."""
    with tempfile.TemporaryDirectory() as temporary:
        variables = os.environ | {"PYTHONPATH": f"{link(Path(temporary))}", "PYTHONDONTWRITEBYTECODE": "1"}
        ended = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, env=variables, cwd=ROOT / "benchmarks"
        )
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["no word"])[-1]
        raise CheckError(f"torch, triton or numpy cannot be used: {reason}")
    found = json.loads(ended.stdout.splitlines()[-1])
    if cpu:
        return found
    if not found["cuda_available"]:
        raise CheckError("no CUDA device: nothing was run; --cpu rehearses the parts without one")
    if found["capability"] < [8, 0]:
        capability = ".".join(map(str, found["capability"]))
        raise CheckError(f"{found['name']} has compute capability {capability}: 8.0 (A100) or more is needed")
    if found["free"] < found["needed"]:
        raise CheckError(
            f"{found['free'] / 1e9:.1f} GB of {found['name']}'s memory are free, about {found['needed'] / 1e9:.1f} GB "
            "are needed: end what else uses it, or take a larger GPU"
        )
    names = ("driver", "power_limit", "sm_clock_limit", "memory_clock_limit")
    fields = nvidia_smi("driver_version,power.limit,clocks.max.sm,clocks.max.mem")
    return found | dict(zip(names, fields, strict=False)) | {"idle": gpu_reading()}


def link(work: Path) -> Path:
    """`work/site`, in which the package is found as if it were installed; nothing is written beside the sources."""
    site = work / "site"
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    if (ROOT / "vapi_fast").is_dir():  # else these scripts were copied, and the package is installed
        (site / "vapi_fast").mkdir()
        for source in (*(ROOT / "vapi_fast").iterdir(), ROOT / "kernels"):
            (site / "vapi_fast" / source.name).symlink_to(source)
    return site


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which goes with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CheckError(f"another check writes into {folder}: wait for it, or pass another DIR", 2) from None
    finally:
        os.close(handle)


def fitting(parts: Sequence[Part], record: dict[str, Any], end: float) -> list[Part]:
    """Those of a stage that can be run and fit, with their bounds; why not is noted for the others."""
    left, left_out = max(end - time.monotonic(), 0), record["left_out"]
    for part in parts:
        if part.missing:
            left_out[part.name] = f"not installed: {', '.join(part.missing)}"
        elif part.bound > left:
            left_out[part.name] = f"is given {part.bound:.0f} s, and {left:.0f} s were left"
    due = [part for part in parts if part.name not in left_out]
    return [dataclasses.replace(part, bound=left) if part.rest else part for part in due]


def git(*arguments: str) -> str | None:
    """What git says of the checkout, or None."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit_of(option: str | None) -> str:
    """The commit given, or the checkout's, with "-dirty" if it was changed."""
    return option or git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*") or "unknown"


def read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise CheckError(f"{path} is damaged: move it away, or pass another DIR") from None


def write(record: dict[str, Any], path: Path, start: float) -> None:
    record |= {"headline": record["headline"] | headline(record["parts"]), "seconds": time.monotonic() - start}
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def report(record: dict[str, Any]) -> str:
    """The tables of the benchmarks, each part's outcome and first failures, the headline, and what was left out."""
    results = record["parts"]
    rows = rows_of(results)
    lines = [table(rows), "", ratios(rows), ""] if rows else []
    for name, result in results.items():
        counts = result["figures"] or {} if name in ("tests", "memcheck", "kernels") else {}
        numbers = "".join(f", {value} {key}".removesuffix(" said") for key, value in counts.items() if value)
        lines.append(f"{name:<12}{result['status']:<11}{result['seconds']:.0f} s{numbers}")
        failures = result.get("failures") or result.get("tail", "").splitlines()[-5:]
        lines += [f"    {failure[:200]}" for failure in failures[:6] if not done(name, result)]
    lines += [f"{name:<12}left out   {reason}" for name, reason in record["left_out"].items()]
    lines += [f"{name.replace('_', ' ')}: {value:.4g}" for name, value in record["headline"].items()]
    device = record["device"].get("name", "no CUDA device")
    lines.append(f"{'passed' if record['passed'] else 'FAILED'}: {device}, commit {record['commit']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
