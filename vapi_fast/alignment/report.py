"""What a run leaves behind: `run.json`, the before/after table, the pictures and the reward curve."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch

from vapi_fast.alignment.control import SAID
from vapi_fast.alignment.costs import config_costs, model_flop_utilisation, stage_table
from vapi_fast.alignment.outcome import Outcome
from vapi_fast.runtime import forms, hub
from vapi_fast.runtime.accelerators import attention_backend
from vapi_fast.runtime.checkpoint import write_atomically
from vapi_fast.runtime.distributed import gather_objects, world_size
from vapi_fast.runtime.ownership import LOCK
from vapi_fast.runtime.packages import installed

CURVES = (  # of a measurement
    *("fid", "inception_score", "precision", "recall"),
    *("reward", "mse", "lpips", "entropy", "cross_entropy"),
)
PACKAGES = ("vapi-fast", "torch", "triton", "numpy", "datasets", "torchmetrics", "transformers")


def run_record(outcome: Outcome) -> dict[str, Any]:
    """The dictionary that becomes `run.json`; seconds are wall-clock, rewards one mean per step."""
    config = {key: plain(value) for key, value in dataclasses.asdict(outcome.config).items()}
    step_seconds, stages = outcome.step_seconds(), outcome.stage_seconds()
    taken = forms.taken(forms.architecture(outcome.device))
    with forms.taking(**taken):
        costs = config_costs(config, processes=world_size())
        table = stage_table(config, stages, outcome.ceilings, processes=world_size())
    record = {
        "config": config,
        "versions": versions(),
        "device": device_name(outcome.device),
        "processes": world_size(),
        "data": outcome.data,
        "commit": commit(),
        "hub": {name: hub.record(path) for name, path in outcome.config.hub_checkpoints.items()},
        **outcome.measured,
        "evaluations": outcome.evaluations,
        "text": outcome.text or None,
        "reward": outcome.curves["reward"],
        "curves": outcome.curves,
        "seconds": outcome.seconds | {"stages": outcome.clock.seconds(wait=True)},
        "step_seconds": step_seconds,  # median
        "images_per_second": outcome.config.batch_size / step_seconds if step_seconds else None,
        "stages": table,
        "model_flop_utilisation": (
            model_flop_utilisation(costs, step_seconds, outcome.ceilings) if costs and step_seconds else None
        ),
        "ceilings": dataclasses.asdict(outcome.ceilings),
        "attention": attention_backend(outcome.device),
        "forms": taken,
        "planned_memory": outcome.plan.parts | {"free": outcome.plan.free} if outcome.plan else None,
        "peak_memory": peak_memory(outcome.device),
        "joules": total_joules(outcome.energy.joules()),
        "skipped_images": [str(path) for path in outcome.skipped_images],
        **outcome.comparison,
    }
    return jsonable(record)


def jsonable(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def write_scores(writer: Any, figures: dict[str, Any], step: int) -> None:
    """A measurement's figures as TensorBoard's curves `evaluation/…`, the guided ones' `evaluation/cfg/…`."""
    for name in CURVES:
        for curve, scores in ((name, figures), (f"cfg/{name}", figures.get("cfg", {}))):
            if name in scores:
                writer.add_scalar(f"evaluation/{curve}", scores[name], step)


def write_pictures(outcome: Outcome, output: Path) -> None:
    """`samples.png` and `originals.png` if the run was evaluated, and `reward.png` if its method has a reward, where
    matplotlib is."""
    if outcome.sheets:
        from vapi_fast.data.pictures import save_sheets
    for name, sheets in outcome.sheets.items():
        save_sheets(output / name, sheets, outcome.sheet_columns, outcome.sheet_captions)
    if outcome.config.method != "ntp" and installed("matplotlib"):
        from vapi_fast.alignment.charts import save_reward_curve

        save_reward_curve(output / "reward.png", outcome.curves["reward"])


def write_record(record: dict[str, Any], output: Path) -> None:
    """Write `run.json`, which marks the run as finished, and print the table; where matplotlib is, `stages.png`, and
    `fid.png` if the steps were measured."""
    if installed("matplotlib"):
        from vapi_fast.alignment.charts import save_fid_curve, save_stage_bars

        if record["stages"]:
            seconds = {stage: figures["seconds"] for stage, figures in record["stages"].items()}
            save_stage_bars(output / "stages.png", [(record["config"]["model"], seconds)])
        if record["config"]["eval_every"]:
            save_fid_curve(output / "fid.png", measurements(record), record["config"]["cfg_scale"])
    text = json.dumps(record, indent=1, allow_nan=False)
    write_atomically(output / "run.json", lambda temporary: temporary.write_text(text))
    print(table(record))


