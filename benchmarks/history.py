"""Ratios over commits, as one HTML page with a drawing for each benchmark and kind of device.

    pytest benchmarks/ --benchmark-only --benchmark-json benchmarks/results/NAME.json
    python benchmarks/history.py [FOLDER] [--output FILE]

FOLDER (benchmarks/results) holds such files, and those that `gpu_check.sh` writes, under any name. They are drawn in
the order of their commits, and of one commit in that of their measurements. pytest-benchmark's own history is of times.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from baseline import FILE, Baseline, BaselineError
from matplotlib.figure import Figure
from summary import rows_of, short_commit

RESULTS = Path(__file__).with_name("results")
COLUMNS = 4


class HistoryError(ValueError):
    """There is nothing to draw, or a file is of neither kind."""


class Point(NamedTuple):
    """One benchmark's ratio in one run."""

    kind: str  # of device
    name: str
    committed: datetime  # or measured, where that is not known
    measured: datetime
    commit: str
    ratio: float


def points_of(path: Path) -> list[Point]:
    """The ratios in a file of pytest-benchmark or of `gpu_check.sh`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "benchmarks" in record:
            info, measured = record["commit_info"], record["datetime"]
            commit, committed = info["id"][:9] + "-dirty" * info["dirty"], info.get("time")
            rows = [each["extra_info"] for each in record["benchmarks"]]
        else:
            measured, committed, commit = record["started"], record.get("commit_time"), short_commit(record)
            rows = rows_of(record["parts"]) + alignment(record)
        run = moment(committed or measured), moment(measured), commit
        rows = [row for row in rows if row.get("ratio") is not None]
        return [Point(row["kind"], row["name"], *run, positive(row["ratio"])) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HistoryError(
            f"{path} is neither pytest-benchmark's JSON nor gpu_check's ({type(error).__name__}: {error}): take it out"
        ) from error


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(timezone.utc)


def positive(ratio: Any) -> float:
    if type(ratio) not in (int, float) or not 0 < ratio < math.inf:
        raise ValueError(f"a ratio of {ratio!r}")
    return ratio


def alignment(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The alignment beside the published recipe, as a row."""
    figures = record["parts"].get("align_both", {}).get("figures") or {}
    if not {"speedup_over_reference", "config"} <= figures.keys():  # else it was ended before there was a ratio
        return []
    kind, model = record["device"].get("name", "cpu"), figures["config"]["model"]
    return [{"kind": kind, "name": f"alignment of {model}", "ratio": figures["speedup_over_reference"]}]


def drawing(points: Sequence[Point], baseline: Baseline) -> Figure:
    """Ratios of each benchmark, oldest commit first, from zero up; a dashed line where the accepted one is."""
    series = [list(run) for _, run in itertools.groupby(sorted(points), key=lambda point: point[:2])]
    rows = math.ceil(len(series) / COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 2.2 * rows), layout="constrained")
    for place, run in enumerate(series, 1):
        axes, row = figure.add_subplot(rows, COLUMNS, place), baseline.accepted(*run[0][:2])
        axes.plot([point.ratio for point in run], marker="o")
        latest = f"{run[-1].ratio:.2f}×"
        if row and row["ratio"]:
            axes.axhline(row["ratio"], linestyle="--", color="tab:orange")
            latest += f", accepted {row['ratio']:.2f}×"
        axes.set_title(f"{run[0].name} {latest}\n{run[0].kind}", fontsize=8, parse_math=False)
        axes.set_xticks(range(len(run)), [point.commit for point in run], fontsize=6)
        axes.set_ylim(bottom=0)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw ratios over commits as an HTML page.")
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="JSON files (default: results/ here)")
    parser.add_argument("--output", type=Path, help="the page (default: FOLDER/history.html)")
    parser.add_argument("--baseline", type=Path, default=FILE, help="file of the accepted ratios")
    options = parser.parse_args(arguments)
    try:
        points = [point for path in sorted(options.folder.glob("*.json")) for point in points_of(path)]
        if not points:
            command = f"pytest benchmarks/ --benchmark-only --benchmark-json {options.folder}/NAME.json"
            raise HistoryError(f"{options.folder} holds no ratios: run {command}")
        figure, svg = drawing(points, Baseline(options.baseline)), io.StringIO()
    except (HistoryError, BaselineError) as error:
        print(f"history.py: error: {error}", file=sys.stderr)
        return 1
    figure.savefig(svg, format="svg")
    output = options.output or options.folder / "history.html"
    head = '<!DOCTYPE html><meta charset="utf-8"><title>vapi-fast: ratios over commits</title>\n'
    output.write_text(head + svg.getvalue(), encoding="utf-8")
    print(f"{output}: {len(points)} ratios of {len({point[2:5] for point in points})} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
