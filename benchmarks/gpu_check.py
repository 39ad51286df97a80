"""Everything that a GPU is needed for, in three commands of eight and ten minutes; see `gpu_check.sh`.

Installs the package into a temporary folder, then runs, each with its own time limit and whatever becomes of the
others: the tests of the kernels, compute-sanitizer over every operation, the check of the machine code, the tests that
need a GPU, and the benchmarks. With --align instead the alignment of LlamaGen-XXL with random weights and made-up
images: a hundred steps, then twelve, on three of them beside the published recipe; with --generate its sampling beside
LlamaGen's own. Writes `gpu_check.json` (`gpu_check_align.json`, `gpu_check_generate.json`) and each part's log into DIR
and prints a short table. Exit code 0 if every part passed; only the memory check may be left out, where it cannot run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from parts import GRACE, TAIL, Part, gpu_reading, missing, nvidia_smi, run_together
from summary import alignment_line, ratios, rows_of, table

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "vapi_fast", "kernels")
SECONDS = 455.0  # for all parts
LONG_SECONDS = 580.0
OTHER_SECONDS = 180.0  # of the benchmarks' time, for all but torch.compile: the stages before leave it to them
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
ARCHITECTURES = (80, 90, 100)  # that `vapi_fast.kernels.check` knows

PROBE = """
import json, platform, torch, triton
found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
found |= {"cuda": torch.version.cuda, "cuda_available": torch.cuda.is_available()}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found |= {"name": properties.name, "capability": [properties.major, properties.minor]}
    found |= {"multiprocessors": properties.multi_processor_count, "memory": properties.total_memory}
    found |= {"cache": properties.L2_cache_size}
print(json.dumps(found))
"""


def install(work: Path) -> Part:
    """The package into `work/site`, from a copy, so that nothing is written beside the sources."""
    source, site = work / "source", work / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    commands = [
        ["mkdir", "-p", str(source), str(site)],
        ["cp", "-r", *(str(ROOT / name) for name in SOURCES), str(source)],
        [*pip, "--target", str(site), str(source)],
    ]
    script = " && ".join(map(shlex.join, commands))
    return Part("install", lambda limit: ["sh", "-c", script], 60, work, needs=("pip", "setuptools"))


def environment(work: Path) -> dict[str, str]:
    paths = [str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def tests(name: str, arguments: Sequence[str], work: Path, limit: float) -> Part:
    report = work / f"{name}.xml"
    command = [*PYTEST, "--continue-on-collection-errors", f"--junitxml={report}", *arguments]
    return Part(
        name,
        lambda limit: command,
        limit,
        ROOT / "tests",  # not ROOT, whose folder vapi_fast lacks the kernels
        environment(work),
        needs=("pytest",),
        figures=lambda output: junit_counts(report),
        failures=lambda output: junit_failures(report),
    )


def fused_tests() -> list[str]:
    return sorted(path.name for path in (ROOT / "tests").glob("test_fused_*.py"))


def in_parallel(processes: int) -> list[str]:
    return [] if missing("xdist") else ["-n", str(processes)]


def memcheck(work: Path, tool: Sequence[str]) -> Part:
    # PyTorch's allocator has blocks larger than a tensor, which would hide what is read or written past its end.
    variables = environment(work) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(
        "memcheck",
        lambda limit: [*tool, sys.executable, "run_once.py"],
        190,
        ROOT / "benchmarks",
        variables,
        needs=tuple(tool[:1]),
        optional=True,
        figures=lambda output: {"operations": len(lines_with(output, ": ran"))},
        failures=lambda output: lines_with(output, "Invalid __", "Misaligned", "Error: "),
    )


def machine_code(work: Path, architecture: str, *options: str) -> Part:
    command = [sys.executable, "-m", "vapi_fast.kernels.check", "--arch", architecture, *options]
    return Part(
        "kernels",
        lambda limit: command,
        190,
        work,
        environment(work),
        figures=kernel_rows,
        failures=lambda output: lines_with(output, f" on {architecture} ", "Error: "),
    )


def timings(name: str, arguments: Sequence[str], work: Path, limit: float, reserved: float = 0.0) -> Part:
    """Benchmarks; what of their time is beyond `OTHER_SECONDS` is for torch.compile."""
    rows, outcomes = work / f"{name}.json", work / f"{name}.xml"
    command = [*PYTEST, *arguments, "--benchmark-only", f"--benchmark-json={rows}", f"--junitxml={outcomes}"]
    return Part(
        name,
        lambda limit: [*command, f"--compile-seconds={max(limit - OTHER_SECONDS, 0):.0f}"],
        limit,
        ROOT / "benchmarks",
        environment(work),
        needs=("pytest", "pytest_benchmark"),
        reserved=reserved,
        figures=lambda output: benchmark_rows(rows),
        failures=lambda output: junit_failures(outcomes),
    )


def benchmarks(work: Path) -> Part:
    """All but generation, which takes minutes at XXL beside LlamaGen's own: `--generate`."""
    return timings("benchmarks", [".", "--ignore=bench_generate.py"], work, 260, OTHER_SECONDS + GRACE)


