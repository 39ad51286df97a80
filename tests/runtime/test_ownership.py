"""A folder has one owner: a second run is told who has it, the dead own nothing, and nothing is left of nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.ownership import LOCK, owned

HOLD = """
import sys, time
from pathlib import Path
from vapi_fast.runtime.ownership import owned
with owned(Path(sys.argv[1]), "--out"):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_one_works_and_the_other_is_told_who_has_it(tmp_path: Path) -> None:
    process = holder(tmp_path / "out")
    try:
        with (
            pytest.raises(ConfigError, match=f"--out .*out is being written to by process {process.pid} on "),
            owned(tmp_path / "out", "--out"),
        ):
            pytest.fail("owned by two")
        assert (tmp_path / "out" / LOCK).exists()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with owned(tmp_path / "out", "--out"):  # the dead own nothing
        (tmp_path / "out" / "result").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result"]


def test_a_lock_that_is_no_runs_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    for name in ("link", "file", "pipe"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / LOCK).symlink_to(mine)
    (tmp_path / "file" / LOCK).write_text("precious")
    os.mkfifo(tmp_path / "pipe" / LOCK)
    for name in ("link", "file", "pipe"):
        with pytest.raises(ConfigError, match=f"--out .*{name}"), owned(tmp_path / name, "--out"):
            pytest.fail("owned")
        assert os.path.lexists(tmp_path / name / LOCK)
    assert mine.read_text() == (tmp_path / "file" / LOCK).read_text() == "precious"
    (tmp_path / "file" / LOCK).write_text("process 1 on a machine that lost power")
    with owned(tmp_path / "file", "--out"):
        pass


def test_nothing_is_left_where_nothing_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "c"
    with pytest.raises(FileNotFoundError), owned(folder, "--out"):
        (folder / "missing").unlink()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with owned(tmp_path / "mine", "--out"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "out", Path("/proc/nothing"), tmp_path / ("x" * 300)):
        with (
            pytest.raises(ConfigError, match="pass a folder that can be written to") as refused,
            owned(folder, "--out"),
        ):
            pytest.fail("owned")
        assert "\n" not in str(refused.value)


def test_a_file_system_without_locks_is_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with owned(tmp_path / "out", "--out"):
        assert "its file system has no locks" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
