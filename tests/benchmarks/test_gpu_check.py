"""The GPU check: its parts and their order, what is kept when it is killed, the JSON file, the table and exit codes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_check
import parts
import pytest
from parts import Part
from processes import PATIENCE, gone, wait_until

BENCHMARKS = Path(gpu_check.__file__).parent
PYTEST = """.F.s
____ test_bad[1] ____
E   assert 1 == 2
FAILED test_a.py::test_bad[1] - assert 1 == 2
1 failed, 2 passed, 1 skipped in 3.50s
=========== 7 passed in 61.00s (0:01:01) ===========
"""
HOUR = 3600.0


def python(name: str, script: str, folder: Path, bound: float = HOUR, **options: Any) -> Part:
    return Part(name, bound, [[sys.executable, "-c", script]], folder, **options)


def run(folder: Path, *together: Part) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    parts.run_together(together, folder, lambda name, result: results.update({name: json.loads(json.dumps(result))}))
    return results


# ---- parts


def test_a_part_that_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    script = "import os; print(os.environ['SIZE'], os.environ.get('TRITON_INTERPRET'), os.getcwd())"
    part = python("a", script, tmp_path, environment={"SIZE": "7"}, figures=str.split)
    result = run(tmp_path, part)["a"]
    assert (result["status"], result["returncodes"], result["bound"]) == ("passed", [0], HOUR)
    assert result["figures"] == ["7", "None", str(tmp_path)]
    assert "tail" not in result
    assert (tmp_path / "a.log").read_text().startswith("7 None")


def test_a_part_that_fails_keeps_its_last_words(tmp_path: Path) -> None:
    def none(output: str) -> Any:
        return json.loads((tmp_path / "none.json").read_text())

    codes = [f"raise SystemExit({code})" for code in ("0", "'x' * 9000 + 'end'")]
    part = Part("a", HOUR, [[sys.executable, "-c", code] for code in codes], tmp_path, figures=none, failures=none)
    result = run(tmp_path, part)["a"]
    assert (result["status"], result["returncodes"], result["figures"]) == ("failed", [0, 1], None)
    assert result["tail"].strip().endswith("end")
    assert len(result["tail"]) == parts.TAIL
    assert "FileNotFoundError" in result["failures"][0]


def test_parts_of_a_stage_do_not_hide_each_other(tmp_path: Path) -> None:
    broken = Part("broken", HOUR, [["/no/such/program"]], tmp_path)
    results = run(tmp_path, broken, python("good", "print(3)", tmp_path))
    assert {name: result["status"] for name, result in results.items()} == {"broken": "failed", "good": "passed"}
    assert "/no/such/program" in results["broken"]["tail"]
    assert results["good"]["gpu"] is None or "sm_clock" in results["good"]["gpu"]


def test_figures_are_noted_while_a_part_runs(tmp_path: Path) -> None:
    """It goes on only once its first figure was noted."""
    script = """
import pathlib, time
print('{"name": "first"}', flush=True)
while not pathlib.Path("seen").exists(): time.sleep(0.05)
print('{"name": "second"}', flush=True)
"""
    seen = []

    def note(name: str, result: dict[str, Any]) -> None:
        seen.append((result["status"], len(result["figures"] or [])))
        if result["figures"]:
            (tmp_path / "seen").touch()

    parts.run_together([python("a", script, tmp_path, figures=gpu_check.json_lines)], tmp_path, note)
    assert ("running", 1) in seen
    assert seen[-1] == ("passed", 2)


@pytest.fixture
def leap(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, float], None]:
    """Lets the parts' clock leap ahead once a file is there: what a part does until then may take any time."""

    def set_up(sign: Path, seconds: float) -> None:
        monkeypatch.setattr(parts, "now", lambda: time.monotonic() + seconds * sign.exists())

    return set_up


def test_a_part_that_goes_on_is_killed_with_what_it_started(tmp_path: Path, leap: Any) -> None:
    child = (
        "import os, time; open('pid.part', 'w').write(str(os.getpid())); os.rename('pid.part', 'pid'); time.sleep(9e9)"
    )
    deaf = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("ready", flush=True)
subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(9e9)
"""
    leap(tmp_path / "pid", HOUR)
    result = run(tmp_path, python("a", deaf, tmp_path))["a"]
    assert result["status"] == "timed out"
    assert "ready" in result["tail"]
    wait_until(lambda: gone(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize("heard", [signal.default_int_handler, signal.SIG_IGN])
def test_a_part_is_asked_before_it_is_killed(
    tmp_path: Path, leap: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, heard: Any
) -> None:
    """Also by a check that a shell has put into the background, and so made deaf to SIGINT."""
    before = signal.signal(signal.SIGINT, heard)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(parts, "GRACE", HOUR / 2)
    script = """
import time
try:
    open("asleep", "w").close()
    time.sleep(9e9)
except KeyboardInterrupt:
    print("written", flush=True)
"""
    leap(tmp_path / "asleep", HOUR * 2 / 3)
    result = run(tmp_path, python("a", script, tmp_path, figures=str.split))["a"]
    assert (result["status"], result["figures"]) == ("timed out", ["written"])


@pytest.mark.gpu
def test_clocks_and_power_are_read() -> None:
    reading = parts.gpu_reading()
    assert reading is not None
    assert reading["sm_clock"] > 0
    assert reading["power"] > 0


# ---- the list of parts


def test_parts_in_the_order_of_their_worth(tmp_path: Path) -> None:
    stages = gpu_check.stages(tmp_path, (9, 0))
    names = [[part.name for part in stage] for stage in stages]
    first = [["rates"], ["align_both"], ["sampling"]]
    assert names == [*first, ["align"], ["benchmarks"], ["tests", "memcheck", "kernels"]]
    bounds = [max(part.bound for part in stage) for stage in stages]
    assert bounds[:3] == [75, 90, 60]
    assert sum(bounds) <= 14 * 60 - 10  # the start takes some seconds too
    assert sum(bounds) - bounds[3] <= 8 * 60 - 10  # all but the hundred steps
    assert sum(bounds[3:]) - bounds[4] - bounds[5] <= 8 * 60 - 10  # the hundred steps, in a second call
    for stage in stages[:3]:
        assert not stage[0].needs  # they are worth having with torch, triton and numpy alone
    for stage in stages:  # what torchrun starts is in another session, and would not be killed with the part
        assert not any("torch.distributed.run" in command for part in stage for command in part.commands)
    rehearsed = [part.name for stage in gpu_check.stages(tmp_path, (0, 0), cpu=True) for part in stage]
    assert rehearsed == ["rates", "align_both", "sampling", "align", "benchmarks", "tests", "memcheck"]


@pytest.mark.parametrize(("capability", "architecture"), [((9, 0), "sm_90"), ((8, 6), "sm_80"), ((12, 0), "sm_100")])
def test_kernels_are_checked_for_this_device(capability: tuple[int, int], architecture: str, tmp_path: Path) -> None:
    (command,) = gpu_check.stages(tmp_path, capability)[-1][-1].commands
    assert command[-2:] == ["--arch", architecture]


def test_every_kernel_is_tested_and_what_needs_a_gpu(tmp_path: Path) -> None:
    kernels, marked = gpu_check.stages(tmp_path, (9, 0))[-1][0].commands
    assert kernels[kernels.index("ops") :][:3] == ["ops", "-m", "not gpu"]
    files = {each for each in marked if each.endswith(".py")}
    assert {"models/test_frozen.py", "runtime/test_graphs.py"} <= files
    assert "ops/test_backends.py" not in files
    assert marked[marked.index("-n") + 1] == "2"


def test_the_package_is_found_without_an_installation(tmp_path: Path) -> None:
    script = "import vapi_fast.kernels.losses as m; print(m.__file__)"
    site = gpu_check.link(tmp_path)
    (first, *_), *_ = gpu_check.stages(tmp_path, (0, 0), cpu=True)
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ | first.environment, capture_output=True, text=True)
    assert ended.stdout.strip() == str(site / "vapi_fast" / "kernels" / "losses.py")


# ---- what parts have measured


def test_what_pytest_said(tmp_path: Path) -> None:
    tests = gpu_check.stages(tmp_path, (9, 0))[-1][0]
    assert tests.figures(PYTEST) == {"said": "1 failed, 2 passed, 1 skipped in 3.50s; 7 passed in 61.00s (0:01:01)"}
    assert tests.failures(PYTEST) == ["FAILED test_a.py::test_bad[1] - assert 1 == 2"]


def test_figures_of_a_run_that_was_ended(tmp_path: Path) -> None:
    """Our own steps come first: their figures are there though no published step has ended."""
    lines = [
        {"step": 1, "seconds": {"startup": 9.0, "alignment": 30.0}, "peak_memory": 5, "step_seconds": 30.0},
        {"step": 2, "seconds": {"startup": 9.0, "alignment": 33.5}, "peak_memory": 6, "step_seconds": 3.5},
    ]
    lines[1]["images_per_second"] = 128 / 3.5
    progress = tmp_path / "progress.jsonl"
    progress.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    part = {"figures": gpu_check.aligned(tmp_path), "triton_cache": "cold"}
    expected = {"step_seconds": 3.5, "images_per_second_aligned": 128 / 3.5, "peak_memory_beside_published": 6}
    expected |= {"startup_seconds_cold": 9.0, "first_step_seconds_cold": 30.0}
    assert gpu_check.headline({"align_both": part}) == expected

    compared = lines[1] | {"step": 4, "comparison": {}, "peak_memory": 60, "speedup_over_reference": 8.0}
    compared["seconds_per_step"] = {"published_recipe": 28.0}
    progress.write_text("".join(json.dumps(line) + "\n" for line in [*lines, compared]))
    part["figures"] = gpu_check.aligned(tmp_path)
    assert gpu_check.headline({"align_both": part}) == expected | {"ratio": 8.0, "published_step_seconds": 28.0}


def test_a_hundred_steps_of_which_some_were_done(tmp_path: Path) -> None:
    line = {"seconds": {"startup": 9.0, "alignment": 30.0}, "step_seconds": 3.5, "peak_memory": 6}
    lines = [json.dumps({"step": step, **line}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "progress.jsonl").write_text("".join(lines))
    found = gpu_check.headline({"align": {"figures": gpu_check.aligned(tmp_path), "triton_cache": "warm"}})
    assert (found["steps_done"], found["step_seconds"], found["peak_memory"]) == (3, 3.5, 6)
    assert "run_seconds" not in found
    (tmp_path / "run.json").write_text(json.dumps(line | {"seconds": {"total": 50.0}}))
    found = gpu_check.headline({"align": {"figures": gpu_check.aligned(tmp_path), "triton_cache": "warm"}})
    assert (found["steps_done"], found["run_seconds"]) == (3, 50.0)


def test_lines_that_are_not_json_lose_no_other() -> None:
    output = 'warning\n{"name": "copy"}\n{not JSON}\n{"name": "matmul"}\n{"half'
    assert gpu_check.json_lines(output) == [{"name": "copy"}, {"name": "matmul"}]


def test_headline_of_all_parts() -> None:
    rows = [{"name": "copy", "rate": 3e12}, {"name": "matmul", "rate": 8e14}]
    drawn = [{"name": "sampling set-up", "seconds": 4.0}]
    drawn += [{"name": "sampling", "seconds": 6.0, "images_per_second": 42.0, "seconds_per_token": 0.01}] * 2
    whole = {"step_seconds": 3.0, "images_per_second": 43.0, "own_peak_memory": 7, "first_step_seconds": 5.0}
    whole |= {"seconds": {"startup": 8.0, "total": 320.0}, "steps_done": 100}
    measured = {"rates": {"figures": rows}, "sampling": {"figures": drawn}, "align_both": {"figures": None}}
    measured["align"] = {"figures": whole, "triton_cache": "warm"}
    assert gpu_check.headline(measured) == {
        "step_seconds": 3.0,
        "images_per_second_aligned": 43.0,
        "run_seconds": 320.0,
        "steps_done": 100,
        "peak_memory": 7,
        "images_per_second_sampled": 42.0,
        "seconds_per_token": 0.01,
        "sampling_setup_seconds": 4.0,
        "copy_bytes_per_second": 3e12,
        "matmul_flops": 8e14,
        "startup_seconds_warm": 8.0,
        "first_step_seconds_warm": 5.0,
    }


def test_ratios_of_every_part_are_reported() -> None:
    measured = {"name": "generate xxl 384²", "ratio": None, "seconds": {"vapi_fast": 5.0}, "failure": "reference: OOM"}
    measured |= {"yardstick": None, "reference": "reference"}
    results = {"benchmarks": {"figures": [measured]}, "kernels": {"figures": {"said": "3 kernels, 0 problems"}}}
    results = {name: result | {"status": "passed", "seconds": 2.0} for name, result in results.items()}
    record = {"parts": results, "device": {}, "passed": True, "commit": "abc", "left_out": {}, "headline": {}}
    text = gpu_check.report(record)
    assert "no ratio: reference: OOM" in text
    assert "3 kernels, 0 problems" in text


# ---- the whole check


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the check with the given stages in place of its own; returns exit code, record and what it printed."""

    def call(*stages: list[Part], minutes: float = 600, commit: str = "abc") -> tuple[int, dict[str, Any], list[str]]:
        monkeypatch.setattr(gpu_check, "stages", lambda work, capability, cpu: list(stages))
        monkeypatch.setattr(gpu_check, "probe", lambda cpu: {"cuda_available": False, "torch": "2.11"})
        arguments = [str(tmp_path / "out"), "--cpu", "--commit", commit, "--minutes", str(minutes)]
        monkeypatch.setattr("sys.argv", ["gpu_check.sh", *arguments])
        code = gpu_check.main()
        assert not list((tmp_path / "out").glob("*.tmp"))
        record = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
        captured = capsys.readouterr()
        return code, record, [*captured.out.splitlines(), *captured.err.splitlines()]

    return call


