"""The GPU check's machinery: parts that pass, fail, hang or cannot run, the JSON file, the table and the exit code."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_check
import parts
import pytest
from parts import Part, run, run_together

REPORT = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">
<testcase classname="test_a" name="test_good" time="2.5"/>
<testcase classname="test_a" name="test_bad[1]" time="0.1"><failure message="m">def test():
&gt;   assert 1 == 2
E   assert 1 == 2

tests/test_a.py:3: AssertionError</failure></testcase>
<testcase classname="test_a" name="test_left" time="0"><skipped message="needs a CUDA device"/></testcase>
</testsuite></testsuites>"""


def python(name: str, script: str, folder: Path, **options: Any) -> Part:
    return Part(name, lambda limit: [sys.executable, "-c", script], options.pop("limit", 60.0), folder, **options)


def test_a_part_that_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    script = "import os; print(os.environ['SIZE'], os.environ.get('TRITON_INTERPRET'), os.getcwd())"
    part = python("a", script, tmp_path, environment={"SIZE": "7"}, figures=str.split, failures=lambda output: [])
    result = run(part, 60, tmp_path / "a.log")
    assert result["status"] == "passed"
    assert result["figures"] == ["7", "None", str(tmp_path)]
    assert "tail" not in result
    assert (tmp_path / "a.log").read_text().startswith("7 None")


def test_a_part_that_fails_keeps_its_last_words(tmp_path: Path) -> None:
    result = run(python("a", "raise SystemExit('x' * 9000 + 'end')", tmp_path), 60, tmp_path / "a.log")
    assert (result["status"], result["returncode"]) == ("failed", 1)
    assert result["tail"].strip().endswith("end")
    assert len(result["tail"]) == parts.TAIL


def test_a_part_without_its_figures_is_still_reported(tmp_path: Path) -> None:
    part = python("a", "", tmp_path, figures=lambda output: json.loads((tmp_path / "none.json").read_text()))
    result = run(part, 60, tmp_path / "a.log")
    assert result["status"] == "passed"
    assert result["figures"] is None
    assert "FileNotFoundError" in result["failures"][0]


def test_a_part_that_hangs_is_asked_and_then_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "GRACE", 0.5)
    child = f"import time; open({str(tmp_path / 'child')!r}, 'w').write(''); time.sleep(3); open('late', 'w')"
    deaf = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", {child!r}])
print("ready", flush=True)
time.sleep(60)
"""
    start = time.monotonic()
    result = run(python("a", deaf, tmp_path), 2, tmp_path / "a.log")
    assert result["status"] == "timed out"
    assert "ready" in result["tail"]
    assert time.monotonic() - start < 20
    time.sleep(3.5)
    assert not (tmp_path / "late").exists()  # what it had started is gone too

    polite = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('written', flush=True)"
    result = run(python("a", polite, tmp_path, figures=lambda output: output), 2, tmp_path / "a.log")
    assert result["status"] == "timed out"
    assert result["figures"].strip() == "written"


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    part = python("a", "", tmp_path, needs=("pytest", "no_such_module"))
    assert run(part, 60, tmp_path / "a.log") == {
        "status": "skipped",
        "optional": False,
        "reason": "not installed: no_such_module",
    }
    assert run(python("a", "", tmp_path), -1, tmp_path / "a.log")["reason"] == "no time was left for it"


def test_a_tool_that_refuses_the_device_is_skipped(tmp_path: Path) -> None:
    part = python("a", "raise SystemExit('Error: Device not supported')", tmp_path, optional=True)
    assert run(part, 60, tmp_path / "a.log")["status"] == "skipped"


def test_parts_of_a_stage_do_not_hide_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(limit: float) -> list[str]:
        return ["/no/such/program"]

    stage = [Part("broken", broken, 60, tmp_path), python("good", "print(3)", tmp_path)]
    results = run_together(stage, tmp_path, 60 + parts.GRACE)
    assert {name: result["status"] for name, result in results.items()} == {"broken": "failed", "good": "passed"}
    assert "FileNotFoundError" in results["broken"]["tail"]
    assert results["good"]["gpu"] is None or "sm_clock" in results["good"]["gpu"]
    assert capsys.readouterr().out.splitlines() == ["broken: failed", "good: passed"]


def test_reports_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    counts = gpu_check.junit_counts(tmp_path / "report.xml")
    slowest = counts.pop("slowest")
    assert counts == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1}
    assert next(iter(slowest.items())) == ("test_good", 2.5)
    (failure,) = gpu_check.junit_failures(tmp_path / "report.xml")
    assert gpu_check.short(failure) == "test_a::test_bad[1]: assert 1 == 2"


def test_report_of_the_machine_code() -> None:
    line = "rms_norm fp32           rms_norm_forward                 sm_90       8    40     0     512  -         128"
    (row,) = gpu_check.kernel_rows(
        f"entry kernel arch  warps  regs spill  shared  matrix  load\n{line}\n1 kernels, 0 problems"
    )
    assert row["entry"] == "rms_norm fp32"
    assert (row["kernel"], row["registers"], row["load_width"]) == ("rms_norm_forward", "40", "128")


@pytest.mark.parametrize(("capability", "architecture"), [((9, 0), "sm_90"), ((8, 6), "sm_80"), ((12, 0), "sm_100")])
def test_kernels_are_checked_for_this_device(capability: tuple[int, int], architecture: str, tmp_path: Path) -> None:
    stages = gpu_check.gpu_stages(tmp_path, capability)
    by_name = {part.name: part for stage in stages for part in stage}
    assert architecture in by_name["kernels"].command(60)
    assert {"tests", "production", "memcheck", "kernels", "benchmarks"} == set(by_name)
    assert "test_fused_normalization.py" in by_name["tests"].command(60)
    assert by_name["benchmarks"].command(260)[-1] == "--compile-seconds=80"


@pytest.fixture
def one_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run the check with the given parts in place of its own; returns exit code, record and the last line printed."""

    def call(
        capsys: pytest.CaptureFixture[str], *stage: Part, later: Sequence[Part] = ()
    ) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(gpu_check, "install", lambda work: python("install", "", tmp_path))
        monkeypatch.setattr(gpu_check, "cpu_stages", lambda work: [list(stage), *([list(later)] if later else [])])
        monkeypatch.setattr(gpu_check, "probe", lambda: {"cuda_available": False, "torch": "2.11"})
        monkeypatch.setattr("sys.argv", ["gpu_check.sh", str(tmp_path / "out"), "--cpu", "--commit", "abc"])
        code = gpu_check.main()
        assert not list((tmp_path / "out").glob("*.tmp"))
        record = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
        return code, record, capsys.readouterr().out.splitlines()[-1]

    return call


