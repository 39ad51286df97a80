"""The ablation's tables: which runs they need, that none is done twice, and what is said of their figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ablation
import pytest
from ablation import PRIOR, RANDOM, SHUFFLED, TEMPERATURE, VAPI, Runs

from vapi_fast import AlignConfig
from vapi_fast.alignment import models, run
from vapi_fast.alignment.measurement import Evaluator

SMALL = {"steps": 1, "batch_size": 4, "micro_batch": 4, "group_size": 2, "eval_samples": 8, "eval_batch": 8}


def measurement(fid: float, **more: float) -> dict[str, Any]:
    figures = {"fid": fid, "fid_se": 0.5, "inception_score": 2.0, "inception_score_se": 0.1}
    held_out = {"mse": 0.2, "lpips": 0.3, "entropy": 3.5, "cross_entropy": 4.0}
    return figures | {"precision": 0.9, "recall": 0.7, "cfg": figures | {"fid": fid / 2}} | held_out | more


def record(seed: int, base: float, aligned: float, **more: Any) -> dict[str, Any]:
    kept = {"base": measurement(base), "aligned": measurement(aligned), "evaluations": {}, "seed": seed}
    return (
        kept | {"commit": "c", "versions": {}, "device": "d", "seconds": {}, "step_seconds": 0.5, "steps": 100} | more
    )


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[AlignConfig]:
    """Configurations of the runs that were done, which leave a run.json and no more."""
    configs: list[AlignConfig] = []

    def align(config: AlignConfig, base: dict[str, Any] | None) -> None:
        configs.append(config)
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
        config.output_dir.mkdir(parents=True, exist_ok=True)
        fid = 20.0 + config.seed - 5 * (config.control is None) - len(config.method)
        text = json.dumps(record(config.seed, 25.0 + config.seed, fid) | {"config": plain})
        (config.output_dir / "run.json").write_text(text)

    monkeypatch.setattr(run, "align", align)

    def measured(self: Runs, temperatures: Iterable[float], *_: Any) -> dict[float, Any]:
        return {each: measurement(30 - each) for each in temperatures}

    monkeypatch.setattr(Runs, "measured_at", measured)
    return configs


@pytest.mark.parametrize("table", ablation.TABLES)
def test_rows_are_runs_that_can_be_done(table: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path, {})
    rows = ablation.rows_of(table, runs.config(0, {}))
    configs = [runs.config(0, changes) for changes in rows.values()]
    assert len({str(dataclasses.replace(config, output_dir=tmp_path)) for config in configs}) == len(rows)
    assert sum(config.control == "random" for config in configs) == {"steps": 3, "recipe": 3}.get(table, 1)
    assert all(config.model == "tiny" for config in configs)


def test_what_is_finished_is_not_repeated(done: list[AlignConfig], tmp_path: Path) -> None:
    runs = Runs(tmp_path, {"steps": 25})
    made = ablation.make("controls", runs, [0, 1], (0.9, 1.0))
    assert [(config.seed, config.control, config.method) for config in done] == [
        (seed, *row)
        for seed in (0, 1)
        for row in ((None, "vapi"), ("random", "vapi"), ("shuffled", "vapi"), (None, "ntp"))
    ]
    assert all(config.steps == 25 and not config.resume for config in done)
    assert [each["seed"] for each in made[PRIOR]] == [0, 1]
    assert json.loads((tmp_path / "controls.json").read_text()) == made

    done.clear()
    assert ablation.make("controls", runs, [0, 1], (0.9, 1.0)) == made
    assert done == []
    reward = ablation.make("reward", runs, [0], (1.0,))  # three rows of it are there
    assert [config.method for config in done] == ["vapi", "vapi", "ste"]
    assert reward[SHUFFLED] == made[SHUFFLED][:1]

    done.clear()
    folder = next(path for path in tmp_path.iterdir() if path.name == "control-random_seed-1")
    (folder / "run.json").unlink()
    (folder / "snapshots" / "step-000020").mkdir(parents=True)
    ablation.make("controls", runs, [0, 1], (0.9, 1.0))
    assert [(config.seed, config.control, config.resume) for config in done] == [(1, "random", True)]

    with pytest.raises(
        ablation.ConfigError, match=r"unchanged_seed-0 was made with --steps 25, not 50: choose another"
    ):
        ablation.make("controls", Runs(tmp_path, {"steps": 50}), [0], (1.0,))


def test_rows_with_the_preset_s_own_values_are_the_unchanged_run(done: list[AlignConfig], tmp_path: Path) -> None:
    runs = Runs(tmp_path, {})
    for table, row in (("prior", "CE, β 0.1"), ("noise", "ξ 0"), ("group", "G 8"), ("reward", VAPI)):
        runs.finished(0, ablation.rows_of(table, runs.config(0, {}))[row])
    assert [config.output_dir.name for config in done] == ["unchanged_seed-0"]


def test_the_base_s_temperature_is_chosen_on_another_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With and without guidance by itself; the figures are those of the table's seeds."""
    fids = {0.8: (12.0, 9.0), 0.9: (10.0, 9.5), 1.0: (15.0, 10.0)}
    asked = []

    def measured_at(self: Runs, temperatures: Any, seed: int, changes: Any, scale: float) -> dict[float, Any]:
        assert changes is None
        assert scale == 1.5
        asked.append((seed, list(temperatures)))
        found = {each: measurement(fids[each][0] + seed) for each in temperatures}
        for each in found:
            found[each]["cfg"] = found[each]["cfg"] | {"fid": fids[each][1] + seed}
        return found

    monkeypatch.setattr(Runs, "measured_at", measured_at)
    best = Runs(tmp_path, {}).best(tuple(fids), [3, 4])
    assert asked == [(ablation.TUNING_SEED, [0.8, 0.9, 1.0]), *((seed, [t]) for seed in (3, 4) for t in (0.9, 0.8))]
    assert [(each["aligned"]["fid"], each["aligned"]["cfg"]["fid"]) for each in best] == [(13, 12), (14, 13)]
    text = ablation.table({VAPI: [record(3, 15, 9), record(4, 15, 10)], TEMPERATURE: best})
    line = text.splitlines()[-1]
    assert line.startswith("| base at its best temperature (0.9, with CFG 0.8) | 13.50 ± 0.50 | ")
    assert " | 12.50 ± 0.50 | " in line


