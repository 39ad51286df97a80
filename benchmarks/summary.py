"""The benchmark's rows as a table in text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEADER = (
    f"{'operation':<28} {'pass':<4} {'ms':>9} {'achieved':>13} {'ceiling':>8} {'eager':>8} {'compiled':>8} {'peer':>8} "
    f"{'MB':>8} {'error':>8} targets"
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row.

    ceiling: share of this device's copy or matrix rate, whichever bounds the operation; eager, compiled and peer (the
    fastest one): how many times as long they take; MB: peak memory beyond the inputs; error: relative, to float64.
    """
    if not rows:
        return "no operation was measured"
    ceilings = rows[0]["ceilings"]
    head = (
        f"{rows[0]['device']}: copy {ceilings['copy'] / 1e9:.0f} GB/s, "
        f"matrix product {ceilings['matmul'] / 1e12:.1f} TFLOP/s"
    )
    skipped = sorted({f"{name}: {why}" for row in rows for name, why in row["skipped"].items()})
    return "\n".join([head, HEADER, *map(line, rows), *skipped])


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
    if row["bound"] == "copy":
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
