"""The kernels' machine code for Ampere, Hopper and Blackwell, compiled here, and what the check calls a problem."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from vapi_fast.kernels import check
from vapi_fast.kernels.tables import launch_settings, launch_table

COMPILER = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
GOOD = check.Report(
    entry="rms_norm",
    kernel="rms_norm_forward",
    architecture="sm_90",
    warps=4,
    registers=64,
    spilled=0,
    shared=1024,
    dots=1,
    matrix_instruction="HGMMA",
    load_width=128,
)


def run_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vapi_fast.kernels.check", *arguments]
    return subprocess.run(command, env=COMPILER, capture_output=True, text=True)


def test_every_kernel_compiles_without_a_problem() -> None:
    ended = run_check()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].endswith(", 0 problems")
    for kernel in launch_table():
        for architecture in ("sm_80", "sm_90", "sm_100"):
            assert any({kernel, architecture} <= set(line.split()) for line in ended.stdout.splitlines()), kernel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 227 * 1024 + 1}, "shared memory, 232448 is the limit"),
        ({"shared": 164 * 1024, "architecture": "sm_80"}, "shared memory, 166912 is the limit"),
        ({"matrix_instruction": "-"}, "did not become a matrix instruction"),
    ],
)
def test_problems(change: dict[str, object], message: str) -> None:
    assert GOOD.problems == []
    assert message in dataclasses.replace(GOOD, **change).problems[0]
    assert dataclasses.replace(GOOD, dots=0, matrix_instruction="-").problems == []


def test_load_width_reads_the_instructions() -> None:
    assert check.load_width("  LDG.E.U16.CONSTANT R2, desc[UR4][R2.64] ;\n LDG.E R3, [R2] ;") == 32
    assert check.load_width("  LDGSTS.E.BYPASS.128 [R5], desc[UR8][R2.64] ;") == 128
    assert check.load_width("  STG.E.128 [R2], R4 ;") == 0


def test_a_wrong_name_and_the_interpreter_are_refused() -> None:
    assert "--only nothing: no such operation" in run_check("--only", "nothing").stderr
    interpreted = subprocess.run(
        [sys.executable, "-m", "vapi_fast.kernels.check"],
        env=COMPILER | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert interpreted.returncode == 2
    assert "unset it" in interpreted.stderr


def test_launch_settings_choose_the_nearest_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"kernel": {"default": {"n": 0}, "sm_80": {"n": 80}, "sm_90": {"n": 90}}}
    monkeypatch.setattr("vapi_fast.kernels.tables.launch_table", lambda: table)
    chosen = {a: launch_settings.__wrapped__("kernel", a)["n"] for a in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_75")}
    assert chosen == {"sm_80": 80, "sm_86": 80, "sm_90": 90, "sm_100": 90, "sm_75": 0}


def test_tables_are_complete() -> None:
    for kernel, by_architecture in launch_table().items():
        assert set(by_architecture) <= {"default", "sm_80", "sm_90", "sm_100"}, kernel
        assert "default" in by_architecture, kernel
        keys = {json.dumps(sorted(entry)) for entry in by_architecture.values()}
        assert len(keys) == 1, kernel
