"""The reward ablation of the paper on the tiny preset: one run per variant and seed, then a Markdown table.

    python benchmarks/ablation.py [--seeds 0 1 2] [--output-dir runs/ablation]

Finished runs in the output folder are not repeated; `ablation.json` in it has the figures of all, those of the README
are in `benchmarks/results/ablation/`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from vapi_fast import AlignConfig, align

VARIANTS: dict[str, dict[str, Any]] = {
    "MSE only": {"prior_weight": 0.0, "lpips_weight": 0.0},
    "MSE + LPIPS": {"prior_weight": 0.0},
    "prior only": {"method": "ntp"},
    "MSE + LPIPS + prior (VA-π)": {},
    "STE": {"method": "ste"},
}

KEPT = ("commit", "versions", "device", "base", "aligned", "step_seconds")  # of a run.json


def finished_run(folder: Path, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    if not (folder / "run.json").exists():
        align(
            AlignConfig(model="tiny", seed=seed, output_dir=folder, resume=(folder / "snapshots").exists(), **changes)
        )
    return json.loads((folder / "run.json").read_text())


def row(name: str, figures: list[dict[str, Any]]) -> str:
    """Means over the seeds; FID and IS with the standard error of that mean (of the one sample set, for one seed)."""
    cells = [name]
    for scores in (figures, [f["cfg"] for f in figures]):
        for key in ("fid", "inception_score"):
            values = [s[key] for s in scores]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else scores[0][f"{key}_se"]
            cells.append(f"{statistics.mean(values):.2f} ± {error:.2f}")
        if scores is figures:
            cells += [f"{statistics.mean(f[key] for f in figures):.3f}" for key in ("precision", "recall")]
            cells.append(f"{-statistics.mean(f['mse'] + f['lpips'] for f in figures):.3f}")  # the full reward for all
    return "| " + " | ".join(cells) + " |"


def table(records: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown, of `run.json` records by variant."""
    lines = ["| | FID↓ | IS↑ | precision | recall | reward | FID, CFG | IS, CFG |", "|---|---|---|---|---|---|---|---|"]
    lines.append(row("base", [record["base"] for record in next(iter(records.values()))]))
    lines += [row(name, [record["aligned"] for record in each]) for name, each in records.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    records = {}
    for name, changes in VARIANTS.items():
        slug = "-".join("".join(c if c.isalnum() else " " for c in name).split()).lower()
        runs = [finished_run(options.output_dir / f"{slug}-{seed}", seed, changes) for seed in options.seeds]
        records[name] = [{key: run[key] for key in KEPT} for run in runs]
    (options.output_dir / "ablation.json").write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
