"""Progress without tqdm: a line at once, one every ten seconds, and one at the end."""

from __future__ import annotations

import pytest
from tqdm import tqdm

from vapi_fast.runtime import progress
from vapi_fast.runtime.progress import ProgressLines, progress_bar


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows is the last of these."""
    shown = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: shown[-1])
    return shown


def test_lines(seconds: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "installed", lambda module: module != "tqdm")
    with progress_bar(10, desc="samples", unit="image", initial=2) as bar:
        for passed in (4, 8, 13, 15, 16, 17, 18):  # from 14 on the second is due
            bar.set_postfix({"reward": f"-0.{passed}"})
            seconds.append(1000.0 + passed)
            bar.update()
        assert bar.n == 9
        bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "samples: image 3/10, reward=-0.4, 28 s left",
        "samples: image 6/10, reward=-0.15, 15 s left",
        "samples: image 10/10, reward=-0.18, 0 s left",
    ]


def test_the_other_ranks_are_quiet(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLines(1, "aligning", "step", initial=0, disable=True) as bar:
        bar.update()
    assert bar.n == 1
    assert capsys.readouterr().err == ""


def test_a_bar_where_tqdm_is_installed() -> None:
    with progress_bar(2, desc="samples", unit="image", disable=True) as bar:
        assert isinstance(bar, tqdm)
