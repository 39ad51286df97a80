"""The search for launch settings: candidates, descent, the rewritten tables, and settings that reach the launch."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from vapi_fast import reference
from vapi_fast.kernels import tables, tune
from vapi_fast.ops.fused import normalization, production
from vapi_fast.ops.fused.launch import settings

START = {"BLOCK_ROWS": 4, "LEVELS": 3, "num_warps": 8, "num_stages": 1}
FOREVER = math.inf


def valley(settings: dict[str, int], beat: float = math.inf) -> float:
    """Least at 16 rows and 2 warps; more than 64 rows do not fit."""
    rows, warps = math.log2(settings["BLOCK_ROWS"]), math.log2(settings["num_warps"])
    return math.inf if rows > 6 else 1 + (rows - 4) ** 2 + (warps - 1) ** 2


def test_variations_change_one_value() -> None:
    found = {name: [candidate[name] for candidate in tune.variations(START, name)] for name in START}
    assert found == {"BLOCK_ROWS": [2, 8, 16], "LEVELS": [], "num_warps": [1, 2, 4, 16], "num_stages": [2, 3, 4]}
    assert all(sum(c[n] != START[n] for n in START) == 1 for name in START for c in tune.variations(START, name))
    assert [c["BLOCK"] for c in tune.variations({"BLOCK": 1}, "BLOCK")] == [2, 4]


def test_descent_finds_the_fastest_and_tries_nothing_twice() -> None:
    tried = []

    def measure(candidate: dict[str, int], beat: float) -> float:
        tried.append(json.dumps(candidate))
        seconds = valley(candidate)
        return math.inf if seconds >= beat else seconds

    best, seconds, first = tune.descend(START, measure, FOREVER)
    assert best == START | {"BLOCK_ROWS": 16, "num_warps": 2}
    assert (seconds, first) == (1.0, valley(START))
    assert len(tried) == len(set(tried))


def test_descent_ignores_noise_and_stops_in_time() -> None:
    assert tune.descend(START, lambda s, beat: 1.0 - 0.01 * (s != START), FOREVER)[0] == START
    assert tune.descend(START, valley, time.monotonic() - 1) == (START, valley(START), valley(START))


def test_descent_leaves_settings_that_do_not_run() -> None:
    best, _, first = tune.descend(START | {"BLOCK_ROWS": 128}, valley, FOREVER)
    assert first == math.inf
    assert best["BLOCK_ROWS"] == 16


def test_gain_must_be_confirmed() -> None:
    times = iter([1.0, 0.5, 0.6, 0.7, 1.0, 0.9])  # start, best, start, best, …
    assert tune.confirmed(START, {}, lambda *_: next(times)) == (True, 0.6, 0.5)
    assert not tune.confirmed(START, {}, lambda *_: 1.0)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    table = {"first": {"default": START, "sm_100": START | {"num_stages": 2}}, "second": {"default": {"BLOCK": 64}}}
    (tmp_path / "a.json").write_text(tune.formatted(table))
    (tmp_path / "b.json").write_text(tune.formatted({"third": {"default": START, "sm_90": START}}))
    return tmp_path


def test_tables_are_rewritten_for_one_architecture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(kernel: str, settings: dict[str, int], beat: float) -> float:
        return valley(settings) if kernel == "first" else 1.0

    tune.tune(["first", "third"], "sm_90", folder, 60, measure)
    found = START | {"BLOCK_ROWS": 16, "num_warps": 2}
    _, table = tune.table_of(folder, "first")
    assert table["first"] == {"default": START, "sm_90": found, "sm_100": START | {"num_stages": 2}}
    assert list(table["first"]) == ["default", "sm_90", "sm_100"]
    assert table["second"] == {"default": {"BLOCK": 64}}
    assert tune.table_of(folder, "third")[1]["third"] == {"default": START}  # what it had repeated the default
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json"]
    printed = capsys.readouterr().out.splitlines()
    assert "9000.0000 ms → 1000.0000 ms" in printed[0]
    assert printed[1].endswith("kept")


def test_no_time_leaves_the_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "a.json").read_text()
    tune.tune(["first", "second"], "sm_90", folder, 0, lambda *_: 1.0)
    assert "first, second not tuned" in capsys.readouterr().out
    assert (folder / "a.json").read_text() == before


def test_shipped_tables_have_the_format_that_tuning_writes() -> None:
    for path in tables.FOLDER.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert tune.formatted(json.loads(text)) == text, path.name


def test_every_kernel_of_the_tables_is_launched_by_production() -> None:
    assert set(tables.launch_table()) == set(tune.entries_by_kernel("sm_90"))


def test_settings_reach_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry() -> None:
        x, weight = production.new(5, 64, dtype=torch.float32), production.new(64, dtype=torch.float32)
        normalization.rms_norm_forward(x, weight, 1e-5)
        normalization.rms_norm_backward(x, x, weight, 1e-5)

    monkeypatch.setitem(production.PRODUCTION, "small", entry)
    choice = {"BLOCK_ROWS": 2, "num_warps": 1, "num_stages": 1}
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    (launch,) = tune.carried_out("small", "rms_norm_forward", choice, device)
    assert launch.grid == (3,)
    assert choice.items() <= launch.constants.items()
    x, weight, y = launch.args[:3]
    assert x.device == device
    torch.testing.assert_close(y, reference.rms_norm(x, weight))
    assert settings("rms_norm_forward", x) != choice
    assert production.new(3).is_meta


def test_settings_that_fail_take_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tune, "carried_out", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert tune.measured("kernel", START, math.inf, ["rms_norm"], torch.device("cpu")) == math.inf


def test_only_entries_of_xxl_in_bf16_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"rms_norm": 1.0, "rms_norm wide": 2.0, "rms_norm fp32": 10.0, "rms_norm V 65536": 10.0}
    run = []
    monkeypatch.setattr(tune, "carried_out", lambda entry, *_: run.append(entry) or [entry])
    monkeypatch.setattr(tune, "spills", lambda launch: False)
    monkeypatch.setattr(tune, "timed_together", lambda launches: times[launches[0]])

    def seconds(entries: list[str], beat: float = math.inf) -> float:
        run.clear()
        return tune.measured("kernel", START, beat, entries, torch.device("cpu"))

    assert seconds(list(reversed(times))) == 3.0
    assert run == ["rms_norm wide", "rms_norm", "rms_norm V 65536", "rms_norm fp32"]
    assert seconds(["rms_norm fp32"]) == 10.0
    assert seconds(list(times), beat=3.0) == math.inf
    assert run == ["rms_norm", "rms_norm wide"]  # too slow: no more are run
    monkeypatch.setattr(tune, "spills", lambda launch: launch == "rms_norm fp32")
    assert seconds(list(times)) == math.inf


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it needs where there is no GPU")
def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit, match="2"):
        tune.main()
    assert "no CUDA device" in capsys.readouterr().err
