"""The paper's ablations in miniature, each beside the controls: a run per row and seed, then a Markdown table.

    python benchmarks/ablation.py --table controls [--seeds 0 1 2 3 4] [--output-dir runs/ablation] [flags of align]

Flags of `vapi-fast align` hold for every run; without `--model` it is the tiny preset's. Runs and measurements that are
finished in the output folder are not repeated, one that was interrupted goes on, and tables share them. `<table>.json`
in it has the figures of all; those of the README are in `benchmarks/results/ablation/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vapi_fast.alignment.config import AlignConfig, RolloutOptions, saved_steps
from vapi_fast.cli import add_command_flags
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.options import flag

if TYPE_CHECKING:
    from vapi_fast.alignment.measurement import Evaluator

Changes = dict[str, Any]  # of a row, from the settings that all runs have
Record = dict[str, Any]

VAPI = "MSE + LPIPS + prior (VA-π)"
RANDOM = "random advantages"
SHUFFLED = "shuffled advantages"
PRIOR = "prior only"
TEMPERATURE, TEMPERED = "base at its best temperature", "VA-π at its best temperature"
RELEASED = "as released"
CONTROLS: dict[str, Changes] = {RANDOM: {"control": "random"}, SHUFFLED: {"control": "shuffled"}}
TABLES = ("controls", "reward", "prior", "noise", "steps", "group", "recipe")
SEEDS = {"controls": 5, "recipe": 5}  # of a table; of the others 3
TUNING_SEED = 1000  # temperatures are chosen on it, and no table uses it
TEMPERATURES = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
LONG, EVERY, SHORT = 200, 50, (10, 25)  # steps of the table of steps
NOISE = (0.0, 0.25, 0.5, 0.75, 0.95)  # the paper's Table 5
JANUS_NOISE = (0.0, 0.5, 1.0)  # the last is what Janus-Pro's script was released with
AR_GRPO_STEPS = 40  # of four classes: as long as 30 of the tiny preset's
AFTER = ", steps "  # in the name of a row whose run is a short one of another row's
KEPT = ("commit", "versions", "device", "base", "aligned", "evaluations", "step_seconds", "seconds")  # of a run.json
# Settings that a finished run may have had otherwise.
FREE = {"output_dir", "resume", "checkpoint_every", "micro_batch", "eval_batch", "inception_weights"}
DROPOUT = {"rollout_mode", "dropout", "label_dropout"}  # no measurement has it
NO_TABLE = {  # flags of align: the table's own, or nothing is measured
    "seed": "--seed",
    "resume": "--resume",
    "evaluate": "--no-eval",
    "random_init": "--random-init",
    "synthetic_data": "--synthetic-data",
}
SCORES = ("fid", "inception_score")


def rows_of(table: str, config: AlignConfig) -> dict[str, Changes]:
    """The rows of a table that are runs, the controls included; `config`: what they change."""
    beside = {RANDOM: CONTROLS[RANDOM], PRIOR: {"method": "ntp"}}
    if table == "controls":
        return {VAPI: {}, **CONTROLS, PRIOR: {"method": "ntp"}}
    if table == "reward":
        return {
            "MSE only": {"prior_weight": 0.0, "lpips_weight": 0.0},
            "MSE + LPIPS": {"prior_weight": 0.0},
            PRIOR: {"method": "ntp"},
            VAPI: {},
            "STE": {"method": "ste"},
            **CONTROLS,
        }
    if table == "recipe":
        kinds = {VAPI: {}, RANDOM: CONTROLS[RANDOM]}
        released = {f"{name}, {RELEASED}": changes | {"recipe": "va-pi"} for name, changes in kinds.items()}
        ar_grpo = {"recipe": "ar-grpo", "reward": "classifier", "steps": AR_GRPO_STEPS}
        others = {"STE": {"method": "ste"}, f"STE, {RELEASED}": {"recipe": "ste"}, "AR-GRPO, classifier": ar_grpo}
        return kinds | released | others | {f"AR-GRPO, {RANDOM}": ar_grpo | CONTROLS[RANDOM]}
    if table == "prior":
        weights = (0.01, 0.1, 1.0)
        weighted = {
            f"{kind.upper()}, β {w:g}": {"prior": kind, "prior_weight": w} for kind in ("ce", "kl") for w in weights
        }
        return {"no prior": {"prior_weight": 0.0}, **weighted, **beside}
    if table == "noise":
        shares = JANUS_NOISE if config.recipe == "janus" else NOISE
        return {f"ξ {share:g}": {"noise_prob": share} for share in shares} | beside
    if table == "group":
        sizes = {f"G {size}": {"group_size": size} for size in (2, 4, 8, 16)}
        by_token = {f"{name}, by token": sizes[name] | {"credit_window": 3} for name in ("G 2", "G 4", "G 8")}
        return sizes | by_token | CONTROLS
    found: dict[str, Changes] = {}
    lr = config.lr
    lines = {f"lr {rate:g}": {"lr": rate} for rate in (lr / 2, lr, 2 * lr)}
    lines |= {f"lr {lr:g}, {RANDOM}": {"lr": lr} | CONTROLS[RANDOM]}
    for name, changes in lines.items():
        for steps in SHORT:
            found[f"{name}{AFTER}{steps}"] = changes | {"steps": steps}
        found[name] = changes | {"steps": LONG, "eval_every": EVERY}
    return found


def settings(config: AlignConfig) -> Changes:
    """As `run.json` has them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}


