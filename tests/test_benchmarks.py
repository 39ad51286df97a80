"""The benchmark suite watches speed and exactness: races, accepted figures, their file, and the page over commits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import history
import pytest
from baseline import Baseline, BaselineError, comparison, problems
from race import AGAIN, FEWEST_ROUNDS, Contestant, Race
from summary import ratios

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def row(**changes: Any) -> dict[str, Any]:
    """A measured row: twice as fast as the published form."""
    made = {
        "name": "mse forward",
        "kind": "cpu",
        "reference": "published",
        "accepted": None,
        "ratio": 2.0,
        "ratio_quartiles": [1.9, 2.1],
        "rounds": 60,
        "first_ratio": 1.95,
        "seconds": {"vapi_fast": 1e-3, "published": 2e-3, "F.mse_loss": 3e-3},
        "error": 2e-7,
        "bound": 1e-5,
        "failure": None,
    }
    return made | changes


class PytestBenchmark:
    """What a race needs of pytest-benchmark's fixture."""

    disabled = False

    def pedantic(self, call: Callable[[Any], object], setup: Callable[[], Any], rounds: int) -> None:
        data = []
        for _ in range(rounds):
            arguments, _ = setup()
            start = time.perf_counter()
            call(*arguments)
            data.append(time.perf_counter() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


def test_a_race_takes_turns() -> None:
    calls: list[tuple[str, int]] = []

    def contestant(name: str, seconds: float) -> Callable[[int], None]:
        def call(inputs: int) -> None:
            calls.append((name, inputs))
            time.sleep(seconds)

        return call

    others = {"slow": Contestant(contestant("slow", 0.004)), "slower": Contestant(contestant("slower", 0.008))}
    race = Race(contestant("vapi_fast", 0.002), others, iter(range(10**6)))
    race.warm_up()
    calls.clear()
    race.run(PytestBenchmark(), seconds=0)
    names = ["vapi_fast", "slow", "slower"]
    turns = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert [[name for name, _ in turn] for turn in turns] == [
        names[first:] + names[:first] for first in (0, 1, 2, 0, 1)
    ]
    assert len({inputs for _, inputs in calls}) == len(calls)  # none is used twice
    assert race.ratio("slow").rounds == FEWEST_ROUNDS
    assert 1.3 < race.ratio("slow").median < race.ratio("slower").median < 6
    race.again()
    assert race.ratio("slow").rounds == AGAIN * FEWEST_ROUNDS
    assert race.ratio("absent") is None


def test_a_ratio_is_the_median_of_paired_rounds() -> None:
    race = Race(lambda inputs: None, {"other": Contestant(lambda inputs: None)}, iter(()))
    race.ours.seconds = [1.0, 10.0, 1.0, 1.0, 1.0]  # the machine was slow in the second round, for both
    race.contestants["other"].seconds = [2.0, 20.0, 2.2, 1.8, 2.0]
    assert race.ratio("other") == (2.0, 2.0, 2.0, 5)
    assert race.seconds() == {"vapi_fast": 1.0, "other": 2.0}


def test_a_rival_that_fails_leaves_the_race() -> None:
    def fails(inputs: int) -> None:
        raise MemoryError("64 GB\nand more")

    race = Race(lambda inputs: None, {"other": Contestant(fails)}, iter(range(100)))
    race.warm_up()
    race.run(PytestBenchmark(), seconds=0)
    assert race.ratio("other") is None
    assert race.contestants["other"].failure == "MemoryError: 64 GB"
    assert set(race.seconds()) == {"vapi_fast"}
    ours = Race(fails, {}, iter(range(100)))
    with pytest.raises(MemoryError):
        ours.warm_up()


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({}, None),
        ({"ratio": 1.71, "error": 7.9e-7}, None),
        ({"ratio": 9.0, "error": 0.0}, None),
        (
            {"ratio": 1.5},
            "mse forward on cpu is slower: 1.50 × as fast as published, 25% below the accepted 2.00 × (at most 15% are "
            "allowed). Now vapi_fast 1 ms, published 2 ms, F.mse_loss 3 ms; accepted on 2025-11-24 (torch 2.11, Xeon): "
            "vapi_fast 1 ms, published 2 ms. Measured as the median ratio of 60 rounds taken in turns (quartiles 1.90 "
            "and 2.10), after 1.95 × in fewer rounds; --update-baseline accepts it",
        ),
        ({"ratio": 1.69}, "16% below the accepted"),
        ({"ratio": None, "failure": "MemoryError: 64 GB"}, "published could not be timed to compare with (MemoryError"),
        ({"error": 1.1e-6}, "less exact: error 1.1e-06, bound 1.0e-06; accepted on 2025-11-24: 2.0e-07"),
        ({"error": float("nan")}, "less exact: error nan"),
    ],
)
def test_what_is_worse_than_accepted(measured: dict[str, Any], message: str | None) -> None:
    kept = {"ratio": 2.0, "error": 2e-7, "seconds": {"vapi_fast": 1e-3, "published": 2e-3}}
    found = problems(row(**measured), kept | {"date": "2025-11-24", "with": "torch 2.11, Xeon"})
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_the_error_has_a_bound_with_nothing_accepted_and_growth_is_watched() -> None:
    assert problems(row(ratio=0.1), None) == []
    assert len(problems(row(error=2e-5), None)) == 1
    accepted = {"ratio": 2.0, "error": 5e-3, "date": "", "with": "", "seconds": {}}
    assert problems(row(error=9e-3, bound=1e-2), accepted) == []
    assert "bound 1.0e-02" in problems(row(error=1.1e-2, bound=1e-2), accepted)[0]  # not four times 5e-3


