"""What a run leaves behind: `run.json`, the before/after table, the picture grid and the reward curve."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import statistics
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vapi_fast.checkpoint import write_atomically
from vapi_fast.distributed import world_size
from vapi_fast.pictures import save_grid, save_reward_curve

if TYPE_CHECKING:
    from vapi_fast.run import Run

PACKAGES = ("vapi-fast", "torch", "triton", "numpy", "datasets", "torchmetrics")


def run_record(run: Run) -> dict[str, Any]:
    """The dictionary that becomes `run.json`; seconds are wall-clock, rewards one mean per step."""
    images = len(run.curves["loss"]) * run.config.batch_size
    record = {
        "config": {key: plain(value) for key, value in dataclasses.asdict(run.config).items()},
        "versions": versions(),
        "device": device_name(run.device),
        "processes": world_size(),
        "commit": commit(),
        **run.measured,
        "reward": run.curves["reward"],
        "curves": run.curves,
        "seconds": run.seconds | {"stages": run.clock.seconds},
        "images_per_second": images / run.seconds["alignment"] if run.seconds["alignment"] else 0.0,
        "skipped_images": [str(path) for path in run.data.skipped],
    }
    if run.compared:
        ours, published = (statistics.median(times) for times in zip(*run.compared, strict=True))
        record["seconds_per_step"] = {"vapi_fast": ours, "published_recipe": published}
        record["speedup_over_reference"] = published / ours
    return record


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on, where installed."""
    installed = {
        d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]
    }
    return {"python": platform.python_version()} | {name: installed[name] for name in PACKAGES if name in installed}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def commit() -> str:
    """The source tree's git commit, with "+changes" if it was modified; "unknown" for an installed package."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(folder)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changes = subprocess.run(
        [*git, "status", "--porcelain"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (head or "unknown") + ("+changes" if changes else "")


def write_pictures(run: Run, output: Path) -> None:
    """`samples.png` if the run was evaluated, and `reward.png` if its method has a reward."""
    if run.pictures:
        save_grid(output / "samples.png", run.pictures)
    if run.config.method != "ntp":
        save_reward_curve(output / "reward.png", run.curves["reward"])


def write_record(record: dict[str, Any], output: Path) -> None:
    """Write `run.json`, which marks the run as finished, and print the table."""
    text = json.dumps(record, indent=1, allow_nan=False)
    write_atomically(output / "run.json", lambda temporary: temporary.write_text(text))
    print(table(record))
    print(
        f"results in {output}: {', '.join(sorted(path.name for path in output.iterdir() if path.name != 'state.pt'))}"
    )


def table(record: dict[str, Any]) -> str:
    """Before and after, stage timings, and the comparison, as text."""
    lines = []
    if "base" in record and "aligned" in record:
        lines += scores_table(record["base"], record["aligned"], record["config"]["cfg_scale"])
    seconds = record["seconds"]
    stages = ", ".join(f"{name} {value:.1f}" for name, value in seconds["stages"].items())
    parts = ", ".join(f"{name} {seconds[name]:.1f}" for name in ("startup", "alignment", "evaluation"))
    lines.append(f"seconds: total {seconds['total']:.1f}, of it {parts}; alignment: {stages}")
    lines.append(f"{record['images_per_second']:.1f} images/s on {record['device']}")
    if record["skipped_images"]:
        lines.append(f"{len(record['skipped_images'])} unreadable images skipped: {record['skipped_images'][:5]}")
    if "speedup_over_reference" in record:
        step = record["seconds_per_step"]
        lines.append(
            f"published recipe {step['published_recipe']:.2f} s a step, vapi-fast {step['vapi_fast']:.2f} s: "
            f"{record['speedup_over_reference']:.1f}× faster"
        )
    return "\n".join(lines)


def scores_table(base: dict[str, Any], aligned: dict[str, Any], cfg_scale: float) -> list[str]:
    """FID ± standard error and the other figures, a row each for base and aligned, without and with guidance."""
    header = f"{'':22}{'FID':>16}{'IS':>16}{'precision':>11}{'recall':>9}{'reward':>10}{'MSE':>9}{'LPIPS':>9}"
    lines = [f"{base['samples']} samples, {base['feature_network']} (± standard error)", header]
    for name, figures in (("base", base), ("aligned", aligned)):
        for scores, label in ((figures, name), (figures["cfg"], f"{name}, CFG {cfg_scale:g}")):
            row = f"{label:22}{scores['fid']:9.2f} ±{scores['fid_se']:5.2f}"
            row += f"{scores['inception_score']:9.2f} ±{scores['inception_score_se']:5.2f}"
            row += f"{scores['precision']:11.3f}{scores['recall']:9.3f}"
            if scores is figures:
                row += f"{figures['reward']:10.4f}{figures['mse']:9.4f}{figures['lpips']:9.4f}"
            lines.append(row)
    return lines
