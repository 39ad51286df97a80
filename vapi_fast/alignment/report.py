"""What a run leaves behind: `run.json`, the before/after table, the picture grid and the reward curve."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import resource
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vapi_fast.alignment.costs import config_costs, model_flop_utilisation, stage_table
from vapi_fast.runtime.accelerators import attention_backend
from vapi_fast.runtime.checkpoint import write_atomically
from vapi_fast.runtime.distributed import gather_objects, world_size
from vapi_fast.runtime.packages import installed

if TYPE_CHECKING:
    from vapi_fast.alignment.run import Run

PATH_NAMES = {"vapi_fast": "vapi-fast", "published_recipe": "published recipe"}
PACKAGES = ("vapi-fast", "torch", "triton", "numpy", "datasets", "torchmetrics")


def run_record(run: Run) -> dict[str, Any]:
    """The dictionary that becomes `run.json`; seconds are wall-clock, rewards one mean per step."""
    config = {key: plain(value) for key, value in dataclasses.asdict(run.config).items()}
    costs = config_costs(config, processes=world_size())
    step_seconds, stages = run.step_seconds(), run.stage_seconds()
    record = {
        "config": config,
        "versions": versions(),
        "device": device_name(run.device),
        "processes": world_size(),
        "commit": commit(),
        **run.measured,
        "reward": run.curves["reward"],
        "curves": run.curves,
        "seconds": run.seconds | {"stages": run.clock.seconds(wait=True)},
        "step_seconds": step_seconds,  # median
        "images_per_second": run.config.batch_size / step_seconds if step_seconds else None,
        "stages": stage_table(config, stages, run.ceilings, processes=world_size()),
        "model_flop_utilisation": (
            model_flop_utilisation(costs, step_seconds, run.ceilings) if costs and step_seconds else None
        ),
        "ceilings": dataclasses.asdict(run.ceilings),
        "attention": attention_backend(run.device),
        "planned_memory": run.plan.parts | {"free": run.plan.free} if run.plan else None,
        "peak_memory": peak_memory(run.device),
        "joules": total_joules(run.energy.joules()),
        "skipped_images": [str(path) for path in run.data.skipped],
    }
    if run.comparison:
        record |= run.comparison.record()
    return record


def total_joules(joules: float | None) -> float | None:
    """Energy of all ranks' GPUs; None where one has no counter."""
    everyone = gather_objects(joules)
    return None if None in everyone else sum(everyone)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory as PyTorch has it reserved at most, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(folder)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changes = subprocess.run(
        [*git, "status", "--porcelain"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (head or "unknown") + ("+changes" if changes else "")


def curve_writer() -> type | None:
    """TensorBoard's SummaryWriter, where it is installed."""
    if not installed("tensorboard"):
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def write_pictures(run: Run, output: Path) -> None:
    """`samples.png` if the run was evaluated, and `reward.png` if its method has a reward, where matplotlib is."""
    if run.pictures:
        from vapi_fast.data.pictures import save_grid

        save_grid(output / "samples.png", run.pictures)
    if run.config.method != "ntp" and installed("matplotlib"):
        from vapi_fast.alignment.charts import save_reward_curve

        save_reward_curve(output / "reward.png", run.curves["reward"])


def stage_bars(record: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Seconds a step by stage: of this run, or of both paths where the published recipe was timed too."""
    if "comparison" in record:
        stages = record["comparison"]["stages"]
        return [(name, stages[key]) for key, name in PATH_NAMES.items()]
    return [(record["config"]["model"], {stage: figures["seconds"] for stage, figures in record["stages"].items()})]


def write_record(record: dict[str, Any], output: Path) -> None:
    """Write `run.json`, which marks the run as finished, and print the table; `stages.png` where matplotlib is."""
    if record["stages"] and installed("matplotlib"):
        from vapi_fast.alignment.charts import save_stage_bars

        save_stage_bars(output / "stages.png", stage_bars(record))
    text = json.dumps(record, indent=1, allow_nan=False)
    write_atomically(output / "run.json", lambda temporary: temporary.write_text(text))
    print(table(record))
    written = sorted(path.name for path in output.iterdir() if path.name != "snapshots")
    print(f"results in {output}: {', '.join(written)}")


def table(record: dict[str, Any]) -> str:
    """Before and after, stage timings, and the comparison, as text."""
    lines = []
    if "base" in record and "aligned" in record:
        lines += scores_table(record["base"], record["aligned"], record["config"]["cfg_scale"])
    seconds = record["seconds"]
    parts = ", ".join(f"{name} {seconds[name]:.1f}" for name in ("startup", "alignment", "evaluation"))
    lines.append(f"seconds: total {seconds['total']:.1f}, of it {parts}")
    lines += stages_table(record)
    utilisation = record["model_flop_utilisation"]
    speed = f"{record['images_per_second']:.1f} images/s on " if record["images_per_second"] else ""
    lines.append(
        f"{speed}{record['device']}, attention by {record['attention']}, "
        f"peak memory {record['peak_memory'] / 1e9:.1f} GB"
        + (f", transformer at {utilisation:.0%} of the matrix ceiling" if utilisation else "")
        + (f", {record['joules'] / 1e3:.1f} kJ" if record["joules"] else "")
    )
    if record["skipped_images"]:
        lines.append(f"{len(record['skipped_images'])} unreadable images skipped: {record['skipped_images'][:5]}")
    if "comparison" in record:
        lines += comparison_table(record)
    return "\n".join(lines)


def stages_table(record: dict[str, Any]) -> list[str]:
    """Seconds a step by stage, the work it needs done, and the share of the ceiling that governs it."""
    lines = [f"{'stage':12}{'s a step':>10}{'TFLOP/s':>10}{'of ceiling':>12}"]
    for stage, figures in record["stages"].items():
        row = f"{stage:12}{figures['seconds']:10.4f}"
        if "share" in figures:
            row += f"{figures['tflops']:10.2f}{figures['share']:11.0%} of {figures['bound']}"
        lines.append(row)
    return lines


def comparison_table(record: dict[str, Any]) -> list[str]:
    """Ours beside the published recipe: seconds a step and their ratio by stage, and how well the two agree."""
    compared, totals = record["comparison"], record["seconds_per_step"]
    ours, published = (compared["stages"][name] for name in PATH_NAMES)
    lines = [f"{'stage':12}{'vapi-fast':>12}{'published':>12}{'ratio':>9}   seconds a step, {compared['steps']} steps"]
    for stage in ours:
        lines.append(f"{stage:12}{ours[stage]:12.4f}{published[stage]:12.4f}{compared['speedup'][stage]:8.1f}×")
    lines.append(
        f"{'together':12}{totals['vapi_fast']:12.4f}{totals['published_recipe']:12.4f}"
        f"{record['speedup_over_reference']:8.1f}× faster"
    )
    lines.append(
        f"same rollouts in both: gradients differ by {compared['gradient_relative_error']:.1e}, cosine of the "
        f"advantages {compared['advantages_cosine']:.5f}, image tokens equal {compared['tokens_equal']:.2%}"
    )
    if None not in (peaks := compared["peak_memory"]).values():
        lines.append("peak memory: " + ", ".join(f"{PATH_NAMES[name]} {peaks[name] / 1e9:.1f} GB" for name in peaks))
    return lines


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
