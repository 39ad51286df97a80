"""The benchmarks' rows as tables in text, and a GPU check's headline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from race import OURS

HEADER = (
    f"{'operation':<28} {'pass':<4} {'ms':>9} {'achieved':>13} {'ceiling':>8} {'eager':>8} {'compiled':>8} {'peer':>8} "
    f"{'MB':>8} {'error':>8} targets"
)
RATIO_HEADER = (
    f"{'':<40} {'ms':>10} {'ms of the':<32} {'ratio':>9} {'quartiles':>13} {'accepted':>9} {'rounds':>6} {'error':>8} "
    f"{'differ':>8}"
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row.

    ceiling: share of this device's copy or matrix rate, whichever bounds the operation; eager, compiled and peer (the
    fastest one): how many times as long they take; MB: peak memory beyond the inputs; error: relative, to float64.
    """
    rows = [row for row in rows if "operation" in row]
    if not rows:
        return "no operation was measured"
    copy, matmul = (rows[0]["ceilings"][name] for name in ("copy", "matmul"))
    head = f"{rows[0]['device']}: copy {copy / 1e9:.0f} GB/s, matrix product {matmul / 1e12:.1f} TFLOP/s"
    skipped = sorted({f"{name}: {why}" for row in rows for name, why in row["skipped"].items()})
    return "\n".join([head, HEADER, *map(line, rows), *skipped])


def line(row: dict[str, Any]) -> str:
    seconds, peak = row["seconds"], row["peak_bytes"][OURS]
    own = seconds[OURS]
    peers = [value for name, value in seconds.items() if name not in (OURS, "eager", "compiled")]
    rivals = seconds.get("eager"), seconds.get("compiled"), min(peers, default=None)
    gigabytes, teraflops = f"{row['bytes_moved'] / own / 1e9:.3g} GB/s", f"{row['flops'] / own / 1e12:.3g} TFLOP/s"
    missed = [each["target"] for each in row["targets"] if not each["met"]]
    cells = [
        f"{row['operation']:<28} {'f' if row['pass'] == 'forward' else 'f+b':<4} {1e3 * own:>9.4f}",
        f"{gigabytes if row['bounded_by'] == 'copy' else teraflops:>13} {row['share']:>8.1%}",
        *(f"{'-' if each is None else f'{each / own:.2f}×':>8}" for each in rivals),
        f"{f'{peak / 1e6:.1f}' if peak else '-':>8} {row['error']:>8.1e}",
        f"missed: {', '.join(missed)}" if missed else "met" if row["targets"] else "",
    ]
    return " ".join(cells).rstrip()


def ratios(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row: ours, the one it is held to, their ratio and the accepted one; below it that to fixed work."""
    lines = [RATIO_HEADER]
    for row in rows:
        lines.append(ratio_line(row["name"], row, "ratio", row["reference"]))
        if row["yardstick"] is not None:
            lines.append(ratio_line("", row, "yardstick", "yardstick"))
    return "\n".join(lines)


def ratio_line(name: str, row: dict[str, Any], figure: str, rival: str) -> str:
    ours = f"{name:<40} {1e3 * row['seconds'][OURS]:>10.4g}"
    if row[figure] is None:
        return f"{ours} no ratio: {row['failure']}"
    low, high = row[f"{figure}_quartiles"]
    before = row["accepted"].get(figure)
    return (
        f"{ours} {1e3 * row['seconds'][rival]:>10.4g} {rival:<21} {row[figure]:>8.3g}× {f'{low:.3g}–{high:.3g}':>13} "
        f"{'-' if before is None else f'{before:.3g}×':>9} {row['rounds']:>6} {row['error']:>8.1e} "
        f"{row['disagreement']:>8.1e}"
    )


def rows_of(parts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all parts of a `gpu_check` that have some."""
    lists = [figures for part in parts.values() if isinstance(figures := part.get("figures"), list)]
    return [row for rows in lists for row in rows if "ratio" in row]


def short_commit(record: dict[str, Any]) -> str:
    return record["commit"][:9] + "-dirty" * record["commit"].endswith("-dirty")


def headline(parts: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures that matter most, as far as the parts of a `gpu_check` have them; bytes and seconds.

    `run_seconds` are of a hundred steps, all of which ended; `peak_memory` is that run's alone. Beside the published
    recipe's copies of the frozen networks it is `peak_memory_beside_published`.
    """
    both, whole = (parts.get(name, {}).get("figures") or {} for name in ("align_both", "align"))
    rows = {row.get("name"): row for name in ("rates", "sampling") for row in parts.get(name, {}).get("figures") or []}
    ours, sampled = whole or both, rows.get("sampling", {})
    found = {
        "step_seconds": ours.get("step_seconds"),
        "published_step_seconds": both.get("seconds_per_step", {}).get("published_recipe"),
        "ratio": both.get("speedup_over_reference"),
        "images_per_second_aligned": ours.get("images_per_second"),
        "run_seconds": whole.get("seconds", {}).get("total"),
        "steps_done": whole.get("steps_done"),
        "peak_memory": whole.get("own_peak_memory"),
        "peak_memory_beside_published": both.get("own_peak_memory"),
        "images_per_second_sampled": sampled.get("images_per_second"),
        "seconds_per_token": sampled.get("seconds_per_token"),
        "sampling_setup_seconds": rows.get("sampling set-up", {}).get("seconds"),
        "copy_bytes_per_second": rows.get("copy", {}).get("rate"),
        "matmul_flops": rows.get("matmul", {}).get("rate"),
    }
    for name, figures in (("align_both", both), ("align", whole)):  # the latter's kernels are compiled already
        cache = parts.get(name, {}).get("triton_cache")
        found[f"startup_seconds_{cache}"] = figures.get("seconds", {}).get("startup")
        found[f"first_step_seconds_{cache}"] = figures.get("first_step_seconds")
    return {name: value for name, value in found.items() if value is not None}
