"""The ratios and errors that were accepted, by kind of device, and what a new measurement has against them."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from race import OURS

FILE = Path(__file__).with_name("baseline.json")
FALL = 0.15  # that a ratio may
GROWTH = 4.0  # that an error may; rounding differs between processors and versions of PyTorch
LEAST_ERROR = 1e-6  # of no account in float32

# A row of either kind has `ratio` (None where there is nothing to compare with), `error` and `seconds` by
# implementation; a measured one also `name`, `kind`, `reference`, `bound`, `rounds` and `ratio_quartiles`.
Row = dict[str, Any]


class BaselineError(ValueError):
    """The file of accepted figures cannot be used."""


class Baseline:
    """Accepted rows by kind of device and name; none where there is no file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kinds: dict[str, dict[str, Row]] = {}
        if path.exists():
            self.kinds = read(path)

    def accepted(self, kind: str, name: str) -> Row | None:
        return self.kinds.get(kind, {}).get(name)

    def update(self, rows: Sequence[Row]) -> None:
        """Accept measured rows and write the file, atomically; the other rows stay."""
        for row in rows:
            kept = {key: row[key] for key in ("ratio", "error", "seconds")}
            kept["seconds"] = {
                name: kept["seconds"][name] for name in (OURS, row["reference"]) if name in row["seconds"]
            }
            kept |= {
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "with": f"torch {torch.__version__}, {processor()}",
            }
            self.kinds.setdefault(row["kind"], {})[row["name"]] = rounded(kept)
        temporary = self.path.with_suffix(".json.tmp")
        temporary.write_text(text(self.kinds), encoding="utf-8")
        os.replace(temporary, self.path)


def read(path: Path) -> dict[str, dict[str, Row]]:
    try:
        kinds = json.loads(path.read_text(encoding="utf-8"))
        for row in (row for rows in kinds.values() for row in rows.values()):
            if not (row["error"] >= 0 and (row["ratio"] is None or row["ratio"] > 0) and row["seconds"][OURS] > 0):
                raise ValueError(f"{row} has no proper figures")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise BaselineError(
            f"{path} cannot be read ({type(error).__name__}: {error}): restore it from git, or delete it and accept "
            "new figures with --update-baseline"
        ) from error
    return kinds


def rounded(value: Any) -> Any:
    """The same with four digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def text(kinds: dict[str, dict[str, Row]]) -> str:
    """JSON with a line for each row."""
    parts = []
    for kind, rows in sorted(kinds.items()):
        lines = [
            f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(row, ensure_ascii=False)}"
            for name, row in sorted(rows.items())
        ]
        parts.append(f" {json.dumps(kind)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def processor() -> str:
    """The host's, as Linux names it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.machine()


def slower(row: Row, accepted: Row | None) -> bool:
    """Whether the ratio fell too far, or could not be measured though it was before."""
    if accepted is None or accepted["ratio"] is None:
        return False
    return row["ratio"] is None or not row["ratio"] >= (1 - FALL) * accepted["ratio"]


def error_bound(row: Row, accepted: Row | None) -> float:
    """That the test sets, or a lower one if the accepted error was far below it."""
    return min(row["bound"], max(GROWTH * accepted["error"], LEAST_ERROR) if accepted else math.inf)


def problems(row: Row, accepted: Row | None) -> list[str]:
    """What is worse than was accepted, a message each; with nothing accepted only the error is looked at."""
    found = []
    bound = error_bound(row, accepted)
    if not row["error"] <= bound:  # NaN is none either
        before = f"; accepted on {accepted['date']}: {accepted['error']:.1e}" if accepted else ""
        found.append(
            f"{row['name']} on {row['kind']} is less exact: error {row['error']:.1e}, bound {bound:.1e}{before}"
        )
    if slower(row, accepted):
        found.append(f"{row['name']} on {row['kind']} is slower: {slowdown(row, accepted)}")
    return found


def slowdown(row: Row, accepted: Row) -> str:
    before = f"accepted on {accepted['date']} ({accepted['with']}): {milliseconds(accepted['seconds'])}"
    if row["ratio"] is None:
        return f"{row['reference']} could not be timed to compare with ({row['failure']}); {before}"
    low, high = row["ratio_quartiles"]
    return (
        f"{row['ratio']:.2f} × as fast as {row['reference']}, {1 - row['ratio'] / accepted['ratio']:.0%} below the "
        f"accepted {accepted['ratio']:.2f} × (at most {FALL:.0%} are allowed). Now {milliseconds(row['seconds'])}; "
        f"{before}. Measured as the median ratio of {row['rounds']} rounds taken in turns (quartiles {low:.2f} and "
        f"{high:.2f}), after {row['first_ratio']:.2f} × in fewer rounds; --update-baseline accepts it"
    )


def milliseconds(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items())


def comparison(rows: Sequence[Row], accepted: Baseline, updating: bool) -> str:
    """What the rows were held to, in a line."""
    kind = rows[0]["kind"]
    if updating:
        return f"{sum(not row['problems'] for row in rows)} rows of {kind} accepted in {accepted.path.name}"
    new = [row["name"] for row in rows if accepted.accepted(kind, row["name"]) is None]
    if len(new) == len(rows):
        return f"{accepted.path.name} has nothing for {kind}: no ratio was compared; --update-baseline accepts these"
    text = f"{len(rows) - len(new)} rows held to {accepted.path.name}"
    return text + (f"; not in it: {', '.join(new)} (--update-baseline accepts them)" if new else "")
