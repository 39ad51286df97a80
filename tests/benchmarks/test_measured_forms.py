"""What a GPU check's rates make of the forms of the same work."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import baseline
import forms as script
import pytest
import rates
import sampling
import torch
from baseline import Baseline

from vapi_fast.runtime import forms
from vapi_fast.runtime.forms import form

ROOT = Path(__file__).parents[2]
ENCODER, DECODER = "encoder as a CUDA graph", "decoder as a CUDA graph"
TRAINED = "attention, T 576, heads of 64, {}, forward and backward"


def check(folder: Path, seconds: dict[str, float], **more: Any) -> Path:
    rows = [{"name": name, "seconds": each, "rate": 1 / each} for name, each in seconds.items()]
    path = folder / "gpu_check.json"
    device = {"name": "NVIDIA H200", "capability": [9, 0]}
    path.write_text(json.dumps({"device": device, "parts": {"rates": {"figures": rows}}} | more))
    return path


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "forms.json"
    path.write_text(json.dumps({"sm_80": {"encoder": "float16"}, "sm_90": {"wide-attention": "matmul"}}))
    monkeypatch.setattr(forms, "MEASURED", path)
    monkeypatch.setattr(forms, "architecture", lambda device: "sm_90")
    forms.measured.cache_clear()
    yield path
    forms.measured.cache_clear()


def test_what_is_faster_is_taken_on_that_architecture(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {ENCODER: 10e-3, f"{ENCODER}, encoder=float16": 5e-3, f"{ENCODER}, cudnn-benchmark=on": 8e-3}
    seconds |= {DECODER: 10e-3, f"{DECODER}, last-convolution=eight": 9.9e-3, f"{DECODER}, cudnn-benchmark=on": 11e-3}
    seconds |= {f"block end bfloat16 128→128 384², {name}": each for name, each in (("cudnn", 2e-3), ("triton", 1e-3))}
    seconds |= {TRAINED.format(name): each for name, each in (("default", 3e-3), ("cuDNN", 2e-3))}
    path = check(tmp_path, seconds)
    assert script.main([str(path), "--dry-run"]) == 0
    assert form("encoder", torch.device("cuda")) == "tf32"
    assert script.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "encoder=float16: 10.000 → 5.000 ms, taken" in printed
    assert "last-convolution=eight: 10.000 → 9.900 ms, left" in printed
    assert "cudnn-benchmark=on: 20.000 → 19.000 ms, taken" in printed  # of both
    forms.measured.cache_clear()
    assert form("encoder", torch.device("cuda")) == "float16"
    expected = {"attention": "cudnn", "convolution 128→128 384²": "triton", "cudnn-benchmark": "on"}
    expected |= {"encoder": "float16", "wide-attention": "matmul"}  # the last was not measured
    assert json.loads(table.read_text()) == {"sm_80": {"encoder": "float16"}, "sm_90": expected}


def test_what_is_not_faster_any_more_is_left(table: Path, tmp_path: Path) -> None:
    script.main([str(check(tmp_path, {DECODER: 1e-3, f"{DECODER}, wide-attention=matmul": 1e-3}))])
    assert json.loads(table.read_text())["sm_90"] == {}


def test_the_fastest_of_several_against_what_is_installed(tmp_path: Path) -> None:
    seconds = {"default": 5e-3, "cuDNN": 3e-3, "flash-attn": 3.05e-3, "flash-attn-3": 2e-3}
    found = list(script.comparisons({TRAINED.format(name): each for name, each in seconds.items()}))
    assert [each.usual for each in found] == [3.05e-3, 3.05e-3]
    assert script.fastest(found) == {"attention": "flash-attn-3"}
    assert script.fastest(found[:1]) == {}  # a percent or two is chance


@pytest.mark.parametrize("more", [{"device": {}}, {"parts": {}}])
def test_a_file_without_a_gpu_or_rates_is_refused(
    tmp_path: Path, more: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main([str(check(tmp_path, {"copy": 1.0}, **more))])
    assert "pass a gpu_check.json" in capsys.readouterr().err


def test_rates_are_reported_by_the_names_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form has its rates among those of `rates.py`, which here runs small, with made-up seconds; and every gain
    of the table in docs/development.md has rates or accepted ratios, by their names."""
    seconds: dict[str, float] = {}
    monkeypatch.setattr(rates, "rate", lambda sets, call, work: {"seconds": 1e-3, "rate": work / 1e-3})
    monkeypatch.setattr(rates, "report", lambda name, **found: seconds.update({name: found.get("seconds", 0.0)}))
    monkeypatch.setattr(rates, "relative", lambda found, expected: 0.0)
    rates.measure(rates.Bench(torch.device("cpu"), shrink=16))
    found = {each.kind.split()[0] for each in script.comparisons(seconds)}
    assert found == set(forms.FORMS)
    drawn: list[str] = []
    monkeypatch.setattr(sampling, "random_model", lambda device: None)
    monkeypatch.setattr(sampling, "sample", lambda model, images, name, kv_dtype: drawn.append(name))
    monkeypatch.setattr("sys.argv", ["sampling.py", "--cpu"])
    sampling.main()
    ratios = set().union(*Baseline(baseline.FILE).kinds.values())
    gains = table_of_gains()
    assert len(gains) == 16
    for gain, _, *measured in gains:
        names = [set(re.findall(r"`([^`]+)`", cell)) for cell in measured]
        assert any(names), gain
        assert names[0] <= {*seconds, *drawn}, gain
        assert names[1] <= ratios, gain


def table_of_gains() -> list[list[str]]:
    lines = (ROOT / "docs" / "development.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| gain | without it | rates | ratios |") + 2
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