@contextmanager
def evaluator(config: AlignConfig) -> Iterator[Evaluator]:
    """For what `config` starts from."""
    from vapi_fast.alignment.measurement import Evaluator
    from vapi_fast.alignment.models import load_models
    from vapi_fast.runtime.distributed import process_group

    with process_group() as device:
        yield Evaluator(config, load_models(config, device), device)


@dataclass(frozen=True)
class Runs:
    """Runs and measurements with common settings, each done once and kept in a folder."""

    folder: Path
    common: Changes

    def config(self, seed: int, changes: Changes, **more: Any) -> AlignConfig:
        return AlignConfig(**{"model": "tiny", **self.common, **changes, "seed": seed, **more})

    def place(self, seed: int, changes: Changes) -> Path:
        """The folder of the run with these changes; without any it is the one of values that are the common ones."""
        standard = self.config(seed, {})
        changed = {key: value for key, value in sorted(changes.items()) if value != getattr(standard, key)}
        name = "_".join(f"{flag(key)[2:]}-{value}" for key, value in changed.items()) or "unchanged"
        return self.folder / f"{name}_seed-{seed}"

    def finished(self, seed: int, changes: Changes) -> Record:
        """What is kept of the run with these changes; it is done, or gone on with, if that has not happened yet."""
        folder = self.place(seed, changes)
        if not (folder / "run.json").exists():
            from vapi_fast.alignment.run import align

            resume = bool(saved_steps(folder / "snapshots"))
            config = self.config(seed, changes, output_dir=folder, resume=resume)
            align(config, base=self.base(seed, config))
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        self.check(folder, record["config"], self.config(seed, changes))
        return {key: record[key] for key in KEPT if key in record} | {"seed": seed, "steps": record["config"]["steps"]}

    def base(self, seed: int, config: AlignConfig) -> Record:
        """What a run starts from: its samples' figures are the seed's, those of rollouts around images the run's."""
        found = self.measured_at((1.0,), seed)[1.0]
        common = self.config(seed, {}, temperature=1.0)
        rollouts = {field.name for field in dataclasses.fields(RolloutOptions)} - DROPOUT
        if all(getattr(config, name) == getattr(common, name) for name in rollouts):
            return found
        with evaluator(config) as measuring:
            held_out = measuring.held_out(measuring.models.generator, config.temperature)
        return found | dataclasses.asdict(held_out)

    def check(self, path: Path, found: Changes, wanted: AlignConfig) -> None:
        """Raise ConfigError where what the path holds was found with other settings."""
        for key, value in settings(wanted).items():
            if key not in FREE and found.get(key) != value:
                raise ConfigError(
                    f"{path} was made with {flag(key)} {found.get(key)}, not {value}: choose another --output-dir"
                )

    def measured_at(
        self,
        temperatures: Iterable[float],
        seed: int,
        changes: Changes | None = None,
        cfg_scale: float | None = None,
    ) -> dict[float, Record]:
        """Measurements by temperature, with the seed's draws: the base's, or with `changes` those of that run.

        cfg_scale: of the guided samples, if not all runs' own.
        """
        common = self.config(seed, {})
        scale = {} if cfg_scale in (None, common.cfg_scale) else {"cfg_scale": cfg_scale}
        name = f"temperatures{''.join(f'_cfg-{each:g}' for each in scale.values())}_seed-{seed}.json"
        path, config = self.folder / name, self.config(seed, scale)
        found: dict[float, Record] = {}
        if changes is not None:
            aligned = self.finished(seed, changes)["aligned"]
            folder = self.place(seed, changes)
            path = folder / path.name
            config = self.config(seed, {"gpt_ckpt": folder / "aligned.pt", "ema": False} | scale)
            found = {1.0: aligned} if config.temperature == 1 and not scale else found
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.check(path, kept["config"], config)
            found |= {float(temperature): record for temperature, record in kept["measured"].items()}
        if missing := [each for each in temperatures if each not in found]:
            from vapi_fast.runtime.checkpoint import write_atomically

            with evaluator(config) as measuring:
                for each in missing:
                    name = f"{'base' if changes is None else 'aligned'} at temperature {each:g}, seed {seed}"
                    found[each] = measuring.measure(measuring.models.generator, name, each).as_record()
                    text = json.dumps({"config": settings(config), "measured": found}, indent=1)
                    write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        return {each: found[each] for each in temperatures}

    def best(
        self,
        temperatures: Sequence[float],
        seeds: Sequence[int],
        changes: Changes | None = None,
        cfg_scales: Sequence[float] = (),
    ) -> list[Record]:
        """The base, or with `changes` what that run made of it, at the temperature that `merit` likes most, and guided
        at the temperature, and that of `cfg_scales`, that it likes most with guidance: a record a seed. They are chosen
        on a seed of their own.
        """
        scales = cfg_scales or (self.config(TUNING_SEED, {}).cfg_scale,)
        tuned = {scale: self.measured_at(temperatures, TUNING_SEED, changes, scale) for scale in scales}
        plain = tuned[scales[0]]
        chosen = {"temperature": max(plain, key=lambda each: merit(plain[each]))}
        if "cfg" in plain[chosen["temperature"]]:
            found = {(scale, each): merit(of[each]["cfg"]) for scale, of in tuned.items() for each in of}
            scale, chosen["cfg_temperature"] = max(found, key=lambda each: found[each])
            chosen |= {"cfg_scale": scale} if cfg_scales else {}
        records = []
        for seed in seeds:
            aligned = self.measured_at((chosen["temperature"],), seed, changes, scales[0])[chosen["temperature"]]
            if "cfg_temperature" in chosen:
                place = chosen["cfg_temperature"]
                aligned = aligned | {"cfg": self.measured_at((place,), seed, changes, scale)[place]["cfg"]}
            records.append({"seed": seed, "aligned": aligned} | chosen)
        return records


