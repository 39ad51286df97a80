"""Fill README.md's first table with what a GPU has measured.

    python benchmarks/readme.py benchmarks/results/NAME.json [--readme FILE]

NAME.json is a `gpu_check.json`. A row is known by its first cell; its device and our figure, and for the step the
published recipe's and the ratio, are put in place of what is there. What was not measured stays.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from summary import short_commit

README = Path(__file__).resolve().parents[1] / "README.md"
# A row's first cell, the figure of the headline that it shows, and how; behind the step's come the published recipe's.
ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "LlamaGen-XXL, 384², 128 images × 8, a step": ("step_seconds", "{:.2f} s".format),
    "the same, 100 steps": ("run_seconds", lambda seconds: f"{round(seconds) // 60} min {round(seconds) % 60} s"),
    "its peak memory": ("peak_memory", lambda size: f"{size / 1e9:.1f} GB"),
    "sampling from LlamaGen-XXL at 384²": ("images_per_second_sampled", "{:.1f} images/s".format),
}


class ReadmeError(ValueError):
    """The file has no figures for the table, or the table lacks a row."""


def filled(text: str, record: dict[str, Any]) -> str:
    """README.md's text with the record's figures. Raises ReadmeError."""
    headline = record["headline"]
    if record["cpu"] or not headline.keys() & {figure for figure, _ in ROWS.values()}:
        raise ReadmeError("it has no figures of a GPU: run bash benchmarks/gpu_check.sh DIR on one")
    device = record["device"]
    where = f"{device['name']}, torch {device['torch']}, triton {device['triton']}, {short_commit(record)}"
    lines = text.splitlines(keepends=True)
    for name, (figure, form) in ROWS.items():
        found = [index for index, line in enumerate(lines) if line.startswith(f"| {name} | ")]
        if len(found) != 1:
            raise ReadmeError(f"README.md has {len(found)} rows that begin with {name!r}, there must be one")
        if figure in headline:
            cells = [cell.strip() for cell in lines[found[0]].strip().strip("|").split("|")]
            cells[1:3] = where, form(headline[figure])
            if figure == "step_seconds" and {"ratio", "published_step_seconds"} <= headline.keys():
                published = f"published recipe, there: {headline['published_step_seconds']:.1f} s"
                cells[3:] = published, f"**{headline['ratio']:.1f}×**"
            lines[found[0]] = "".join(f"| {cell} ".replace("  ", " ") for cell in cells) + "|\n"
    return "".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fill README.md's first table with what a GPU has measured.")
    parser.add_argument("results", type=Path, help="a gpu_check.json, kept in benchmarks/results/")
    parser.add_argument("--readme", type=Path, default=README, help="the page (default: README.md of this checkout)")
    options = parser.parse_args(arguments)
    try:
        text = filled(options.readme.read_text(encoding="utf-8"), json.loads(options.results.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, ReadmeError | OSError) else f"no gpu_check.json ({error!r})"
        print(f"readme.py: error: {options.results}: {reason}", file=sys.stderr)
        return 1
    temporary = options.readme.with_suffix(".md.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, options.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