def print_results(output: Path) -> None:
    """Where what is."""
    written = sorted(path.name for path in output.iterdir() if path.name not in ("snapshots", LOCK))
    print(f"results in {output}: {', '.join(written)}")


def table(record: dict[str, Any]) -> str:
    """Before and after, and stage timings, as text."""
    control = record["config"]["control"]
    lines = [SAID[control]] if control else []
    if "base" in record and "aligned" in record:
        between = {f"step {step}": figures for step, figures in record["evaluations"].items()}
        measured = {"base": record["base"], **between, "aligned": record["aligned"]}
        lines += scores_table(measured, record["config"]["cfg_scale"])
        lines += tasks_table(measured, record["config"]["cfg_scale"])
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
    return "\n".join(lines)


def stages_table(record: dict[str, Any]) -> list[str]:
    """Seconds a step by stage, the work it needs done, and the share of the ceiling that governs it.

    A stage that takes less than its floor has found what it reads in a cache, as small models on a CPU do.
    """
    lines = [f"{'stage':12}{'s a step':>10}{'TFLOP/s':>10}  {'of ceiling':>14}"]
    for stage, figures in record["stages"].items():
        row = f"{stage:12}{figures['seconds']:10.4f}"
        if "share" in figures:
            share = f"{figures['share']:.0%} of {figures['bound']}" if figures["share"] <= 1 else "all, cached"
            row += f"{figures['tflops']:10.2f}  {share:>14}"
        lines.append(row)
    return lines


def measurements(record: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """A run's measurements by the steps before them: the base's at 0, those of `--eval-every`, the aligned one's."""
    between = {int(step): figures for step, figures in record["evaluations"].items()}
    ends = {0: record.get("base"), record["config"]["steps"]: record.get("aligned")}
    return dict(sorted((between | {step: figures for step, figures in ends.items() if figures}).items()))


def scores_table(measured: dict[str, dict[str, Any]], cfg_scale: float) -> list[str]:
    """FID ± standard error and the other figures of the measurements by name, a row each without and with guidance."""
    first = next(iter(measured.values()))
    header = f"{'':22}{'FID':>16}{'IS':>16}{'precision':>11}{'recall':>9}{'reward':>10}{'MSE':>9}{'LPIPS':>9}"
    header += f"{'entropy':>9}{'CE':>8}"
    lines = [f"{first['samples']} samples, {first['feature_network']} (± standard error)", header]
    for name, figures in measured.items():
        for label, scores in with_guidance(name, figures, cfg_scale):
            row = f"{label:22}{scores['fid']:9.2f} ±{scores['fid_se']:5.2f}"
            row += f"{scores['inception_score']:9.2f} ±{scores['inception_score_se']:5.2f}"
            row += f"{scores['precision']:11.3f}{scores['recall']:9.3f}"
            if scores is figures:
                row += f"{figures['reward']:10.4f}{figures['mse']:9.4f}{figures['lpips']:9.4f}"
                if "entropy" in figures:  # a run's that an earlier version began
                    row += f"{figures['entropy']:9.3f}{figures['cross_entropy']:8.3f}"
            lines.append(row)
    return lines


def with_guidance(name: str, figures: dict[str, Any], cfg_scale: float) -> list[tuple[str, dict[str, Any]]]:
    """A measurement's scores with their labels: those without guidance, then those with it."""
    guided = [(f"{name}, CFG {cfg_scale:g}", figures["cfg"])] if figures.get("cfg") else []
    return [(name, figures), *guided]


def tasks_table(measured: dict[str, dict[str, Any]], cfg_scale: float) -> list[str]:
    """GenEval by task and overall with its standard error, for measurements that have it, rows as of `scores_table`."""
    rows = [row for name, figures in measured.items() for row in with_guidance(name, figures, cfg_scale)]
    judged = [(label, scores["geneval"]) for label, scores in rows if "geneval" in scores]
    if not judged:
        return []
    tasks = list(judged[0][1]["tasks"])
    lines = [f"{'GenEval':22}{'overall':>16}" + "".join(f"{task.removesuffix('_object'):>16}" for task in tasks)]
    for label, found in judged:
        cells = [(found["overall"], found["overall_se"])]
        cells += [(found["tasks"][task]["score"], found["tasks"][task]["se"]) for task in tasks]
        row = (f"{score:.3f}" + (f" ± {error:.3f}" if error is not None else "") for score, error in cells)
        lines.append(f"{label:22}" + "".join(f"{cell:>16}" for cell in row))
    return lines
