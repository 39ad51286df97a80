"""The benchmark suite watches speed and exactness: races, accepted figures, their file, and the page over commits."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timing
from baseline import Baseline, BaselineError, comparison, problems, processor, setup
from operations import STEMS, every_operation
from race import AGAIN, FEWEST_ROUNDS, Contestant, Race
from summary import ratios

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def row(**changes: Any) -> dict[str, Any]:
    """A measured row: twice as fast as the published form."""
    made = {
        "name": "mse forward",
        "kind": "cpu",
        "reference": "published",
        "accepted": {},
        "ratio": 2.0,
        "ratio_quartiles": [1.9, 2.1],
        "yardstick": None,
        "yardstick_quartiles": None,
        "rounds": 60,
        "first": {"ratio": 1.95, "yardstick": 10.1},
        "floor": None,
        "seconds": {"vapi_fast": 1e-3, "published": 2e-3, "F.mse_loss": 3e-3},
        "error": 2e-7,
        "bound": 1e-5,
        "disagreement": 0.0,
        "disagreement_bound": 0.0,
        "failure": None,
    }
    return made | changes


def kept(**changes: Any) -> dict[str, Any]:
    """The accepted row of it."""
    seconds = {"vapi_fast": 1e-3, "published": 2e-3}
    made = {"ratio": 2.0, "reference": "published", "yardstick": None, "error": 2e-7, "disagreement": 0.0}
    return made | {"seconds": seconds, "date": "2025-11-24", "with": "torch 2.11, Xeon"} | changes


class PytestBenchmark:
    """What a race needs of pytest-benchmark's fixture."""

    disabled = False

    def pedantic(self, call: Callable[[Any], object], setup: Callable[[], Any], rounds: int) -> None:
        data = []
        for _ in range(rounds):
            arguments, _ = setup()
            start = timing.clock()
            call(*arguments)
            data.append(timing.clock() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


def test_a_race_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    now = [0.0]
    monkeypatch.setattr(timing, "clock", lambda: now[0])

    def contestant(name: str, seconds: float) -> Callable[[int], None]:
        def call(inputs: int) -> None:
            calls.append((name, inputs))
            now[0] += seconds

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
    assert race.ratio("slow").median == pytest.approx(2)
    assert race.ratio("slower").median == pytest.approx(4)
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
    assert race.contestants["other"].warm_up_seconds > 0  # a compilation that fails takes its time too
    ours = Race(fails, {}, iter(range(100)))
    with pytest.raises(MemoryError):
        ours.warm_up()


NO_RIVAL = {"ratio": None, "seconds": {"vapi_fast": 1e-3}, "failure": "published: MemoryError: 64 GB"}


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({}, None),
        ({"ratio": 1.71, "error": 7.9e-7}, None),
        ({"ratio": 9.0, "error": 0.0}, None),
        (
            {"ratio": 1.5},
            "mse forward on cpu is slower: 1.50 × as fast as published, 25% below the accepted 2.00 × (at most 15% are "
            f"allowed). Now ({setup()}): vapi_fast 1 ms, published 2 ms, F.mse_loss 3 ms; accepted on 2025-11-24 "
            "(torch 2.11, Xeon): vapi_fast 1 ms, published 2 ms. Measured as the median ratio of 60 rounds taken in "
            "turns (quartiles 1.90 and 2.10), after 1.95 × in fewer rounds; --update-baseline accepts it",
        ),
        ({"ratio": 1.69}, "16% below the accepted"),
        (NO_RIVAL, "published could not be timed to compare with (published: MemoryError: 64 GB)"),
        ({"error": 1.1e-6}, "less exact: error 1.1e-06, bound 1.0e-06; accepted on 2025-11-24: 2.0e-07"),
        ({"error": float("nan")}, "less exact: error nan"),
        ({"disagreement": 1 / 512}, "less exact: disagreement 2.0e-03, bound 0.0e+00"),
    ],
)
def test_what_is_worse_than_accepted(measured: dict[str, Any], message: str | None) -> None:
    found = problems(row(**measured), kept())
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_what_both_sides_share_is_held_to_fixed_work() -> None:
    seconds = {"vapi_fast": 1e-3, "published": 2e-3, "yardstick": 1e-2}
    accepted = kept(yardstick=10.0, seconds=seconds)
    both = {"seconds": seconds, "yardstick_quartiles": [7.0, 8.0]}
    assert problems(row(yardstick=8.1, **both), accepted) == []
    (found,) = problems(row(yardstick=7.5, **both), accepted)
    assert "7.50 × as fast as yardstick, 25% below the accepted 10.00 × (at most 20% are allowed)" in found
    assert len(problems(row(yardstick=7.5, ratio=1.0, **both), accepted)) == 2


