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
from race import OURS, YARDSTICK

FILE = Path(__file__).with_name("baseline.json")
FALL, YARDSTICK_FALL = 0.15, 0.20  # that a ratio may; fixed work is less alike to ours than its rivals are
# That an error may grow. Seeds are fixed: only processors and versions of PyTorch round differently, and where a 16-bit
# type rounds, from errors of COARSE on, so many roundings are averaged that this hardly shows.
GROWTH, COARSE_GROWTH, COARSE = 4.0, 1.5, 1e-4
OF_NO_ACCOUNT = {"error": 1e-6, "disagreement": 1e-3}  # in float32; of many indices
EQUAL = 0.98  # times this close are the same

# A row of either kind has `ratio` to `reference` (None where that failed), `yardstick` (None for an operation, which
# has none), `error`, `disagreement` and `seconds` by implementation; a measured one also `name`, `kind`, `bound`,
# `disagreement_bound`, `rounds`, `first`, `floor`, `failure`, and quartiles of both ratios.
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
        """Accept measured rows and write the file, atomically; others stay, those of a run beside this one too."""
        self.kinds = read(self.path) if self.path.exists() else {}
        for row in rows:
            kept = {key: row[key] for key in ("ratio", "reference", "yardstick", "error", "disagreement")}
            names = [name for name in (OURS, row["reference"], YARDSTICK) if name in row["seconds"]]
            kept["seconds"] = {name: row["seconds"][name] for name in names}
            kept |= {"date": time.strftime("%Y-%m-%d", time.gmtime()), "with": setup()}
            self.kinds.setdefault(row["kind"], {})[row["name"]] = rounded(kept)
        temporary = self.path.with_suffix(f".json.{os.getpid()}.tmp")
        temporary.write_text(text(self.kinds), encoding="utf-8")
        os.replace(temporary, self.path)


def read(path: Path) -> dict[str, dict[str, Row]]:
    try:
        kinds = json.loads(path.read_text(encoding="utf-8"))
        for row in (row for rows in kinds.values() for row in rows.values()):
            if not proper(row):
                raise ValueError(f"{row} has no proper figures")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise BaselineError(
            f"{path} cannot be read ({type(error).__name__}: {error}): restore it from git, or delete it and accept "
            "new figures with --update-baseline"
        ) from error
    return kinds


def proper(row: Row) -> bool:
    positive = [*row["seconds"].values(), *(row[key] for key in ("ratio", "yardstick") if row[key] is not None)]
    numbers = [row["error"], row["disagreement"], *positive]
    return (
        all(type(each) in (int, float) and 0 <= each < math.inf for each in numbers)
        and all(positive)
        and {OURS, *(rival for _, rival, _ in watched(row))} <= set(row["seconds"])
        and all(isinstance(row[key], str) for key in ("reference", "date", "with"))
    )


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


def setup() -> str:
    return f"torch {torch.__version__}, {processor()}"


def watched(accepted: Row | None) -> list[tuple[str, str, float]]:
    """The ratios of an accepted row, each with what it is to and by how much it may fall."""
    if accepted is None:
        return []
    both = ("ratio", accepted["reference"], FALL), ("yardstick", YARDSTICK, YARDSTICK_FALL)
    return [each for each in both if accepted[each[0]] is not None]


def problems(row: Row, accepted: Row | None, updating: bool = False) -> list[str]:
    """What is worse than was accepted, a message each; where new figures replace these, what forbids that."""
    where = f"{row['name']} on {row['kind']}"
    found = [f"{where} is less exact: {each}" for each in inexact(row, None if updating else accepted)]
    if not updating:
        return found + [f"{where} is slower: {each}" for each in slowdowns(row, accepted)]
    lost = [each for each in watched(accepted) if each[1] not in row["seconds"]]
    return found + [
        f"{where}: {accepted[ratio]:.2f} × {rival} kept: its rival failed ({row['failure']}); delete the row from the "
        "file to accept another"
        for ratio, rival, _ in lost
    ]


def inexact(row: Row, accepted: Row | None) -> list[str]:
    """Each figure of exactness that is past the bound that the test sets, or far above the accepted figure."""
    found = []
    for figure, bound in (("error", row["bound"]), ("disagreement", row["disagreement_bound"])):
        before = ""
        if accepted is not None:
            growth = COARSE_GROWTH if accepted[figure] > COARSE else GROWTH
            bound = min(bound, max(growth * accepted[figure], OF_NO_ACCOUNT[figure]))
            before = f"; accepted on {accepted['date']}: {accepted[figure]:.1e}"
        if not row[figure] <= bound:  # NaN is none either
            found.append(f"{figure} {row[figure]:.1e}, bound {bound:.1e}{before}")
    return found


def slowdowns(row: Row, accepted: Row | None) -> list[str]:
    """Each ratio that fell too far or could not be measured; with nothing accepted, whether it is below `floor`."""
    now = f"Now ({setup()}): {milliseconds(row['seconds'])}"
    if accepted is None:
        if row["floor"] is None or row["ratio"] is None or row["ratio"] >= row["floor"]:
            return []
        return [f"{row['ratio']:.2f} × as fast as {row['reference']}, and nothing is accepted yet. {now}"]
    found = []
    was = f"accepted on {accepted['date']} ({accepted['with']}): {milliseconds(accepted['seconds'])}"
    for ratio, rival, fall in watched(accepted):
        if rival not in row["seconds"]:
            found.append(f"{rival} could not be timed to compare with ({row['failure']}); {was}")
        elif not row[ratio] >= (1 - fall) * accepted[ratio]:
            low, high = row[f"{ratio}_quartiles"]
            name = row["reference"] if ratio == "ratio" else rival
            found.append(
                f"{row[ratio]:.2f} × as fast as {name}, {1 - row[ratio] / accepted[ratio]:.0%} below the accepted "
                f"{accepted[ratio]:.2f} × (at most {fall:.0%} are allowed). {now}; {was}. Measured as the median ratio "
                f"of {row['rounds']} rounds taken in turns (quartiles {low:.2f} and {high:.2f}), after "
                f"{row['first'][ratio]:.2f} × in fewer rounds; --update-baseline accepts it"
            )
    return found


def milliseconds(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items())


def comparison(rows: Sequence[Row], accepted: Baseline, updating: bool) -> str:
    """What the rows were held to, in a line."""
    kind, file = rows[0]["kind"], accepted.path.name
    if updating:
        return f"{sum(not row['problems'] for row in rows)} rows of {kind} accepted in {file}"
    known = [each for row in rows if (each := accepted.accepted(kind, row["name"])) is not None]
    new = [row["name"] for row in rows if accepted.accepted(kind, row["name"]) is None]
    if not known:
        return f"{file} has nothing for {kind}: no ratio was compared with one; --update-baseline accepts these"
    text = f"{len(known)} rows held to {file} by their error, {sum(bool(watched(each)) for each in known)} by a ratio"
    return text + (f"; not in it: {', '.join(new)} (--update-baseline accepts them)" if new else "")