def counting(name: str, folder: Path, code: int = 0, **options: Any) -> Part:
    """A part that notes each time that it is run."""
    return python(name, f"print(1, file=open('{name}-runs', 'a')); raise SystemExit({code})", folder, **options)


def runs(folder: Path, name: str) -> int:
    return len((folder / f"{name}-runs").read_text().splitlines()) if (folder / f"{name}-runs").exists() else 0


def test_all_passed(check: Any, tmp_path: Path) -> None:
    absent = python("memcheck", "", tmp_path, needs=("pytest", "no_such_tool"))
    refusing = python("sanitizer", "raise SystemExit('Error: Device not supported')", tmp_path)
    code, record, printed = check([python("tests", "print(1)", tmp_path)], [absent, refusing])
    assert (code, record["passed"], record["commit"]) == (0, True, "abc")
    assert list(record["parts"]) == ["tests"]
    assert record["left_out"] == {
        "memcheck": "not installed: no_such_tool",
        "sanitizer": "Error: Device not supported",
    }
    assert "memcheck    left out   not installed: no_such_tool" in printed
    assert printed[-1] == "passed: no CUDA device, commit abc"


def test_what_failed_runs_again_and_what_passed_does_not(check: Any, tmp_path: Path) -> None:
    stages = [counting("good", tmp_path)], [counting("bad", tmp_path, code=3)]
    code, record, printed = check(*stages)
    assert (code, record["passed"], printed[-1][:6]) == (1, False, "FAILED")
    assert {name: result["status"] for name, result in record["parts"].items()} == {"good": "passed", "bad": "failed"}
    code, record, _ = check(stages[0], [counting("bad", tmp_path)])
    assert (code, list(record["parts"])) == (0, ["good", "bad"])
    assert (runs(tmp_path, "good"), runs(tmp_path, "bad")) == (1, 2)

    check(*stages, commit="def")  # of another commit nothing is taken, and nothing of it is lost
    assert (runs(tmp_path, "good"), runs(tmp_path, "bad")) == (2, 3)
    (before,) = (tmp_path / "out").glob("gpu_check.*.json")
    assert json.loads(before.read_text())["parts"].keys() == {"good", "bad"}