def test_all_passed(one_stage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = python("memcheck", "", tmp_path, needs=("no_such_tool",), optional=True)
    code, record, last = one_stage(capsys, python("tests", "print(1)", tmp_path), absent)
    assert code == 0
    assert record["passed"]
    assert record["commit"] == "abc"
    assert record["parts"]["memcheck"]["reason"] == "not installed: no_such_tool"
    assert last == "passed: no CUDA device, commit abc"


def test_benchmarks_keep_their_time(
    one_stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "SECONDS", 60.0)
    monkeypatch.setattr(parts, "GRACE", 1.0)
    slow = python("tests", "import time; time.sleep(60)", tmp_path)
    later = [python("benchmarks", "print('timed')", tmp_path, reserved=50.0)]
    code, record, _ = one_stage(capsys, slow, later=later)
    assert code == 1
    assert record["parts"]["tests"]["limit"] < 10
    assert [record["parts"][name]["status"] for name in ("tests", "benchmarks")] == ["timed out", "passed"]


def test_ratios_of_every_part_are_reported() -> None:
    measured = {"name": "generate xxl 384²", "ratio": None, "seconds": {"vapi_fast": 5.0}, "failure": "reference: OOM"}
    measured |= {"yardstick": None, "reference": "reference"}
    parts = {"generate": {"status": "passed", "figures": [measured]}, "kernels": {"status": "passed", "figures": [{}]}}
    text = gpu_check.report({"parts": parts, "device": {}, "passed": True, "commit": "abc"})
    assert "no ratio: reference: OOM" in text


@pytest.mark.parametrize("script", ["raise SystemExit(3)", None])
def test_not_all_passed(one_stage: Any, script: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = python("tests", script or "", tmp_path, needs=() if script else ("no_such_module",))
    code, record, last = one_stage(capsys, bad, python("kernels", "", tmp_path))
    assert code == 1
    assert record["parts"]["kernels"]["status"] == "passed"
    assert not record["passed"]
    assert last.startswith("FAILED")


@pytest.mark.gpu
def test_clocks_and_power_are_read() -> None:
    reading = parts.gpu_reading()
    assert reading is not None
    assert reading["sm_clock"] > 0
    assert reading["power"] > 0


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "probe", lambda: {"cuda_available": False})
    monkeypatch.setattr("sys.argv", ["gpu_check.sh", str(tmp_path)])
    assert gpu_check.main() == 1
    assert capsys.readouterr().out.startswith("no CUDA device")
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert (record["passed"], record["parts"]) == (False, {})
