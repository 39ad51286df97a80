"""The benchmarks' rows as tables in text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEADER = (
    f"{'operation':<28} {'pass':<4} {'ms':>9} {'achieved':>13} {'ceiling':>8} {'eager':>8} {'compiled':>8} {'peer':>8} "
    f"{'MB':>8} {'error':>8} targets"
)
RATIO_HEADER = (
    f"{'':<40} {'ms':>10} {'ms of the':<21} {'ratio':>8} {'quartiles':>14} {'accepted':>9} {'rounds':>6} {'error':>8}"
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row.

    ceiling: share of this device's copy or matrix rate, whichever bounds the operation; eager, compiled and peer (the
    fastest one): how many times as long they take; MB: peak memory beyond the inputs; error: relative, to float64.
    """
    rows = [row for row in rows if "operation" in row]
    if not rows:
        return "no operation was measured"
    ceilings = rows[0]["ceilings"]
    head = (
        f"{rows[0]['device']}: copy {ceilings['copy'] / 1e9:.0f} GB/s, "
        f"matrix product {ceilings['matmul'] / 1e12:.1f} TFLOP/s"
    )
    skipped = sorted({f"{name}: {why}" for row in rows for name, why in row["skipped"].items()})
    return "\n".join([head, HEADER, *map(line, rows), *skipped])


def ratios(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each row that something was timed beside: ours, the other one, their ratio and the accepted one."""
    compared = [row for row in rows if row["ratio"] is not None]
    lines = [RATIO_HEADER, *map(ratio_line, compared)] if compared else []
    alone = len(rows) - len(compared)
    return "\n".join([*lines, *([f"error alone: {alone} rows, where our path is the reference itself"] * (alone > 0))])


def ratio_line(row: dict[str, Any]) -> str:
    low, high = row["ratio_quartiles"]
    times = [f"{1e3 * row['seconds'][name]:>10.4g}" for name in ("vapi_fast", row["reference"])]
    accepted = "-" if row["accepted"] is None else f"{row['accepted']:.2f}×"
    spread = f"{low:.2f}–{high:.2f}"
    cells = [f"{row['name']:<40}", *times, f"{row['reference']:<10}", f"{row['ratio']:>8.2f}× {spread:>13}"]
    return " ".join([*cells, f"{accepted:>9} {row['rounds']:>6} {row['error']:>8.1e}"])


def alignment_line(record: dict[str, Any]) -> str:
    """A whole alignment (`run.json`) in a line."""
    seconds = record["seconds"]
    stages = ", ".join(f"{stage} {figures['seconds']:.3f}" for stage, figures in record["stages"].items())
    text = f"{seconds['total']:.0f} s in all, start-up {seconds['startup']:.1f}; a step: {stages}; "
    text += f"peak memory {record['peak_memory'] / 1e9:.1f} GB"
    if "speedup_over_reference" in record:
        text += f"; {record['speedup_over_reference']:.1f}× the published recipe"
    return text


def line(row: dict[str, Any]) -> str:
    seconds = row["seconds"]
    own = seconds["vapi_fast"]
    peers = [value for name, value in seconds.items() if name not in ("vapi_fast", "eager", "compiled")]
    rivals = seconds.get("eager"), seconds.get("compiled"), min(peers, default=None)
    eager, compiled, peer = ("-" if each is None else f"{each / own:.2f}×" for each in rivals)
    if row["bounded_by"] == "copy":
        achieved = f"{row['bytes_moved'] / own / 1e9:.3g} GB/s"
    else:
        achieved = f"{row['flops'] / own / 1e12:.3g} TFLOP/s"
    missed = [each["target"] for each in row["targets"] if not each["met"]]
    verdict = "" if not row["targets"] else f"missed: {', '.join(missed)}" if missed else "met"
    cells = [
        f"{row['operation']:<28}",
        f"{'f' if row['pass'] == 'forward' else 'f+b':<4}",
        f"{1e3 * own:>9.4f}",
        f"{achieved:>13}",
        f"{row['share']:>8.1%}",
        f"{eager:>8} {compiled:>8} {peer:>8}",
        f"{row['peak_bytes'].get('vapi_fast', 0) / 1e6:>8.1f}",
        f"{row['error']:>8.1e}",
        verdict,
    ]
    return " ".join(cells).rstrip()