def test_a_table_has_means_and_standard_errors() -> None:
    rows = {VAPI: [record(seed, 15, fid) for seed, fid in enumerate((9.0, 10.0, 11.5))]}
    rows["alone"] = [record(0, 15, 8, step_seconds=None)]
    header, _, base, vapi, alone = ablation.table(rows).splitlines()
    assert header == (
        "| | FID↓ | IS↑ | precision | recall | reward | FID, CFG | IS, CFG | entropy | held-out CE | alignment, s |"
    )
    rest = "2.00 ± 0.00 | 0.900 | 0.700 | -0.5000 ± 0.0000"
    assert base == f"| base | 15.00 ± 0.00 | {rest} | 7.50 ± 0.00 | 2.00 ± 0.00 | 3.500 | 4.000 |  |"
    assert vapi == f"| {VAPI} | 10.17 ± 0.73 | {rest} | 5.08 ± 0.36 | 2.00 ± 0.00 | 3.500 | 4.000 | 50 |"
    assert alone.startswith("| alone | 8.00 ± 0.50 | 2.00 ± 0.10 | ")  # of its one sample set
    assert alone.endswith(" | 4.000 |  |")
    assert " | 0.700 | -0.5000 | " in alone


def judged(plain: float, guided: float) -> dict[str, Any]:
    """A measurement with GenEval, of one task."""

    def geneval(overall: float) -> dict[str, Any]:
        return {"tasks": {"two_object": {"score": overall, "se": 0.02}}, "overall": overall, "overall_se": 0.03}

    found = measurement(10.0)
    return found | {"geneval": geneval(plain), "cfg": found["cfg"] | {"geneval": geneval(guided)}}


