"""Ratios over commits, as one HTML page with a drawing for each benchmark and kind of device.

    pytest benchmarks/ --benchmark-only --benchmark-json benchmarks/results/NAME.json
    python benchmarks/history.py [FOLDER] [--output FILE]

FOLDER (benchmarks/results) holds such files, and those that `gpu_check.sh` writes, under any name. They are drawn in
the order of their commits, and of one commit in that of their measurements.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from baseline import FILE, Baseline, BaselineError
from summary import rows_of, short_commit

RESULTS = Path(__file__).with_name("results")
WIDTH, HEIGHT, MARGIN = 260, 80, 10  # of a drawing, in pixels

STYLE = """
:root { color-scheme: light dark; --line: #2a6fdb; --accepted: #b45309; --faint: #8888; }
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem; }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { font-size: 13px; } small { color: GrayText; }
svg { display: block; border-bottom: 1px solid var(--faint); }
polyline { fill: none; stroke: var(--line); stroke-width: 2; } circle { fill: var(--line); }
line { stroke: var(--accepted); stroke-dasharray: 4 3; }
"""


class HistoryError(ValueError):
    """There is nothing to draw, or a file is of neither kind."""


class Point(NamedTuple):
    """One benchmark's ratio in one run."""

    committed: datetime  # or measured, where that is not known
    measured: datetime
    commit: str
    kind: str  # of device
    name: str
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
            measured, committed = record["started"], record.get("commit_time")
            commit = short_commit(record)
            rows = rows_of(record["parts"]) + alignment(record)
        run = moment(committed or measured), moment(measured), commit
        return [
            Point(*run, row["kind"], row["name"], positive(row["ratio"]))
            for row in rows
            if row.get("ratio") is not None
        ]
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


def drawing(points: Sequence[Point], accepted: float | None) -> str:
    """One benchmark's ratios, oldest first, from zero up; a dashed line where the accepted one is."""
    top = 1.1 * max([point.ratio for point in points] + [accepted or 0])
    step = (WIDTH - 2 * MARGIN) / max(len(points) - 1, 1)

    def height(ratio: float) -> float:
        return HEIGHT - HEIGHT * ratio / top

    places = [(MARGIN + step * index, height(point.ratio)) for index, point in enumerate(points)]
    parts = [f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">']
    if accepted:
        parts.append(f'<line x1="0" x2="{WIDTH}" y1="{height(accepted):.1f}" y2="{height(accepted):.1f}"/>')
    parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    for (x, y), point in zip(places, points, strict=True):
        title = html.escape(f"{point.commit}, {point.measured:%Y-%m-%d}: {point.ratio:.2f}×")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{title}</title></circle>')
    return "".join([*parts, "</svg>"])


def page(points: Sequence[Point], baseline: Baseline) -> str:
    """The report: a section for each kind of device, in it a drawing for each benchmark."""
    series: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in sorted(points):
        series[point.kind][point.name].append(point)
    parts = [
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>vapi-fast: ratios over commits</title>',
        f"<style>{STYLE}</style><h1>vapi-fast: how many times as fast as the reference</h1>",
        "<p>One point a run, oldest commit first; the dashed line is the accepted ratio of baseline.json.</p>",
    ]
    for kind, by_name in sorted(series.items()):
        parts.append(f"<h2>{html.escape(kind)}</h2><section>")
        for name, run in sorted(by_name.items()):
            row = baseline.accepted(kind, name)
            accepted = row["ratio"] if row else None
            latest = f"{run[-1].ratio:.2f}×" + (f", accepted {accepted:.2f}×" if accepted else "")
            commits = run[0].commit if len(run) == 1 else f"{run[0].commit} … {run[-1].commit}"
            caption = f"<b>{html.escape(name)}</b> {latest}<br><small>{html.escape(commits)}</small>"
            parts.append(f"<figure><figcaption>{caption}</figcaption>{drawing(run, accepted)}</figure>")
        parts.append("</section>")
    return "\n".join([*parts, "</html>\n"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw ratios over commits as an HTML page.")
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="JSON files (default: results/ here)")
    parser.add_argument("--output", type=Path, help="the page (default: FOLDER/history.html)")
    parser.add_argument("--baseline", type=Path, default=FILE, help="file of the accepted ratios")
    options = parser.parse_args(arguments)
    try:
        points = [point for path in sorted(options.folder.glob("*.json")) for point in points_of(path)]
        if not points:
            raise HistoryError(
                f"{options.folder} holds no ratios: run pytest benchmarks/ --benchmark-only --benchmark-json "
                f"{options.folder}/NAME.json"
            )
        text = page(points, Baseline(options.baseline))
    except (HistoryError, BaselineError) as error:
        print(f"history.py: error: {error}", file=sys.stderr)
        return 1
    output = options.output or options.folder / "history.html"
    output.write_text(text, encoding="utf-8")
    runs = len({(point.measured, point.commit) for point in points})
    print(f"{output}: {len(points)} ratios of {runs} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
