"""The CUDA path on a machine without a GPU, and the faults that a rehearsal of it must find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vapi_fast.kernels import launches

TESTS = Path(__file__).resolve().parents[1]


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the stand-in for the device must be there before PyTorch is."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rehearsal", *arguments]
    ended = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    if ended.returncode == 2 and "rehearsal: " in ended.stderr:
        pytest.skip(ended.stderr.strip())
    return ended


def test_every_planted_fault_is_found() -> None:
    ended = rehearse("--faults")
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    assert "found: nothing" not in ended.stdout


def test_nothing_is_found_and_every_launch_is_checked(tmp_path: Path) -> None:
    ended = rehearse("--record", str(tmp_path / "launches.json"))
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    launched = launches.load(tmp_path / "launches.json")
    missing = launched.keys() - launches.load().keys()
    assert not missing, "launched, but not compiled ahead: cd tests && python -m rehearsal --record"
    idle = launches.load().keys() - launched.keys()
    assert not idle, "compiled ahead, but not launched: cd tests && python -m rehearsal --record"
    assert (tmp_path / "launches.json").read_text(encoding="utf-8") == launches.FILE.read_text(encoding="utf-8")