def test_figures_of_what_failed_stay_until_it_runs_again(check: Any, tmp_path: Path) -> None:
    line = '{"name": "copy", "rate": 5.0}'
    failing = python("rates", f"print('{line}'); raise SystemExit(3)", tmp_path, figures=gpu_check.json_lines)
    check([counting("short", tmp_path, code=3, bound=60)], [failing])
    code, record, _ = check([counting("short", tmp_path, bound=60)], [failing], minutes=1.5)
    assert (code, list(record["left_out"])) == (1, ["rates"])
    assert [result["status"] for result in record["parts"].values()] == ["passed", "failed"]
    assert record["parts"]["rates"]["figures"] == [json.loads(line)]
    assert record["headline"] == {"copy_bytes_per_second": 5.0}
    _, record, _ = check([], [python("rates", "", tmp_path, figures=gpu_check.json_lines)])
    assert (record["parts"]["rates"]["figures"], record["headline"]) == ([], {"copy_bytes_per_second": 5.0})


def test_what_does_not_fit_is_left_out_and_done_by_the_next_call(check: Any, tmp_path: Path) -> None:
    stages = (
        [counting("first", tmp_path, bound=60)],
        [counting("long", tmp_path, bound=HOUR)],
        [counting("last", tmp_path, bound=60)],
    )
    code, record, printed = check(*stages, minutes=10)
    assert (code, list(record["parts"])) == (0, ["first", "last"])
    assert re.fullmatch(r"is given 3600 s, and 5\d\d s were left", record["left_out"]["long"])
    assert any(line.startswith("long        left out   is given 3600 s") for line in printed)
    code, record, _ = check(*stages, minutes=61)
    assert (code, record["left_out"], runs(tmp_path, "first"), runs(tmp_path, "long")) == (0, {}, 1, 1)
    assert check(*stages, minutes=0.01)[0] == 0  # nothing is missing


