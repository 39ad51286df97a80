"""Measurements between the steps: of the right weights, resumed, drawn, and no part of the alignment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vapi_fast
from vapi_fast import AlignConfig
from vapi_fast.alignment import loop, run
from vapi_fast.alignment.charts import save_fid_curve
from vapi_fast.alignment.measurement import Evaluator, HeldOut, Measurement, Scored
from vapi_fast.evaluation.metrics import Scores
from vapi_fast.models import Generator
from vapi_fast.runtime.checkpoint import load_state_dict
from vapi_fast.runtime.errors import ConfigError, StoppedError

Make = Callable[..., AlignConfig]
EVERY = {"evaluate": True, "eval_samples": 8, "eval_batch": 8, "eval_every": 2, "steps": 5}
SECONDS = 100.0  # that a measurement takes, on the clock of these tests; a step takes one


@pytest.fixture
def measured(image_sets: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the measurements made, each of which is a function of the weights that it was made of."""
    names: list[str] = []
    now = [0.0]
    for module in (loop, run):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    align_step = loop.align_step

    def timed(*arguments: Any, **options: Any) -> Any:
        now[0] += 1.0
        return align_step(*arguments, **options)

    def measure(self: Evaluator, generator: Generator, name: str) -> Measurement:
        names.append(name)
        now[0] += SECONDS
        fid = float(sum(weight.detach().double().square().sum() for weight in generator.parameters()))
        figures = (Scores(each, each / 10, None, 2.0, 0.1, 0.9, 0.7, 8, 8, "fake") for each in (fid, fid / 2))
        return Measurement(*(Scored(each, None) for each in figures), HeldOut(-fid, 0.1, 0.2, 3.0, 4.0))

    monkeypatch.setattr(loop, "align_step", timed)
    monkeypatch.setattr(Evaluator, "measure", measure)
    return names


