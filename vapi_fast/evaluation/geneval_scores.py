"""GenEval's scores: the share of images that are right, by task, with standard errors over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vapi_fast.data.geneval import TASKS, Prompt
from vapi_fast.evaluation.metrics import grouped_mean


@dataclass(frozen=True)
class Score:
    """The share of images that are right, and its standard error over prompts (None of a single one)."""

    score: float
    se: float | None
    images: int
    prompts: int

    @classmethod
    def of(cls, by_prompt: Sequence[Sequence[bool]]) -> Score:
        """From the images of each prompt: they count alike, and err together, so that prompts are what varies."""
        return cls(*grouped_mean(by_prompt), sum(map(len, by_prompt)), len(by_prompt))


@dataclass(frozen=True)
class TaskScores:
    """A score by task that there are prompts of, and their mean."""

    tasks: dict[str, Score]
    overall: float
    overall_se: float | None

    @classmethod
    def of(cls, prompts: Sequence[Prompt], correct: Sequence[Sequence[bool]]) -> TaskScores:
        """Of each prompt's images whether they are right."""
        by_task: dict[str, list[Sequence[bool]]] = {task: [] for task in TASKS}
        for prompt, images in zip(prompts, correct, strict=True):
            by_task[prompt.tag].append(images)
        tasks = {task: Score.of(by_prompt) for task, by_prompt in by_task.items() if by_prompt}
        errors = [each.se for each in tasks.values()]
        error = None if None in errors else math.hypot(*errors) / len(tasks)
        return cls(tasks, sum(each.score for each in tasks.values()) / len(tasks), error)