def merit(scores: Record) -> float:
    """What samples are chosen by: GenEval where it is known, else the lowest FID."""
    return scores["geneval"]["overall"] if "geneval" in scores else -scores["fid"]


def mean_and_error(values: Sequence[float], alone: float | None = None) -> tuple[float, float | None]:
    """Mean over the seeds and its standard error, of one seed `alone`."""
    if len(values) < 2:
        return values[0], alone
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def cell(values: Sequence[float], alone: float | None = None, digits: int = 3) -> str:
    """`mean_and_error` as a table has it."""
    mean, error = mean_and_error(values, alone)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def row(name: str, figures: list[Record], seconds: Sequence[float] = ()) -> str:
    """Means over the seeds with their standard errors; for one seed FID and IS have that of its one sample set."""
    cells = [name]
    for scores in (figures, [f["cfg"] for f in figures if "cfg" in f]):
        for key in SCORES if scores else ():
            cells.append(cell([s[key] for s in scores], scores[0][f"{key}_se"], digits=2))
        if scores and "geneval" in scores[0]:
            cells.append(overall(scores))
        if scores is figures:
            cells += [f"{statistics.mean(f[key] for f in figures):.3f}" for key in ("precision", "recall")]
            cells.append(cell([-f["mse"] - f["lpips"] for f in figures], digits=4))  # the full reward for all
    if "entropy" in figures[0]:
        cells += [f"{statistics.mean(f[key] for f in figures):.3f}" for key in ("entropy", "cross_entropy")]
        cells.append(f"{statistics.mean(seconds):.0f}" if seconds else "")
    return "| " + " | ".join(cells) + " |"


