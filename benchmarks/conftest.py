from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import baseline
import pytest
import torch
from baseline import Baseline, BaselineError, Row
from cases import SMALL, XXL, Sizes
from pytest_benchmark.fixture import BenchmarkFixture
from race import FEWEST_ROUNDS, YARDSTICK, Race
from summary import ratios, table
from timing import clock, keep_freed_memory

from vapi_fast.runtime import ceilings

if TYPE_CHECKING:  # imported where they are used: operations are measured without the package `datasets`
    from vapi_fast import AlignConfig
    from vapi_fast.alignment.models import Models
    from vapi_fast.data.dataset import ImageBatch

ROWS = pytest.StashKey[list[Row]]()
BASELINE = pytest.StashKey[Baseline]()
# On a CPU: ratios then do not depend on the number of cores, and the thread's own time is that of all the work. What
# others leave of caches and memory, and of the clock, still shows.
THREADS = 1
CPU_CACHE = 32 << 20
BATCHES = 4


@dataclass
class Bench:
    """What the operations are measured on: XXL in bf16 on a GPU, small shapes in fp32 on a CPU."""

    device: torch.device
    sizes: Sizes
    dtype: torch.dtype
    ceilings: ceilings.Ceilings
    cache_bytes: int
    seconds: float  # of rounds, for one operation
    model_seconds: float  # the same for whole models
    compile_seconds: float  # left for torch.compile
    rows: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else baseline.processor()

    @property
    def floor(self) -> float | None:
        """Of a ratio with nothing accepted: a kernel is not slower than what it replaces."""
        return baseline.EQUAL if self.device.type == "cuda" else None


@dataclass
class Guard:
    """Measures one test's race and holds the figures to the accepted ones."""

    bench: Bench
    benchmark: BenchmarkFixture
    baseline: Baseline
    updating: bool

    def measure(
        self,
        name: str,
        race: Race,
        *,
        references: Sequence[str],
        error: float,
        bound: float,
        disagreement: float = 0.0,
        disagreement_bound: float = 0.0,
        seconds: float | None = None,
        fewest: int = FEWEST_ROUNDS,
        **about: Any,
    ) -> Row:
        """The figures, which go into `extra_info` as well; measured once more where a ratio is too low.

        Args:
            race: warmed up. references: the fastest one's time over ours is the ratio that is watched.
            error: ours, relative to exact results. disagreement: share of indices or tokens that differ from theirs.
            bound, disagreement_bound: of these, at most.
            seconds, fewest: of rounds, see `Race.run`; None: those for whole models. about: more for the row.
        """
        race.run(self.benchmark, seconds or self.bench.model_seconds, fewest)
        accepted = self.baseline.accepted(self.bench.name, name)
        about |= {"name": name, "kind": self.bench.name, "floor": self.bench.floor, "error": error, "bound": bound}
        about |= {"disagreement": disagreement, "disagreement_bound": disagreement_bound}
        about["accepted"] = {each: accepted[each] for each in ("ratio", "yardstick")} if accepted else {}
        if self.benchmark.disabled:
            if found := baseline.inexact(about, accepted):
                pytest.fail(f"{name} is less exact: {'; '.join(found)}", pytrace=False)
            pytest.skip("exact, but nothing was timed: --benchmark-disable, or tests side by side")
        row = about | figures(race, references)
        row["first"] = {each: row[each] for each in ("ratio", "yardstick")}
        if self.updating or baseline.slowdowns(row, accepted):
            race.again()
            row |= figures(race, references)
        self.benchmark.extra_info |= row
        return self.benchmark.extra_info

    def judge(self, row: Row) -> None:
        """Fail if the figures are worse than the accepted ones, or with --update-baseline accept them."""
        accepted = self.baseline.accepted(row["kind"], row["name"])
        row["problems"] = baseline.problems(row, accepted, self.updating)
        self.bench.rows.append(row)
        if row["problems"]:
            pytest.fail("\n".join(row["problems"]), pytrace=False)


class Step(NamedTuple):
    """A small alignment step's models, configuration and batches."""

    models: Models
    config: AlignConfig
    batches: list[ImageBatch]


def figures(race: Race, references: Sequence[str]) -> Row:
    """Times of all; the ratio to the fastest of `references` that did not fail, and to the yardstick."""
    seconds = race.seconds()
    reference = min((name for name in references if name in seconds), key=seconds.get, default=references[0])
    row: Row = {"seconds": seconds, "rounds": len(race.ours.seconds), "reference": reference}
    for figure, name in (("ratio", reference), ("yardstick", YARDSTICK)):
        ratio = race.ratio(name)
        row |= {figure: ratio and ratio.median, f"{figure}_quartiles": ratio and [ratio.low, ratio.high]}
    failures = [f"{name}: {each.failure}" for name, each in race.contestants.items() if each.failure is not None]
    return row | {"failure": "; ".join(failures) or None}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compile-seconds", type=float, default=600, help="time for torch.compile, after which rows go without it"
    )
    parser.addoption("--baseline", type=Path, default=baseline.FILE, help="file of the accepted ratios and errors")
    parser.addoption(
        "--update-baseline", action="store_true", help="accept what this run measures; other rows of the file stay"
    )