def test_the_error_has_a_bound_with_nothing_accepted_and_growth_is_watched() -> None:
    assert len(problems(row(error=2e-5), None)) == 1
    bounds = {"bound": 1e-2, "disagreement_bound": 1e-2}
    accepted = kept(error=4e-3, disagreement=1e-4)
    assert problems(row(error=5.9e-3, disagreement=9e-4, **bounds), accepted) == []
    assert "bound 6.0e-03" in problems(row(error=6.1e-3, **bounds), accepted)[0]  # of 16-bit numbers, less may grow
    assert "bound 1.0e-03" in problems(row(disagreement=1.1e-3, **bounds), accepted)[0]
    assert "bound 1.0e-02" in problems(row(error=1.1e-2, **bounds), kept(error=9e-3))[0]  # the test's own


def test_a_new_gpu_is_held_to_plain_pytorch_and_a_new_cpu_is_not() -> None:
    assert problems(row(ratio=0.1), None) == []
    assert problems(row(ratio=0.99, floor=0.98), None) == []
    (found,) = problems(row(ratio=0.9, floor=0.98), None)
    assert "is slower: 0.90 × as fast as published, and nothing is accepted yet" in found
    assert problems(row(ratio=0.9, floor=0.98), kept(ratio=0.9)) == []
    assert problems(row(ratio=0.9, floor=0.98), None, updating=True) == []


def test_nothing_replaces_a_ratio_whose_rival_fails() -> None:
    assert problems(row(ratio=0.1), kept(), updating=True) == []
    (found,) = problems(row(**NO_RIVAL), kept(), updating=True)
    assert "2.00 × published kept: its rival failed (published: MemoryError: 64 GB)" in found
    assert len(problems(row(error=2e-5), kept(), updating=True)) == 1