def table(records: dict[str, list[Record]]) -> str:
    """Markdown, of kept records by row: the base's own from the first of them that is of runs."""
    runs = next(each for each in records.values() if "base" in each[0])
    judged = "geneval" in runs[0]["base"]
    header = ["", "FID↓", "IS↑", *(["GenEval↑"] if judged else []), "precision", "recall", "reward"]
    if "cfg" in runs[0]["base"]:
        header += ["FID, CFG", "IS, CFG", *(["GenEval, CFG"] if judged else [])]
    if "entropy" in runs[0]["base"]:
        header += ["entropy", "held-out CE", "alignment, s"]
    lines = [f"| {' | '.join(header)} |".replace("|  |", "| |"), "|" + "---|" * len(header)]
    lines.append(row("base", [run["base"] for run in runs]))
    for name, each in records.items():
        name += tuned(each[0])
        # By the median step: a resumed run's seconds are those of its last part.
        seconds = [run["step_seconds"] * run["steps"] for run in each if run.get("steps") and run["step_seconds"]]
        lines.append(row(name, [run["aligned"] for run in each], seconds))
    return "\n".join(lines)


def tuned(record: Record) -> str:
    """What a row's name says of how its samples are drawn, where that was chosen for it."""
    if "temperature" not in record:
        return ""
    guided = f", with CFG {record['cfg_temperature']:g}" if "cfg_temperature" in record else ""
    scale = f" at scale {record['cfg_scale']:g}" if "cfg_scale" in record else ""
    return f" ({record['temperature']:g}{guided}{scale})"


def overall(scores: Sequence[Record]) -> str:
    """GenEval of one or several measurements; the error of one is that over its prompts."""
    found = [each["geneval"] for each in scores]
    return cell([each["overall"] for each in found], found[0]["overall_se"])


def tasks(records: dict[str, list[Record]]) -> str:
    """Markdown: GenEval by task, of the guided samples where there are some."""
    runs = next(each for each in records.values() if "base" in each[0])
    rows = {"base": [run["base"] for run in runs]}
    rows |= {name + tuned(each[0]): [run["aligned"] for run in each] for name, each in records.items()}
    names = list(runs[0]["base"]["geneval"]["tasks"])
    guided = "cfg" in runs[0]["base"]
    titles = [name.replace("_", " ") for name in names]
    lines = [
        f"| GenEval{', CFG' if guided else ''} | {' | '.join(titles)} | overall |",
        "|---" * (len(names) + 2) + "|",
    ]
    for name, each in rows.items():
        scores = [record["cfg"] if guided else record for record in each]
        cells = []
        for task in names:
            found = [record["geneval"]["tasks"][task] for record in scores]
            cells.append(cell([one["score"] for one in found], found[0]["se"]))
        lines.append(f"| {name} | {' | '.join(cells)} | {overall(scores)} |")
    return "\n".join(lines)


def figures_of(record: Record) -> dict[str, float]:
    """What two rows are compared in, of one measurement."""
    plain = {"FID": record["fid"], "IS": record["inception_score"]}
    plain |= {name: record[name] for name in ("precision", "recall")}
    plain |= {"reward": -record["mse"] - record["lpips"], "MSE": record["mse"], "LPIPS": record["lpips"]}
    plain |= {"GenEval": record["geneval"]["overall"]} if "geneval" in record else {}
    guided = figures_of(plain | record["cfg"] | {"mse": 0.0, "lpips": 0.0}) if "cfg" in record else {}
    return plain | {f"{name}, CFG": guided[name] for name in ("FID", "IS", "GenEval") if name in guided}


def difference(records: dict[str, list[Record]], one: str, other: str) -> str:
    """Markdown: how far two rows are apart, paired by the seeds that both have, as these share their draws."""
    pairs = {
        run["seed"]: (figures_of(run["aligned"]), figures_of(theirs["aligned"]))
        for run in records[one]
        for theirs in records[other]
        if run["seed"] == theirs["seed"]
    }
    names = list(next(iter(pairs.values()))[0])
    cells, ratios = [], []
    for name in names:
        mean, error = mean_and_error([mine[name] - theirs[name] for mine, theirs in pairs.values()])
        cells.append(f"{mean:+.3f} ± {error:.3f}" if error is not None else f"{mean:+.3f}")
        ratios.append(f"{mean / error:+.1f}" if error else "")
    return "\n".join(
        f"| {' | '.join(line)} |"
        for line in (
            [f"{one} − {other}, {len(pairs)} seeds", *names],
            ["---"] * (len(names) + 1),
            ["difference", *cells],
            ["in standard errors", *ratios],
        )
    )