def pytest_configure(config: pytest.Config) -> None:
    path, report = config.getoption("baseline", baseline.FILE), config.getoption("benchmark_json", None)
    if not (path.parent.is_dir() if config.getoption("update_baseline", False) else path.is_file()):
        raise pytest.UsageError(
            f"--baseline: there is no {path}; --update-baseline writes one into a folder that exists"
        )
    try:
        config.stash[BASELINE] = Baseline(path)
    except BaselineError as error:
        raise pytest.UsageError(str(error)) from error
    if report:  # pytest-benchmark would miss it after everything was measured
        report.parent.mkdir(parents=True, exist_ok=True)
    config.stash[ROWS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every operation of a `bench_<stem>.py`, each of its passes."""
    if "operation" in metafunc.fixturenames:
        cases = [(each, passes) for each in metafunc.module.OPERATIONS for passes in each.passes]
        metafunc.parametrize(("operation", "passes"), cases, ids=[f"{each.name} {passes}" for each, passes in cases])


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    config = request.config
    rows = config.stash[ROWS]
    if not torch.cuda.is_available():
        torch.set_num_threads(THREADS)
        keep_freed_memory()
        cpu = torch.device("cpu")
        return Bench(cpu, SMALL, torch.float32, ceilings.measure(cpu), CPU_CACHE, 1.5, 40.0, 0, rows)
    device = torch.device("cuda", torch.cuda.current_device())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    limit = config.getoption("compile_seconds", 600.0)
    return Bench(device, XXL, torch.bfloat16, ceilings.measure(device), cache, 0.5, 8.0, limit, rows)


@pytest.fixture
def guard(request: pytest.FixtureRequest, bench: Bench, benchmark: BenchmarkFixture) -> Guard:
    torch.manual_seed(0)  # a test's inputs, and with them its error, whatever ran before
    config = request.config
    return Guard(bench, benchmark, config.stash[BASELINE], config.getoption("update_baseline", False))


@pytest.fixture(scope="module", params=["classes"])
def step(bench: Bench, request: pytest.FixtureRequest) -> Iterator[Step]:
    """Eight images × 8 rollouts: LlamaGen-XXL with random weights at 384² on a GPU, the tiny preset on a CPU.

    By captions four images of tiny-text, on a CPU alone.
    """
    pytest.importorskip("datasets", reason="vapi_fast.alignment.step needs it")
    from vapi_fast import AlignConfig
    from vapi_fast.alignment.data_sets import open_data
    from vapi_fast.alignment.models import load_models
    from vapi_fast.data.synthetic import SyntheticData
    from vapi_fast.models.families import generator_config

    gpu, captions = bench.device.type == "cuda", request.param == "captions"
    if gpu and captions:
        pytest.skip("on a GPU a step is LlamaGen-XXL's")
    made_up = {"random_init": gpu, "synthetic_data": gpu}
    images = 4 if captions else 8
    model = "xxl" if gpu else "tiny-text" if captions else "tiny"
    config = AlignConfig(model=model, batch_size=images, micro_batch=images, **made_up)
    if gpu:
        data = SyntheticData(config.image_size, 1000)
    else:
        data = open_data(config, generator_config(model).condition, bench.device)
    batches = list(data.batches(config.batch_size, BATCHES, seed=config.seed))
    precision = torch.get_float32_matmul_precision()
    if gpu:
        torch.set_float32_matmul_precision("high")  # TF32 where bf16 is not used, as in a run and as published
    batches = [batch.to(bench.device) for batch in batches]
    yield Step(load_models(config, bench.device), config, batches)
    torch.set_float32_matmul_precision(precision)
    gc.collect()
    torch.cuda.empty_cache()


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    good = [row for row in config.stash[ROWS] if not row["problems"]]
    if config.getoption("update_baseline", False) and good:
        config.stash[BASELINE].update(good)


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own, longer table
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    if any("operation" in row for row in rows):
        terminalreporter.section("operations")
        terminalreporter.write_line(table(rows))
    terminalreporter.section("ratios")
    terminalreporter.write_line(ratios(rows))
    updating = config.getoption("update_baseline", False)
    terminalreporter.write_line(baseline.comparison(rows, config.stash[BASELINE], updating))