@pytest.mark.parametrize(("measured", "passed"), [('"speedup_over_reference": 8.0', True), ("", False)])
def test_both_paths_that_ran_out_of_time(measured: str, passed: bool, check: Any, tmp_path: Path, leap: Any) -> None:
    """With a published step measured they are done, though two of them may take too long; without one they are not."""
    script = f"""
import pathlib, time
print(1, file=open("align_both-runs", "a"))
print('{{{measured}}}', flush=True)
pathlib.Path("ready").touch()
time.sleep(9e9)
"""
    leap(tmp_path / "ready", HOUR)
    both = python("align_both", script, tmp_path, figures=lambda text: gpu_check.json_lines(text)[-1])
    code, record, _ = check([both])
    assert record["parts"]["align_both"]["status"] == "timed out"
    assert (code, record["passed"]) == (0 if passed else 1, passed)
    (tmp_path / "ready").unlink()
    check([both])
    assert runs(tmp_path, "align_both") == (1 if passed else 2)


def test_a_part_that_gets_the_rest(check: Any, tmp_path: Path) -> None:
    _, record, _ = check([counting("align", tmp_path, bound=60, rest=True)], minutes=10)
    assert 500 < record["parts"]["align"]["bound"] <= 600
    _, record, _ = check([counting("rates", tmp_path, bound=60)], minutes=10)
    assert record["parts"]["rates"]["bound"] == 60


def test_minutes_in_which_nothing_missing_fits(check: Any, tmp_path: Path) -> None:
    """The start takes seconds too."""
    short, long = counting("short", tmp_path, bound=60), counting("long", tmp_path, bound=390)
    absent = python("absent", "", tmp_path, bound=1, needs=("no_such_tool",))
    stages = [absent, short], [long]
    check(*stages, minutes=1.2)
    assert (runs(tmp_path, "short"), runs(tmp_path, "long")) == (1, 0)
    before = (tmp_path / "out" / "gpu_check.json").read_text()
    for given, commit, needed in (("6.5", "abc", "long needs 6.7"), ("1", "def", "short needs 1.2")):
        code, _, printed = check(*stages, minutes=float(given), commit=commit)
        assert (code, printed[-1]) == (2, f"gpu_check.sh: --minutes {given} is too little for any part: {needed}")
        assert (tmp_path / "out" / "gpu_check.json").read_text() == before