def curves(records: dict[str, list[Record]]) -> str:
    """Markdown: FID and held-out reward of each learning rate over the steps, the runs of few and of many joined."""
    found: dict[str, dict[int, list[Record]]] = {}
    for name, runs in records.items():
        points = found.setdefault(name.partition(AFTER)[0], {})
        for run in runs:
            if "temperature" in run:
                measured = {0: run["aligned"]}
            elif run["steps"] in SHORT:  # its base is the long run's
                measured = {run["steps"]: run["aligned"]}
            else:
                between = {int(step): each for step, each in run["evaluations"].items()}
                measured = {0: run["base"]} | between | {run["steps"]: run["aligned"]}
            for step, each in measured.items():
                points.setdefault(step, []).append(each)
    steps = sorted({step for points in found.values() for step in points})
    lines = []
    for figure, digits in (("FID", 2), ("reward", 4)):
        lines += [f"| {figure} after steps | {' | '.join(map(str, steps))} |", "|" + "---|" * (len(steps) + 1)]
        for name, points in found.items():
            cells = [name]
            for each in (points.get(step) for step in steps):
                if each is None:
                    cells.append("")
                    continue
                alone = each[0]["fid_se"] if figure == "FID" else 0.0
                mean, error = mean_and_error([figures_of(record)[figure] for record in each], alone)
                cells.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def report(name: str, records: dict[str, list[Record]]) -> str:
    """All that is printed of a table."""
    parts = [curves(records) if name == "steps" else table(records)]
    if "geneval" in next(each[0]["base"] for each in records.values() if "base" in each[0]):
        parts.append(tasks(records))
    if VAPI in records:
        parts += [difference(records, VAPI, other) for other in (RANDOM, SHUFFLED, PRIOR) if other in records]
    return "\n\n".join(parts)


def make(
    name: str, runs: Runs, seeds: Sequence[int], temperatures: Sequence[float], cfg_scales: Sequence[float] = ()
) -> dict[str, list[Record]]:
    """All runs of a table, every row's of the first seed first; what is finished is kept in the folder."""
    if TUNING_SEED in seeds:
        raise ConfigError(f"--seeds {TUNING_SEED} is the one that temperatures are chosen on: leave it out")
    records: dict[str, list[Record]] = {}
    rows = rows_of(name, runs.config(seeds[0], {}))
    for seed in seeds:
        for row_name, changes in rows.items():
            records.setdefault(row_name, []).append(runs.finished(seed, changes))
    records[TEMPERATURE] = runs.best(temperatures, seeds, cfg_scales=cfg_scales)
    if name == "controls":
        records[TEMPERED] = runs.best(temperatures, seeds, rows[VAPI], cfg_scales)
    text = json.dumps(records, ensure_ascii=False, indent=1) + "\n"
    (runs.folder / f"{name}.json").write_text(text, encoding="utf-8")
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="The paper's ablations in miniature, each beside the controls. Flags of `vapi-fast align` hold for "
        "every run; without --model it is the tiny preset's.",
        allow_abbrev=False,
    )
    parser.add_argument("--table", choices=TABLES, default="reward", help="(default: reward)")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: 0 to 4 for controls, to 2 for the others)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablation"), help="(default: runs/ablation)")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=TEMPERATURES, help="of which the best are found"
    )
    parser.add_argument(
        "--cfg-scales", type=float, nargs="+", default=(), help="likewise (default: that of all runs alone)"
    )
    options, others = parser.parse_known_args(arguments)
    align_parser = argparse.ArgumentParser(prog=parser.prog, allow_abbrev=False)
    add_command_flags(align_parser, "align")
    common = vars(align_parser.parse_args(others))
    seeds = options.seeds or list(range(SEEDS.get(options.table, 3)))
    from vapi_fast.commands import OUT_OF_MEMORY, run_command  # --help and a mistyped flag need not wait for torch

    def run() -> None:
        if refused := [name for field, name in NO_TABLE.items() if field in common]:
            raise ConfigError(f"{refused[0]} does not go with a table: leave it out")
        records = make(options.table, Runs(options.output_dir, common), seeds, options.temperatures, options.cfg_scales)
        print(report(options.table, records))

    return run_command(run, lambda: "interrupted; the same command goes on", OUT_OF_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