def gpu_stages(work: Path, capability: Sequence[int]) -> list[list[Part]]:
    """Parts that need no quiet machine first and side by side; those that are timed, or fill the memory, alone."""
    number = 10 * capability[0] + capability[1]
    architecture = f"sm_{max((each for each in ARCHITECTURES if each <= number), default=ARCHITECTURES[0])}"
    tool = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99"]
    return [
        [
            tests("tests", [*fused_tests(), "-m", "not gpu", *in_parallel(12)], work, 190),
            memcheck(work, tool),
            machine_code(work, architecture, "--processes", "3"),
        ],
        [tests("production", [".", "-m", "gpu", *in_parallel(2)], work, 130)],
        [benchmarks(work)],
    ]


def cpu_stages(work: Path) -> list[list[Part]]:
    """The same parts, as far as they go without a GPU: interpreted, one family's tests, one operation compiled."""
    return [
        [tests("tests", ["test_fused_normalization.py", "-k", "rms_norm"], work, 190)],
        [memcheck(work, [])],
        [machine_code(work, "sm_90", "--only", "rms_norm", "--processes", "1")],
        [benchmarks(work)],
    ]


def align_stages(work: Path, cpu: bool) -> list[list[Part]]:
    """The main job at full size, first beside the published recipe; with `cpu` the tiny preset instead."""
    both, whole = ("4", "6") if cpu else ("12", "100")
    model = ["--model", "tiny" if cpu else "xxl", "--random-init", "--synthetic-data"]
    return [
        [alignment("align", [*model, "--steps", whole], work, 400)],
        [alignment("align_both", [*model, "--path", "both", "--steps", both], work, 400)],
    ]


def generate_stages(work: Path) -> list[list[Part]]:
    return [[timings("generate", ["bench_generate.py"], work, 540)]]


def alignment(name: str, arguments: Sequence[str], work: Path, limit: float) -> Part:
    output = work / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "e2e_align.py"]
    return Part(
        name,
        lambda limit: [*command, *arguments, "--output-dir", str(output)],
        limit,
        ROOT / "benchmarks",
        environment(work),
        needs=("datasets", "tensorboard", "matplotlib", "tqdm", "torchmetrics", "safetensors"),
        figures=lambda text: json.loads((output / "run.json").read_text(encoding="utf-8")),
        failures=lambda text: lines_with(text, "error:", "Error: "),
    )


def junit_counts(report: Path) -> dict[str, Any]:
    """Tests, failures, errors and skipped ones of a JUnit report, and its slowest tests in seconds."""
    root = ElementTree.parse(report).getroot()
    suites = list(root.iter("testsuite"))
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    slowest = sorted(root.iter("testcase"), key=lambda case: -float(case.get("time", 0)))[:5]
    return counts | {"slowest": {case.get("name"): float(case.get("time", 0)) for case in slowest}}


def junit_failures(report: Path) -> list[str]:
    """Name of every test that failed, and the end of its message."""
    return [
        f"{case.get('classname')}::{case.get('name')}: {(outcome.text or outcome.get('message') or '')[-1500:]}"
        for case in ElementTree.parse(report).getroot().iter("testcase")
        for outcome in case
        if outcome.tag in ("failure", "error")
    ]


def benchmark_rows(report: Path) -> list[dict[str, Any]]:
    """The rows of all benchmarks, each with pytest-benchmark's statistics of our own times."""
    measured = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    statistics = ("min", "max", "mean", "stddev", "median", "iqr", "rounds")
    finished = [each for each in measured if each["extra_info"]]  # one that was stopped halfway has none
    return [each["extra_info"] | {"stats": {key: each["stats"][key] for key in statistics}} for each in finished]


def kernel_rows(output: str) -> list[dict[str, str]]:
    """The table that `vapi_fast.kernels.check` prints."""
    names = ("kernel", "architecture", "warps", "registers", "spilled", "shared", "matrix_instruction", "load_width")
    rows = [line.rsplit(maxsplit=len(names)) for line in output.splitlines()]
    return [
        {"entry": row[0]} | dict(zip(names, row[1:], strict=True))
        for row in rows
        if len(row) == len(names) + 1 and row[2].startswith("sm_")
    ]