@pytest.mark.parametrize("commit", ["abc", "def"])
def test_killed_and_resumed(commit: str, tmp_path: Path) -> None:
    """kill -9 loses the part that was running, which goes with the check, and keeps what it had measured."""
    script = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_check
from parts import Part

first = "print(1, file=open('first-runs', 'a')); print('{{\\"name\\": \\"copy\\", \\"rate\\": 5.0}}')"
second = '''
import os, time
open("pid", "w").write(str(os.getpid()))
print('{{"name": "sampling", "images_per_second": 2.0}}', flush=True)
while not os.path.exists("go"): time.sleep(0.05)
'''
def part(name, script):
    return Part(name, 60, [[sys.executable, "-c", script]], {str(tmp_path)!r}, figures=gpu_check.json_lines)
gpu_check.stages = lambda *_: [[part("rates", first)], [part("sampling", second)]]
gpu_check.probe = lambda cpu: {{"cuda_available": False}}
sys.exit(gpu_check.main())
"""
    command = [sys.executable, "-c", script, str(tmp_path), "--cpu", "--commit", "abc", "--minutes", "600"]
    path = tmp_path / "gpu_check.json"

    def record() -> dict[str, Any]:
        return json.loads(path.read_text()) if path.exists() else {"parts": {}}

    check = subprocess.Popen(command)
    wait_until(lambda: record()["parts"].get("sampling", {}).get("figures"))
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert f"another check writes into {tmp_path}" in again.stderr
    orphan = int((tmp_path / "pid").read_text())
    assert not gone(orphan)
    check.send_signal(signal.SIGKILL)
    check.wait()
    wait_until(lambda: gone(orphan))  # whatever it held of the GPU's memory is free
    left = record()
    assert left["headline"] == {"copy_bytes_per_second": 5.0, "images_per_second_sampled": 2.0}
    assert [result["status"] for result in left["parts"].values()] == ["passed", "running"]

    (tmp_path / "go").touch()
    resumed = subprocess.run([commit if each == "abc" else each for each in command], timeout=PATIENCE)
    assert resumed.returncode == 0
    assert [result["status"] for result in record()["parts"].values()] == ["passed", "passed"]
    assert record()["headline"] == left["headline"]
    assert runs(tmp_path, "first") == (1 if commit == "abc" else 2)


def sources() -> set[Path]:
    """Files beside the sources, bytecode aside, which other tests write."""
    folders = ("vapi_fast", "kernels", "benchmarks", "tests")
    found = (path for folder in folders for path in (BENCHMARKS.parent / folder).rglob("*"))
    return {path for path in found if "__pycache__" not in path.parts}


def test_the_most_valuable_parts_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real ones: rates and smoke, both paths, sampling; small, and nothing is written beside the sources."""
    first = [
        [dataclasses.replace(part, bound=HOUR) for part in stage]
        for stage in gpu_check.stages(tmp_path / "work", (0, 0), True)[:3]
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda *_: first)
    monkeypatch.setattr("sys.argv", ["gpu_check.sh", str(tmp_path), "--cpu", "--minutes", "600"])
    before = sources()
    code = gpu_check.main()
    assert code == 0, capsys.readouterr().out
    assert sources() == before
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(record["parts"]) == ["rates", "align_both", "sampling"]
    assert next(iter(record)) == "headline"
    assert {"torch", "triton", "numpy", "python"} <= record["device"].keys()
    shown = {"step_seconds", "ratio", "published_step_seconds", "images_per_second_aligned"}
    shown |= {"peak_memory_beside_published"}
    shown |= {"images_per_second_sampled", "seconds_per_token", "sampling_setup_seconds", "copy_bytes_per_second"}
    assert shown | {"startup_seconds_cold", "first_step_seconds_cold", "matmul_flops"} == record["headline"].keys()
    own, published = (
        record["parts"]["align_both"]["figures"]["seconds_per_step"][name] for name in ("vapi_fast", "published_recipe")
    )
    assert record["headline"]["published_step_seconds"] == published
    assert record["headline"]["ratio"] == pytest.approx(published / own)
    names = [row["name"] for row in record["parts"]["rates"]["figures"]]
    assert names.index("convolution 3×3 bfloat16 128→128 384²") < names.index("policy_loss forward+backward")
    assert not any("failure" in row for row in record["parts"]["rates"]["figures"])
    kinds = {"convolution 3×3 {} 128→128 384²", "block end {} 128→128 384², triton"}
    assert {each.format(kind) for each in kinds for kind in ("bfloat16", "fp8")} <= {*names}
    assert {f"decoder as a CUDA graph{each}" for each in ("", " in float16", " in fp8")} <= {*names}