def test_accepted_rows_are_kept_beside_those_measured(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    baseline = Baseline(path)
    assert baseline.accepted("cpu", "mse forward") is None
    baseline.update([row(), row(name="rms_norm forward", ratio=None, seconds={"vapi_fast": 1.23456789e-3})])
    beside = Baseline(path)  # a run that began before the next one ended
    Baseline(path).update([row(ratio=3.0)])
    beside.update([row(kind="NVIDIA H100 80GB HBM3", ratio=9.87654321)])
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
    assert text == (
        "1 rows held to baseline.json by their error, 1 by a ratio; not in it: new (--update-baseline accepts them)"
    )


def written(**changes: Any) -> str:
    return json.dumps({"cpu": {"mse": kept(**changes)}})


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '{"cpu": {"mse": 3}}',
        '{"cpu": {"mse": {"ratio": 1}}}',
        written(error=math.inf),
        written(error=math.nan),
        written(ratio=math.inf),
        written(ratio=True),
        written(ratio=0.0),
        written(date=None),
        written(yardstick=3.0),  # without its time
        written(seconds={"vapi_fast": 1e-3}),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(BaselineError, match=r"baseline.json cannot be read \(.*--update-baseline"):
        Baseline(path)


def test_the_shipped_file_has_a_ratio_for_each_benchmark() -> None:
    """On one kind of device or another: what is new has been measured on few."""
    names = {f"{each.name} {passes}" for each in every_operation() for passes in each.passes}
    names.add("block forward+backward")
    kinds = Baseline(BENCHMARKS / "baseline.json").kinds
    assert set().union(*kinds.values()) >= names
    for kind, rows in kinds.items():
        drawn = ("xxl 384²", "janus-pro-1b 384²") if "NVIDIA" in kind else ("tiny", "tiny-janus")
        models = {"reward score", "alignment step", "alignment step tiny-text", *(f"generate {name}" for name in drawn)}
        assert set(rows) <= names | models
        assert all(row["ratio"] for row in rows.values())
        assert {name for name, row in rows.items() if row["yardstick"]} == models & set(rows)


def test_table_of_ratios() -> None:
    measured = row(accepted={"ratio": 2.1}, yardstick=0.123, yardstick_quartiles=[0.1, 0.2])
    measured["seconds"]["yardstick"] = 4e-3
    head, line, fixed, failed = ratios([measured, row(**NO_RIVAL)]).splitlines()
    assert head.split()[:2] == ["ms", "ms"]
    figures = ["1", "2", "published", "2×", "1.9–2.1", "2.1×", "60", "2.0e-07", "0.0e+00"]
    assert line.split() == ["mse", "forward", *figures]
    assert fixed.split()[:5] == ["1", "4", "yardstick", "0.123×", "0.1–0.2"]
    assert failed.split(maxsplit=3)[3] == "no ratio: published: MemoryError: 64 GB"


def benchmark(folder: Path, names: Sequence[str], *options: str, plugin: str = "") -> tuple[int, str]:
    """Exit code and output of the benchmarks of operations, in a process of its own that runs `plugin` first."""
    (folder / "meddling.py").write_text(plugin)
    variables = os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    stems = {each.name: stem for stem in STEMS for each in importlib.import_module(f"bench_{stem}").OPERATIONS}
    tests = [f"bench_{stems[name.rpartition(' ')[0]]}.py::test_operation[{name}]" for name in names]
    command = [sys.executable, "-m", "pytest", *tests, "-p", "no:cacheprovider", "-p", "meddling"]
    command += ["--baseline", str(folder / "baseline.json"), *options]
    ended = subprocess.run(command, cwd=BENCHMARKS, env=variables, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


SLOW = """
from vapi_fast import reference
mse = reference.mse
reference.mse = lambda a, b: [mse(a, b) for _ in range(5)][0]
"""
FAILING = """
import published
def mse(a, b):
    raise MemoryError("64 GB")
published.PUBLISHED["mse"] = mse
"""


def test_a_slow_operation_is_caught(tmp_path: Path) -> None:
    path, report, kind = tmp_path / "baseline.json", tmp_path / "new" / "report.json", processor()
    only = "--benchmark-only"
    code, output = benchmark(tmp_path, ["mse forward"], only, "--update-baseline", "--benchmark-json", str(report))
    assert code == 0, output
    assert f"1 rows of {kind} accepted in baseline.json" in output
    accepted = json.loads(path.read_text())[kind]["mse forward"]
    (measured,) = [each["extra_info"] for each in json.loads(report.read_text())["benchmarks"]]
    assert measured["ratio"] == pytest.approx(accepted["ratio"], rel=1e-3)

    code, output = benchmark(tmp_path, ["mse forward"], only, plugin=SLOW)
    assert code == 1, output
    found = re.search(r"mse forward on .* is slower: (\d+\.\d\d) × as fast as published, (\d+)% below the", output)
    assert found, output
    assert float(found[1]) < 0.5 * accepted["ratio"]
    assert 50 < int(found[2]) < 100
    assert f"{accepted['ratio']:.2f} × (at most 15% are allowed). Now (torch" in output
    assert "in fewer rounds" in output  # it was measured once more

    path.write_text(json.dumps({kind: {"mse forward": accepted | {"ratio": 0.5 * accepted["ratio"]}}}))
    code, output = benchmark(tmp_path, ["mse forward"], only)
    assert code == 0, output
    assert "1 rows held to baseline.json by their error, 1 by a ratio" in output

    before = path.read_text()
    code, output = benchmark(tmp_path, ["mse forward"], only, "--update-baseline", plugin=FAILING)
    assert code == 1, output
    assert "no ratio: published: MemoryError: 64 GB" in output
    assert "kept: its rival failed" in output
    assert path.read_text() == before


WRONG = """
from vapi_fast import ops, reference
mse, sample, append, loss = reference.mse, ops.group_sample, ops.append_to_cache, ops.policy_loss

def inexact(a, b):
    return 1.001 * mse(a, b) if a.ndim > b.ndim else mse(a, b) + 0.001 * (mse(a, b) - mse(a, b).detach())

def other_token(logits, group_size, **options):
    tokens, logprobs = sample(logits, group_size, **options)
    tokens.view(-1)[0] += 1
    return tokens, logprobs

def other_values(v_cache, **inputs):
    query = append(v_cache=v_cache, **inputs)
    v_cache.mul_(1.001)
    return query

reference.mse, ops.group_sample, ops.append_to_cache = inexact, other_token, other_values
ops.policy_loss = lambda **inputs: loss(**inputs)._replace(ratio=loss(**inputs).ratio + 0.001)
"""


def test_wrong_results_are_caught_even_where_nothing_is_timed(tmp_path: Path) -> None:
    """On a CPU the reference is our own path, so that its faults show only beside another form."""
    (tmp_path / "baseline.json").write_text("{}")
    figures = {
        "mse forward": "error 1.0e-03, bound 1.0e-05",
        "mse of pairs forward+backward": "error 1.0e-03, bound 1.0e-05",  # of the gradient
        "group_sample forward": "disagreement 2.0e-03, bound 0.0e+00",
        "append_to_cache forward": "error 1.0e-03, bound 1.0e-05",
        "policy_loss forward": "error 1.0e-03, bound 1.0e-05",
    }
    code, output = benchmark(tmp_path, [*figures, "swiglu forward"], "--benchmark-disable", plugin=WRONG)
    assert code == 1, output
    for name, figure in figures.items():
        assert f"{name} is less exact: {figure}" in output
    assert "5 failed, 1 skipped" in output


@pytest.mark.parametrize("options", [[], ["--update-baseline", "--baseline", "no/such/folder.json"]])
def test_a_missing_file_is_named_before_anything_is_measured(tmp_path: Path, options: list[str]) -> None:
    code, output = benchmark(tmp_path, ["mse forward"], "--benchmark-only", *options)
    assert code == 4, output
    assert "ERROR: --baseline: there is no " in output