def lines_with(output: str, *words: str) -> list[str]:
    return [line.strip() for line in output.splitlines() if any(word in line for word in words)][:40]


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


def probe() -> dict[str, Any]:
    """Versions and the device as torch sees them, with what the driver says of itself and of the limits."""
    ended = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if ended.returncode:
        return {"cuda_available": False, "error": ended.stderr[-TAIL:]}
    names = ("driver", "power_limit", "sm_clock_limit", "memory_clock_limit")
    fields = nvidia_smi("driver_version,power.limit,clocks.max.sm,clocks.max.mem")
    return json.loads(ended.stdout.splitlines()[-1]) | dict(zip(names, fields, strict=False)) | {"idle": gpu_reading()}


def write(record: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def passed(results: dict[str, dict[str, Any]], stages: Sequence[Sequence[Part]]) -> bool:
    """Whether every part was run and passed, except an optional one that this machine cannot run."""
    return all(
        results.get(part.name, {}).get("status") in (("passed", "skipped") if part.optional else ("passed",))
        for stage in stages
        for part in stage
    )


def report(record: dict[str, Any]) -> str:
    """The tables of the benchmarks, then each part's outcome and its first failures."""
    results = record["parts"]
    rows = rows_of(results)
    lines = [table(rows), "", ratios(rows), ""] if rows else []
    for name, result in results.items():
        counts = result.get("figures") if isinstance(result.get("figures"), dict) else {}
        numbers = [f"{value} {key}" for key, value in counts.items() if isinstance(value, int) and value]
        if "stages" in counts:
            numbers = [alignment_line(counts)]
        seconds = [f"{result['seconds']:.0f} s"] if "seconds" in result else []
        reason = [result["reason"]] if "reason" in result else []
        lines.append(f"{name:<12}{result['status']:<11}{', '.join([*seconds, *numbers, *reason])}")
        failures = result.get("failures") or []
        if result["status"] in ("failed", "timed out") and not failures:
            lines += [f"    {line}" for line in result.get("tail", "").splitlines()[-5:]]
        lines += [f"    {short(failure)}" for failure in failures[:6]]
        lines += [f"    … {len(failures) - 6} more in gpu_check.json"] if len(failures) > 6 else []
    device = record["device"].get("name", "no CUDA device")
    lines.append(f"{'passed' if record['passed'] else 'FAILED'}: {device}, commit {record['commit']}")
    return "\n".join(lines)


def short(failure: str) -> str:
    """A failure on one line: a test's name and the last line of its message."""
    name, _, message = failure.partition(": ")
    raised = [line for line in message.splitlines() if line.startswith("E  ")] or message.strip().splitlines() or [""]
    return f"{name}: {raised[-1].removeprefix('E').strip()}"[:200]


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="GPU tests and benchmarks, as one JSON file.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="for gpu_check.json and the parts' logs")
    parser.add_argument("--commit", help="to record; default: the checkout's")
    parser.add_argument("--cpu", action="store_true", help="try the parts on a machine without a GPU")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--align", action="store_true", help="align LlamaGen-XXL instead of checking the operations")
    instead.add_argument("--generate", action="store_true", help="draw 256 images of LlamaGen-XXL at a time instead")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a part inherits it if a shell has had it ignored
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kind = "_align" if options.align else "_generate" if options.generate else ""
    path = folder / f"gpu_check{kind}.json"
    budget = LONG_SECONDS if kind else SECONDS
    start = time.monotonic()
    record: dict[str, Any] = {"device": probe(), "commit": commit_of(options.commit), "passed": False, "parts": {}}
    record["commit_time"] = git("show", "-s", "--format=%cI", record["commit"].removesuffix("-dirty"))
    record["started"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if not record["device"]["cuda_available"] and not options.cpu:
        write(record, path)
        print(f"{record['device'].get('error', '')}no CUDA device: nothing was run; --cpu tries the parts without one")
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if options.align:
            stages = align_stages(work, options.cpu)
        elif options.generate:
            stages = generate_stages(work)
        else:
            stages = cpu_stages(work) if options.cpu else gpu_stages(work, record["device"]["capability"])
        stages = [[install(work)], *stages]
        for number, stage in enumerate(stages):
            later = sum(max(part.reserved for part in each) for each in stages[number + 1 :])
            record["parts"] |= run_together(stage, folder, budget - later - (time.monotonic() - start))
            write(record, path)
            if record["parts"]["install"]["status"] != "passed":
                break
    record["passed"] = passed(record["parts"], stages)
    record["seconds"] = time.monotonic() - start
    write(record, path)
    print(report(record))
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