def test_steps_are_measured_and_nothing_else_changes(
    tiny_config: Make, tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "measured"
    record = vapi_fast.align(tiny_config(output_dir=output, **EVERY))
    assert measured == ["base", "step 2", "step 4", "aligned"]
    assert record["seconds"]["alignment"] == 5  # without the measurements
    assert record["seconds"]["evaluation"] == 4 * SECONDS
    printed = capsys.readouterr()
    plain = vapi_fast.align(tiny_config(output_dir=tmp_path / "plain", **EVERY | {"eval_every": None}))
    early = vapi_fast.align(tiny_config(output_dir=tmp_path / "early", **EVERY | {"eval_every": None, "steps": 2}))
    assert list(record["evaluations"]) == ["2", "4"]
    assert record["evaluations"]["2"] == early["aligned"]
    assert plain["evaluations"] == {}
    for name in ("base", "aligned", "reward", "curves"):
        assert record[name] == plain[name]
    one, other = (load_state_dict(folder / "aligned.pt") for folder in (output, tmp_path / "plain"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "plain" / "fid.png").exists()

    fids = [record["base"]["fid"], *(each["fid"] for each in record["evaluations"].values()), record["aligned"]["fid"]]
    assert len(set(fids)) == 4
    for step in (2, 4):
        assert f"\nstep {step} " in printed.out
        assert f"\nstep {step}, CFG 1.5 " in printed.out
    assert f"fid={fids[1]:.2f}" in printed.err
    lines = [json.loads(line) for line in (output / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4, 5]
    assert [line["evaluation"] for line in lines if "evaluation" in line] == list(record["evaluations"].values())
    curves = EventAccumulator(str(output / "tensorboard"))
    curves.Reload()
    points = [(event.step, event.value) for event in curves.Scalars("evaluation/fid")]
    assert [step for step, _ in points] == [0, 2, 4, 5]
    assert [value for _, value in points] == pytest.approx(fids)
    assert [event.value for event in curves.Scalars("evaluation/cfg/fid")] == pytest.approx([fid / 2 for fid in fids])
    assert [event.value for event in curves.Scalars("evaluation/entropy")] == [3.0] * 4


@pytest.mark.usefixtures("image_sets")
def test_without_guidance_each_measurement_draws_once(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[float] = []
    score = Evaluator.score
    monkeypatch.setattr(Evaluator, "score", lambda self, *a: drawn.append(a[1]) or score(self, *a))
    guided = vapi_fast.align(tiny_config(output_dir=tmp_path / "guided", **EVERY | {"eval_every": None, "steps": 2}))
    assert drawn == [1.0, 1.5] * 2
    drawn.clear()
    output = tmp_path / "plain"
    plain = vapi_fast.align(tiny_config(output_dir=output, **EVERY | {"steps": 3, "cfg_scale": 1.0}))
    assert drawn == [1.0] * 3
    assert plain["base"] == {name: value for name, value in guided["base"].items() if name != "cfg"}
    assert plain["evaluations"]["2"]["fid"] == guided["aligned"]["fid"]
    assert (output / "fid.png").exists()
    assert "CFG" not in capsys.readouterr().out.partition("results in")[2].partition("results in")[2]
    curves = EventAccumulator(str(output / "tensorboard"))
    curves.Reload()
    assert "evaluation/fid" in curves.Tags()["scalars"]
    assert "evaluation/cfg/fid" not in curves.Tags()["scalars"]


def test_a_known_measurement_of_the_base_is_taken(tiny_config: Make, tmp_path: Path, measured: list[str]) -> None:
    own = vapi_fast.align(tiny_config(output_dir=tmp_path / "own", **EVERY))
    measured.clear()
    known = vapi_fast.align(tiny_config(output_dir=tmp_path / "known", **EVERY), base=own["base"])
    assert measured == ["step 2", "step 4", "aligned"]
    for name in ("base", "evaluations", "aligned"):
        assert known[name] == own[name]


def test_a_resumed_run_measures_what_is_missing(
    tiny_config: Make, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the third step, by SIGTERM in the second, which is to be measured, or in that measurement itself."""
    whole = vapi_fast.align(tiny_config(output_dir=tmp_path / "whole", **EVERY))
    weights = load_state_dict(tmp_path / "whole" / "aligned.pt")
    align_step, measure = loop.align_step, Evaluator.measure

    def in_step(*arguments: Any, **more: Any) -> Any:
        if arguments[2] == 2:
            raise KeyboardInterrupt
        return align_step(*arguments, **more)

    def by_signal(*arguments: Any, **more: Any) -> Any:
        # As in the step that follows a SIGTERM.
        return align_step(*arguments, **more | {"stop": arguments[2] == 1})

    def in_measurement(self: Evaluator, generator: Generator, name: str) -> Measurement:
        if name == "step 2":
            raise KeyboardInterrupt
        return measure(self, generator, name)

    for owner, name, stopped, before in (
        (loop, "align_step", in_step, ["base", "step 2"]),
        (loop, "align_step", by_signal, ["base"]),
        (Evaluator, "measure", in_measurement, ["base"]),
    ):
        options = EVERY | {"output_dir": tmp_path / stopped.__name__}
        measured.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopped)
            with pytest.raises((KeyboardInterrupt, StoppedError)):
                vapi_fast.align(tiny_config(**options))
        assert measured == before
        measured.clear()
        resumed = vapi_fast.align(tiny_config(**options, resume=True))
        assert measured == ["base", "step 2", "step 4", "aligned"][len(before) :]
        for key in ("base", "evaluations", "aligned", "curves"):
            assert resumed[key] == whole[key]
        lines = map(json.loads, (options["output_dir"] / "progress.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]  # none is done twice
        found = load_state_dict(options["output_dir"] / "aligned.pt")
        assert all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.parametrize("changes", [{"evaluate": False}, {"random_init": True}, {"synthetic_data": True}])
def test_nothing_can_be_measured_without_an_evaluation(tiny_config: Make, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny_config(**{"evaluate": True, "eval_every": 5} | changes)
    assert str(refused.value) == (
        "--eval-every 5 goes without --no-eval, --random-init and --synthetic-data: they measure nothing"
    )


def test_a_picture_of_another_run_stays(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fid.png").write_bytes(b"of another run")
    with pytest.raises(ConfigError, match=r"holds fid\.png, which this run would write"):
        tiny_config()


MEASUREMENTS = {
    step: {"fid": fid, "fid_se": error, "cfg": {"fid": fid / 2, "fid_se": error / 2}}
    for step, fid, error in ((0, 16.0, 0.5), (10, 10.0, 1.0), (25, 9.0, 2.0))
}


def test_the_picture_shows_fid_with_its_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k))[1])
    save_fid_curve(tmp_path / "fid.png", MEASUREMENTS, 1.75)
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["no guidance", "CFG 1.75"]
    for container, share in zip(axes.containers, (1.0, 0.5), strict=True):
        line, _, (bars,) = container.lines
        steps = list(MEASUREMENTS)
        assert line.get_xdata().tolist() == steps
        assert line.get_ydata().tolist() == [share * each["fid"] for each in MEASUREMENTS.values()]
        for step, segment in zip(steps, bars.get_segments(), strict=True):
            fid, error = (share * MEASUREMENTS[step][name] for name in ("fid", "fid_se"))
            assert np.array_equal(segment, [[step, fid - error], [step, fid + error]])
    low, high = axes.get_ylim()
    assert low == 0
    assert high > 16.5
    with Image.open(tmp_path / "fid.png") as picture:
        assert picture.size == (900, 540)
    with pytest.raises(ValueError, match="no measurements to draw"):
        save_fid_curve(tmp_path / "none.png", {}, 1.75)
    assert [path.name for path in tmp_path.iterdir()] == ["fid.png"]
