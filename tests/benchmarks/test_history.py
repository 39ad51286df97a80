"""The page of ratios over commits: what it reads, in which order, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import history
import pytest
from baseline import Baseline
from test_baseline import row


def results(folder: Path) -> None:
    """A file of pytest-benchmark and one of gpu_check, of a later commit though measured before, from two devices."""
    info = [row(), row(name="rms_norm forward", ratio=None), row(name="step <b>", ratio=4.0), {}]
    first = {
        "commit_info": {"id": "a" * 40, "dirty": True, "time": "2025-11-20T03:00:00+02:00"},
        "datetime": "2025-11-26T01:00:00+00:00",
        "benchmarks": [{"extra_info": each} for each in info],
    }
    parts: dict[str, Any] = {"benchmarks": {"figures": [row(ratio=3.0), row(kind="NVIDIA H100", ratio=9.0)]}}
    parts["align_both"] = {"figures": {"speedup_over_reference": 12.3, "config": {"model": "xxl"}}}
    parts["generate"] = {"figures": [row(kind="NVIDIA H100", name="generate xxl 384²", ratio=8.0)]}
    parts["kernels"] = {"figures": [{"entry": "rms_norm fp32"}]}
    second = {"commit": "b" * 40, "started": "2025-11-25T01:00:00Z", "device": {"name": "NVIDIA H100"}, "parts": parts}
    second["commit_time"] = "2025-11-20T02:00:00+00:00"
    (folder / "z.json").write_text(json.dumps(first))
    (folder / "a.json").write_text(json.dumps(second))


def test_history_is_drawn_in_order_of_commits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results(tmp_path)
    points = [point for path in sorted(tmp_path.glob("*.json")) for point in history.points_of(path)]
    assert {(point.kind, point.name, point.ratio) for point in points} == {
        ("cpu", "mse forward", 2.0),
        ("cpu", "mse forward", 3.0),
        ("cpu", "step <b>", 4.0),
        ("NVIDIA H100", "mse forward", 9.0),
        ("NVIDIA H100", "alignment of xxl", 12.3),
        ("NVIDIA H100", "generate xxl 384²", 8.0),
    }
    accepted = Baseline(tmp_path / "accepted")
    accepted.update([row(ratio=2.5)])
    axes = {tuple(each.get_title().split("\n")): each for each in history.drawing(points, Baseline(accepted.path)).axes}
    assert [kind for _, kind in axes] == ["NVIDIA H100"] * 3 + ["cpu"] * 2
    drawn = axes["mse forward 3.00×, accepted 2.50×", "cpu"]
    ratios, level = (list(line.get_ydata()) for line in drawn.get_lines())
    assert (ratios, level) == ([2.0, 3.0], [2.5, 2.5])  # by commit, not by measurement
    assert [each.get_text() for each in drawn.get_xticklabels()] == ["aaaaaaaaa-dirty", "bbbbbbbbb"]
    assert drawn.get_ylim()[0] == 0
    assert history.main([str(tmp_path), "--baseline", str(accepted.path)]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/history.html: 6 ratios of 2 runs"
    assert "<svg" in (tmp_path / "history.html").read_text()


def run(**info: Any) -> str:
    commit = {"id": "a" * 40, "dirty": False}
    record = {"commit_info": commit, "datetime": "2025-11-24T01:00:00", "benchmarks": [{"extra_info": info}]}
    return json.dumps(record)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no ratios: run pytest"),
        ("[]", "z.json is neither"),
        ("{", "z.json is neither"),
        (run(ratio=2.0, name="mse"), "z.json is neither pytest-benchmark's JSON nor gpu_check's (KeyError: 'kind')"),
        (run(ratio="2.0", name="mse", kind="cpu"), "(ValueError: a ratio of '2.0')"),
        (run(ratio=0.0, name="mse", kind="cpu"), "(ValueError: a ratio of 0.0)"),
    ],
)
def test_what_cannot_be_drawn(
    tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "z.json").write_text(text)
    assert history.main([str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "history.html").exists()