# ---- bad input


def said(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    monkeypatch.setattr("sys.argv", ["gpu_check.sh", *arguments])
    code = gpu_check.main()
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


H200 = {"cuda_available": True, "name": "NVIDIA H200", "capability": [9, 0], "free": 139 * 10**9, "needed": 60 * 10**9}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({"cuda_available": False}, "no CUDA device: nothing was run"),
        (H200 | {"name": "Tesla T4", "capability": [7, 5]}, "Tesla T4 has compute capability 7.5: 8.0 (A100) or more"),
        (H200 | {"free": 39 * 10**9}, "39.0 GB of NVIDIA H200's memory are free, about 60.0 GB are needed"),
        (
            "import no_such_module",
            "torch, triton or numpy cannot be used: ModuleNotFoundError: No module named 'no_such",
        ),
    ],
)
def test_devices_that_will_not_do(
    script: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = script if isinstance(script, str) else f"print({json.dumps(json.dumps(script))})"
    monkeypatch.setattr(gpu_check, "PROBE", script)
    code, line = said([str(tmp_path / "new")], monkeypatch, capsys)
    assert (code, line.startswith(f"gpu_check.sh: {message}")) == (1, True)
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    code, line = said([str(tmp_path / "file" / "new"), "--cpu"], monkeypatch, capsys)
    assert (code, "is not a folder that can be written to: pass another DIR" in line) == (2, True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may be root's
    code, line = said([str(tmp_path / "new"), "--cpu"], monkeypatch, capsys)
    assert (code, "is not a folder that can be written to: pass another DIR" in line) == (2, True)
    assert not (tmp_path / "new").exists()


def test_a_damaged_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gpu_check.json").write_text("{")
    code, line = said([str(tmp_path), "--cpu"], monkeypatch, capsys)
    assert (code, line.endswith("gpu_check.json is damaged: move it away, or pass another DIR")) == (1, True)
    assert (tmp_path / "gpu_check.json").read_text() == "{"


@pytest.mark.parametrize("minutes", ["0.9", "0", "-3", "nan"])
def test_too_few_minutes(
    minutes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = said([str(tmp_path / "new"), "--minutes", minutes], monkeypatch, capsys)
    assert code == 2
    assert line.endswith(f"--minutes {minutes} is too little for any part: sampling needs 1.2")
    assert not (tmp_path / "new").exists()


lost = False


def faulty(index: int, passes: str, device: str) -> dict[str, Any]:
    """In place of an operation beside float64: one loses the device for its process, one the process itself."""
    global lost
    lost |= index == 1
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if index == 3:
        os._exit(9)
    if index == 4:
        raise ValueError("its own")
    return {"error": 0.0, "ok": True}


def test_a_fault_of_the_device_is_that_of_one_operation(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rates = importlib.import_module("rates")
    monkeypatch.setattr(rates, "operation_error", faulty)
    bench = rates.Bench(rates.torch.device("cpu"))
    rates.exactness(bench, [types.SimpleNamespace(name=f"{i}", passes=["forward"]) for i in range(6)], 1)
    found = {row["name"]: row.get("failure", "") for row in gpu_check.json_lines(capfd.readouterr().out)}
    assert len(found) == 6
    failed = {name[0]: failure.partition(":")[0] for name, failure in found.items() if failure}
    assert failed == {"1": "RuntimeError", "3": "BrokenProcessPool", "4": "ValueError"}
    assert bench.failed


@pytest.mark.parametrize("script", ["rates", "sampling"])
def test_scripts_name_the_flag_for_a_cpu(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(script)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", [f"{script}.py"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "no CUDA device; --cpu" in capsys.readouterr().err
