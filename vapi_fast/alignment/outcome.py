"""What a run has found so far: curves, measurements, seconds; what its report is made of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.memory import MemoryPlan
from vapi_fast.runtime.ceilings import Ceilings
from vapi_fast.runtime.clock import StageClock
from vapi_fast.runtime.energy import EnergyMeter


@dataclass
class Outcome:
    """Figures of one run on one rank; `curves` has a number a step, `measured` a generator's scores by its name."""

    config: AlignConfig
    device: torch.device
    clock: StageClock
    ceilings: Ceilings
    energy: EnergyMeter
    plan: MemoryPlan | None
    curves: dict[str, list[float]] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # those between steps, by the steps so far
    sheets: dict[str, list[tuple[str, Tensor]]] = field(default_factory=dict)  # labels and images by the picture's file
    sheet_columns: int = 1
    sheet_captions: Sequence[str] = ()  # of the places of each sheet
    seconds: dict[str, float] = field(default_factory=dict)
    first_step: dict[str, float] = field(default_factory=dict)  # its seconds by stage
    compared: int = 0  # steps at the end that something else ran beside
    comparison: dict[str, Any] = field(default_factory=dict)  # what it found, for `run.json`
    data: dict[str, Any] = field(default_factory=dict)  # `ImageData.summary`
    text: dict[str, float] = field(default_factory=dict)  # of a generator that also writes: nats from its start
    skipped_images: Sequence[Path | str] = ()

    def step_seconds(self, wait: bool = True) -> float | None:
        """Median of the steps after the first, which compiles and warms up, and without those that were compared."""
        seconds = self.clock.step_seconds(wait)
        alone = seconds[1 : len(seconds) - self.compared]
        return statistics.median(alone or seconds) if seconds else None

    def stage_seconds(self) -> dict[str, float]:
        """Mean seconds a step by stage, of the steps after the first where there are more."""
        count, first = len(self.clock.step_seconds(wait=True)), self.first_step
        seconds = {stage: each for stage, each in self.clock.seconds(wait=True).items() if stage != "startup"}
        if count < 2:
            return seconds if count else {}
        return {stage: (each - first.get(stage, 0.0)) / (count - 1) for stage, each in seconds.items()}