def test_captions_are_judged_and_the_base_is_guided_as_is_best_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measured_at(self: Runs, temperatures: Any, seed: int, changes: Any, scale: float) -> dict[float, Any]:
        guided = 0.9 - abs(scale - 3) / 10
        return {each: judged(each / 2, guided - abs(each - 0.9)) for each in temperatures}

    monkeypatch.setattr(Runs, "measured_at", measured_at)
    best = Runs(tmp_path, {}).best((0.8, 0.9, 1.0), [0, 1], cfg_scales=(1.5, 3.0, 5.0))
    assert {key: best[0][key] for key in ("temperature", "cfg_temperature", "cfg_scale")} == {
        **{"temperature": 1.0, "cfg_temperature": 0.9, "cfg_scale": 3.0}
    }
    assert best[0]["aligned"]["geneval"]["overall"] == 0.5
    assert best[0]["aligned"]["cfg"]["geneval"]["overall"] == pytest.approx(0.9)
    runs = [
        record(seed, 0, 0) | {"base": judged(0.3, 0.4), "aligned": judged(0.35 + seed / 10, 0.5)} for seed in (0, 1)
    ]
    rows = {VAPI: runs, TEMPERATURE: best}
    header, _, base, vapi, tuned = ablation.table(rows).splitlines()
    assert "| IS↑ | GenEval↑ | precision |" in header
    assert "| IS, CFG | GenEval, CFG | entropy |" in header
    assert "| 0.300 ± 0.000 | 0.900 |" in base
    assert "| 0.400 ± 0.050 | 0.900 |" in vapi
    assert tuned.startswith(f"| {TEMPERATURE} (1, with CFG 0.9 at scale 3) |")
    tasks = ablation.tasks(rows).splitlines()
    assert tasks[0] == "| GenEval, CFG | two object | overall |"
    assert tasks[3] == f"| {VAPI} | 0.500 ± 0.000 | 0.500 ± 0.000 |"
    assert ablation.tasks(rows) in ablation.report("noise", rows)
    one = ablation.tasks({VAPI: runs[:1]}).splitlines()[3]
    assert one == f"| {VAPI} | 0.500 ± 0.020 | 0.500 ± 0.030 |"  # of its prompts
    text = ablation.difference({VAPI: runs, RANDOM: runs}, VAPI, RANDOM)
    assert text.splitlines()[0].endswith("| GenEval | FID, CFG | IS, CFG | GenEval, CFG |")


def test_without_guidance_a_table_has_no_column_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def plain(fid: float) -> dict[str, Any]:
        return {key: value for key, value in measurement(fid).items() if key != "cfg"}

    def measured_at(self: Runs, temperatures: Iterable[float], *_: Any) -> dict[float, dict[str, Any]]:
        return {each: plain(10 + each) for each in temperatures}

    monkeypatch.setattr(Runs, "measured_at", measured_at)
    best = Runs(tmp_path, {}).best((0.8, 0.9), [0, 1])
    assert best[0] == {"seed": 0, "aligned": plain(10.8), "temperature": 0.8}
    runs = [record(seed, 0, 0) | {"base": plain(15.0), "aligned": plain(9.0 + seed)} for seed in (0, 1)]
    rows = {VAPI: runs, RANDOM: runs, TEMPERATURE: best}
    text = ablation.report("controls", rows)
    assert "CFG" not in text
    assert f"\n| {TEMPERATURE} (0.8) | 10.80 ± 0.00 | " in text


def test_differences_are_paired_by_seed() -> None:
    """−1, −1.5 and −0.5: −1 ± 0.289, which is −3.5 of its standard errors."""
    rows = {
        VAPI: [record(seed, 15, fid) for seed, fid in ((0, 9.0), (1, 10.0), (2, 11.5), (7, 99.0))],
        RANDOM: [record(seed, 15, fid) for seed, fid in ((1, 11.5), (0, 10.0), (2, 12.0))],
    }
    header, _, difference, errors = ablation.difference(rows, VAPI, RANDOM).splitlines()
    assert header.startswith(
        f"| {VAPI} − {RANDOM}, 3 seeds | FID | IS | precision | recall | reward | MSE | LPIPS | FID,"
    )
    assert difference.startswith("| difference | -1.000 ± 0.289 | +0.000 ± 0.000 | ")
    assert "| -0.500 ± 0.144 |" in difference  # guided
    assert errors.startswith("| in standard errors | -3.5 |  | ")
    assert ablation.report("controls", rows).endswith(errors)
    alone = ablation.difference(
        {name: each[:1] for name, each in rows.items()} | {RANDOM: rows[RANDOM][1:2]}, VAPI, RANDOM
    )
    assert alone.splitlines()[2].startswith("| difference | -1.000 | ")