def test_accepted_rows_are_kept_beside_those_measured(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    baseline = Baseline(path)
    assert baseline.accepted("cpu", "mse forward") is None
    baseline.update([row(), row(name="rms_norm forward", ratio=None, seconds={"vapi_fast": 1.23456789e-3})])
    baseline = Baseline(path)
    baseline.update([row(ratio=3.0), row(kind="NVIDIA H100 80GB HBM3", ratio=9.87654321)])
    read = Baseline(path)
    assert read.accepted("cpu", "mse forward")["ratio"] == 3.0
    assert read.accepted("cpu", "mse forward")["seconds"] == {"vapi_fast": 1e-3, "published": 2e-3}
    assert read.accepted("cpu", "rms_norm forward")["ratio"] is None
    assert read.accepted("cpu", "rms_norm forward")["seconds"] == {"vapi_fast": 1.235e-3}
    assert read.accepted("NVIDIA H100 80GB HBM3", "mse forward")["ratio"] == 9.877
    assert len(path.read_text().splitlines()) == 9  # a line a row
    assert list(tmp_path.iterdir()) == [path]


def test_what_rows_were_held_to(tmp_path: Path) -> None:
    baseline, rows = Baseline(tmp_path / "baseline.json"), [row(problems=[]), row(name="new", problems=["slower"])]
    assert comparison(rows, baseline, updating=True) == "1 rows of cpu accepted in baseline.json"
    assert comparison(rows, baseline, updating=False).startswith(
        "baseline.json has nothing for cpu: no ratio was compared"
    )
    baseline.update(rows[:1])
    text = comparison(rows, baseline, updating=False)
    assert text == "1 rows held to baseline.json; not in it: new (--update-baseline accepts them)"


@pytest.mark.parametrize("text", ["{", "[1]", '{"cpu": {"mse": {"ratio": 1}}}', '{"cpu": {"mse": 3}}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(BaselineError, match=r"baseline.json cannot be read \(.*--update-baseline"):
        Baseline(path)


def test_the_shipped_file_is_in_order() -> None:
    names = Baseline(BENCHMARKS / "baseline.json").kinds["cpu"]
    assert {"policy_loss forward+backward", "reward score", "alignment step"} <= set(names)
    assert names["alignment step"]["ratio"] > 1


def test_table_of_ratios() -> None:
    head, line, alone = ratios([row(accepted=2.1), row(ratio=None)]).splitlines()
    assert head.split()[:2] == ["ms", "ms"]
    assert line.split() == ["mse", "forward", "1", "2", "published", "2.00×", "1.90–2.10", "2.10×", "60", "2.0e-07"]
    assert alone.startswith("error alone: 1 rows")


def benchmark_mse(folder: Path, *options: str, plugin: str = "") -> tuple[int, str]:
    """Exit code and output of the benchmark of one operation, in a process of its own that runs `plugin` first."""
    (folder / "meddling.py").write_text(plugin)
    variables = os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "bench_ops.py::test_operation[mse forward]", "--benchmark-only"]
    command += ["-p", "no:cacheprovider", "-p", "meddling", "--baseline", str(folder / "baseline.json"), *options]
    ended = subprocess.run(command, cwd=BENCHMARKS, env=variables, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


SLOW = """
from vapi_fast import reference
mse = reference.mse
reference.mse = lambda a, b: [mse(a, b) for _ in range(5)][0]
"""
INEXACT = """
import torch
from vapi_fast import reference
mse = reference.mse
reference.mse = lambda a, b: mse(a.bfloat16().float() if a.dtype == torch.float32 else a, b)
"""


def test_a_slow_and_an_inexact_operation_are_caught(tmp_path: Path) -> None:
    path, report = tmp_path / "baseline.json", tmp_path / "report.json"
    code, output = benchmark_mse(tmp_path, "--update-baseline", "--benchmark-json", str(report))
    assert code == 0, output
    assert "1 rows of cpu accepted in baseline.json" in output
    accepted = json.loads(path.read_text())["cpu"]["mse forward"]
    (measured,) = [each["extra_info"] for each in json.loads(report.read_text())["benchmarks"]]
    assert measured["ratio"] == pytest.approx(accepted["ratio"], rel=1e-3)

    code, output = benchmark_mse(tmp_path, plugin=SLOW)
    assert code == 1, output
    found = re.search(r"mse forward on cpu is slower: (\d+\.\d\d) × as fast as published, (\d+)% below the", output)
    assert found, output
    assert float(found[1]) < 0.5 * accepted["ratio"]
    assert 50 < int(found[2]) < 100
    assert f"{accepted['ratio']:.2f} × (at most 15% are allowed). Now vapi_fast" in output
    assert "in fewer rounds" in output  # it was measured once more

    path.write_text(json.dumps({"cpu": {"mse forward": accepted | {"ratio": 0.5 * accepted["ratio"]}}}))
    code, output = benchmark_mse(tmp_path)
    assert code == 0, output
    assert "1 rows held to baseline.json" in output

    code, output = benchmark_mse(tmp_path, "--update-baseline", plugin=INEXACT)
    assert code == 1, output
    assert re.search(r"mse forward on cpu is less exact: error \d\.\de-0[345], bound 1.0e-05", output), output
    assert json.loads(path.read_text())["cpu"]["mse forward"]["ratio"] == 0.5 * accepted["ratio"]  # not accepted


def results(folder: Path) -> None:
    """A file of pytest-benchmark and a later one of gpu_check, from two devices."""
    info = [row(), row(name="rms_norm forward", ratio=None), row(name="step <b>", ratio=4.0), {}]
    first = {
        "commit_info": {"id": "a" * 40, "dirty": True},
        "datetime": "2025-11-24T01:00:00+00:00",
        "benchmarks": [{"extra_info": each} for each in info],
    }
    parts: dict[str, Any] = {"benchmarks": {"figures": [row(ratio=3.0), row(kind="NVIDIA H100", ratio=9.0)]}}
    parts["align_both"] = {"figures": {"speedup_over_reference": 12.3, "config": {"model": "xxl"}}}
    second = {"commit": "b" * 40, "started": "2025-11-25T01:00:00Z", "device": {"name": "NVIDIA H100"}, "parts": parts}
    (folder / "z.json").write_text(json.dumps(first))
    (folder / "a.json").write_text(json.dumps(second))


def test_history_is_drawn_in_order_of_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results(tmp_path)
    points = defaultdict(list)
    for point in (point for path in tmp_path.glob("*.json") for point in history.points_of(path)):
        points[point.kind, point.name].append(point.ratio)
    assert {name: sorted(each) for name, each in points.items()} == {
        ("cpu", "mse forward"): [2.0, 3.0],
        ("cpu", "step <b>"): [4.0],
        ("NVIDIA H100", "mse forward"): [9.0],
        ("NVIDIA H100", "alignment of xxl"): [12.3],
    }
    Baseline(tmp_path / "accepted").update([row(ratio=2.5)])
    assert history.main([str(tmp_path), "--baseline", str(tmp_path / "accepted")]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/history.html: 5 ratios of 2 runs"
    page = (tmp_path / "history.html").read_text()
    drawn = page[page.index("<b>mse forward</b> 3.00×, accepted 2.50×") :]
    assert drawn.index("aaaaaaaaa-dirty … bbbbbbbbb") < drawn.index("<svg")
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', drawn)[:2]]
    assert heights == [round(80 - 80 * 2 / 3.3, 1), round(80 - 80 * 3 / 3.3, 1)]  # older first, larger higher
    assert f'y1="{80 - 80 * 2.5 / 3.3:.1f}"' in drawn
    assert "step &lt;b&gt;" in page
    assert page.index("NVIDIA H100") < page.index("<h2>cpu</h2>")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "holds no ratios: run pytest"), ("[]", "z.json is neither"), ("{", "z.json is neither")],
)
def test_what_cannot_be_drawn(
    tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "z.json").write_text(text)
    assert history.main([str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "history.html").exists()
