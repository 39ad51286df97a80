"""Charts of a run: reward and FID over the steps, and where a step's time goes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import rgb_to_hsv, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vapi_fast.runtime.checkpoint import write_atomically
from vapi_fast.runtime.clock import STAGES

# Transformer blue, reward orange, the rest grey, purple and green; neighbours in a bar are told apart by lightness.
STAGE_COLOURS = {
    "startup": "#6b7280",
    "data": "#c4c9d1",
    "encode": "#7c3aed",
    "forward": "#1d4ed8",
    "sample": "#7dd3fc",
    "decode": "#ea580c",
    "lpips": "#fdba74",
    "reward": "#fbbf24",
    "loss": "#bae6fd",
    "backward": "#3b82f6",
    "optimizer": "#15803d",
}
WRITTEN_SHARE = 0.06  # of an axis; narrower parts of a bar have no number


def save_reward_curve(path: str | Path, rewards: Sequence[float], *, window: int = 9) -> None:
    """Write a PNG of the mean reward of each step (steps count from 1) with its running mean over `window` steps.

    The running mean is centred and uses fewer steps at both ends. The file appears whole or not at all.
    Raises ValueError when there are no rewards.
    """
    if not rewards:
        raise ValueError("no rewards to draw; expected one mean reward per step")
    steps = range(1, len(rewards) + 1)
    with chart_of_steps(path, "mean reward, −(MSE + LPIPS), weighted") as axes:
        axes.plot(steps, rewards, color="#93c5fd", linewidth=1, marker="o", markersize=2.5, label="each step")
        axes.plot(
            steps, _running_mean(rewards, window), color="#1d4ed8", linewidth=2, label=f"mean over {window} steps"
        )
        axes.set_xlim(0, len(rewards) + 1)


def save_fid_curve(path: str | Path, measurements: Mapping[int, Mapping[str, Any]], cfg_scale: float) -> None:
    """Write a PNG of FID over the steps, without and with guidance, with one standard error up and down.

    measurements: as `run.json` has them, by the steps before them. The file appears whole or not at all.
    Raises ValueError when there are none.
    """
    if not measurements:
        raise ValueError("no measurements to draw; expected at least one")
    with chart_of_steps(path, "FID ± standard error") as axes:
        steps = list(measurements)
        plain = list(measurements.values())
        guided = [each["cfg"] for each in plain if "cfg" in each]
        for scores, label, colour in ((plain, "no guidance", "#1d4ed8"), (guided, f"CFG {cfg_scale:g}", "#ea580c")):
            if not scores:
                continue
            fid, errors = ([each[name] for each in scores] for name in ("fid", "fid_se"))
            axes.errorbar(steps, fid, yerr=errors, label=label, color=colour, marker="o", markersize=4, capsize=3)
        axes.set_ylim(bottom=0)


@contextlib.contextmanager
def chart_of_steps(path: str | Path, figure_label: str) -> Iterator[Axes]:
    """Axes to draw a figure over the steps into; afterwards they are a PNG, which appears whole or not at all."""
    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    yield axes
    axes.set_xlabel("step")
    axes.set_ylabel(figure_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def save_stage_bars(path: str | Path, runs: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    """Write a PNG with one bar a run, (label, seconds a step by stage), its stages stacked in their order.

    Several runs are drawn twice: in seconds, and each as shares of its own step. The file appears whole or not at all.
    Raises ValueError when there are no runs, a stage is unknown, or seconds are negative, not finite or all zero.
    """
    _check_runs(runs)
    stages = [stage for stage in STAGES if any(seconds.get(stage) for _, seconds in runs)]
    views = 2 if len(runs) > 1 else 1
    figure = Figure(figsize=(9, views * (0.9 + 0.5 * len(runs)) + 0.7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12)
    panels = figure.subplots(views, squeeze=False)[:, 0]
    for axes, shares in zip(panels, (False, True), strict=False):
        _draw_bars(axes, runs, stages, shares)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(stages),
        frameon=False,
        fontsize="small",
        handlelength=1,
        columnspacing=1.2,
    )
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def _draw_bars(
    axes: Axes, runs: Sequence[tuple[str, Mapping[str, float]]], stages: Sequence[str], shares: bool
) -> None:
    """A bar a run, the first on top: seconds with their sum behind them, or percentages of that sum."""
    totals = [sum(seconds.values()) for _, seconds in runs]
    scales = [100 / total if shares else 1.0 for total in totals]
    widest = 100 if shares else max(totals)
    ends = [0.0] * len(runs)
    for stage in stages:
        colour = STAGE_COLOURS[stage]
        widths = [seconds.get(stage, 0.0) * scale for (_, seconds), scale in zip(runs, scales, strict=True)]
        bars = axes.barh(range(len(runs)), widths, left=ends, color=colour, height=0.62, label=stage)
        numbers = [format(width, ".0f" if shares else ".3g") * (width >= WRITTEN_SHARE * widest) for width in widths]
        on_dark = rgb_to_hsv(to_rgb(colour))[1] > 0.6  # the light colours are the pale ones
        axes.bar_label(bars, numbers, label_type="center", color="white" if on_dark else "#1f2937", fontsize="small")
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    if not shares:
        for position, total in enumerate(totals):
            place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{total:.3g}", (total, position), weight="bold", **place)
    axes.set_yticks(range(len(runs)), [label for label, _ in runs])
    axes.set_xlim(0, widest if shares else 1.07 * widest)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlabel("share of the step, %" if shares else "seconds a step")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _check_runs(runs: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    if not runs:
        raise ValueError("no runs to draw; expected at least one (label, seconds by stage)")
    for label, seconds in runs:
        unknown = [stage for stage in seconds if stage not in STAGES]
        if unknown:
            raise ValueError(f"run '{label}': unknown stage '{unknown[0]}'; expected {', '.join(STAGES)}")
        if not all(0 <= value < math.inf for value in seconds.values()) or not any(seconds.values()):
            raise ValueError(f"run '{label}': seconds must be finite, not negative, and not all zero, got {seconds}")


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    reach = window // 2
    spans = [values[max(0, step - reach) : step + reach + 1] for step in range(len(values))]
    return [sum(span) / len(span) for span in spans]