def test_curves_join_the_runs_of_few_and_many_steps() -> None:
    between = {"25": measurement(11.0), "50": measurement(10.0, mse=0.1)}
    rows = {
        "lr 2e-05": [record(seed, 16 + seed, 9, evaluations=between, steps=200) for seed in (0, 2)],
        f"lr 2e-05{ablation.AFTER}10": [record(seed, 16 + seed, 13 + seed, steps=10) for seed in (0, 2)],
        TEMPERATURE: [{"seed": 0, "aligned": measurement(14.0), "temperature": 0.9, "cfg_temperature": 1.0}],
    }
    fid, _, line, temperature, _, reward, _, rewards, _ = ablation.report("steps", rows).splitlines()
    assert fid == "| FID after steps | 0 | 10 | 25 | 50 | 200 |"
    means = "17.00 ± 1.00 | 14.00 ± 1.00 | 11.00 ± 0.00 | 10.00 ± 0.00 | 9.00 ± 0.00"
    assert line == f"| lr 2e-05 | {means} |"
    assert temperature == f"| {TEMPERATURE} | 14.00 ± 0.50 |  |  |  |  |"
    assert reward == fid.replace("FID", "reward")
    assert "| -0.5000 ± 0.0000 | -0.4000 ± 0.0000 | -0.5000 ± 0.0000 |" in rewards


@pytest.mark.usefixtures("image_sets")
def test_a_run_and_the_base_s_temperatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small and in earnest: at temperature 1 the base is what a run measures before its first step."""
    runs = Runs(tmp_path, SMALL)
    own = run.align(runs.config(0, {}, output_dir=tmp_path / "own"))["base"]
    kept = runs.finished(0, {"control": "random"})
    assert json.loads((tmp_path / "control-random_seed-0" / "run.json").read_text())["config"]["control"] == "random"
    found = runs.measured_at((1.0, 0.5), 0)
    assert json.loads(json.dumps(found[1.0])) == kept["base"] == own
    assert found[0.5]["reward"] > found[1.0]["reward"]
    aligned = runs.measured_at((1.0, 0.5), 0, {"control": "random"})
    assert aligned[1.0] == kept["aligned"]
    assert aligned[0.5]["reward"] not in (found[0.5]["reward"], kept["aligned"]["reward"])
    noisy = runs.finished(0, {"noise_prob": 0.9})["base"]
    assert noisy == run.align(runs.config(0, {"noise_prob": 0.9}, output_dir=tmp_path / "noisy"))["base"]
    assert noisy["fid"] == own["fid"]
    assert noisy["reward"] != own["reward"]  # its rollouts are others
    for owner, name in ((Evaluator, "measure"), (models, "load_models")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("it is known"))
    assert runs.measured_at((0.5, 1.0), 0) == found
    assert json.dumps(runs.measured_at((0.5, 1.0), 0, {"control": "random"})[0.5]) == json.dumps(aligned[0.5])
    with pytest.raises(ablation.ConfigError, match=r"temperatures_seed-0\.json was made with --eval-samples 8, not 9"):
        Runs(tmp_path, SMALL | {"eval_samples": 9}).measured_at((1.0,), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0", "1000"], "--seeds 1000 is the one that temperatures are chosen on: leave it out"),
        (["--no-eval"], "--no-eval does not go with a table: leave it out"),
        (["--seed", "3"], "--seed does not go with a table: leave it out"),
        (["--lr", "-1"], "--lr must be at least 0"),
    ],
)
def test_what_makes_no_table(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_prints_its_table(
    done: list[AlignConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--table", "controls", "--seeds", "0", "1", "--output-dir", str(tmp_path), "--lr", "1e-5", "--steps", "7"]
    assert ablation.main(line) == 0
    printed = capsys.readouterr().out
    assert {(config.lr, config.steps) for config in done} == {(1e-5, 7)}
    for text in (
        f"| {RANDOM} | ",
        f"| {TEMPERATURE} (1, with CFG 1) | ",
        f"{VAPI} − {PRIOR}, 2 seeds",
        "standard errors",
    ):
        assert text in printed
