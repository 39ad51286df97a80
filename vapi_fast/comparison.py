"""Our step beside the published recipe's, on the same weights and batches: time by stage, gradients, advantages."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vapi_fast import ops
from vapi_fast.alignment import Gradients, Models, accumulate_gradients, mean_terms, non_finite
from vapi_fast.clock import Clock, StageClock
from vapi_fast.config import AlignConfig
from vapi_fast.data import ImageBatch

# (models, config, batch, seed, clock, *, tokens=None, drawn=None) → terms `loss`, `reward`, `mse`, `lpips`; adds one
# step's gradients. benchmarks/reference_step.py has the published one.
PublishedStep = Callable[..., dict[str, Tensor]]


def published_gradients(published_step: PublishedStep) -> Callable[..., Gradients]:
    """The published recipe in the place of `accumulate_gradients`."""

    def gradients(models: Models, config: AlignConfig, batch: ImageBatch, seed: int, clock: Clock) -> Gradients:
        terms = published_step(models, config, batch, seed, clock)
        none = torch.empty(0, dtype=torch.int64, device=batch.images.device)
        return Gradients(mean_terms(terms), non_finite(terms, len(batch.images)), none, none, terms["reward"])

    return gradients


class Comparison:
    """Takes the place of `accumulate_gradients` in a step: ours count, the published recipe's are measured."""

    def __init__(self, published_step: PublishedStep, device: torch.device) -> None:
        self.published_step = published_step
        self.clock = StageClock(device)  # of the published recipe
        self.stages: dict[str, list[dict[str, float]]] = {"vapi_fast": [], "published_recipe": []}
        self.errors: list[dict[str, float]] = []

    def gradients(
        self, models: Models, config: AlignConfig, batch: ImageBatch, seed: int, clock: StageClock
    ) -> Gradients:
        """Ours, after both were computed and compared; `clock` gets our time alone."""
        parameters = list(models.generator.parameters())
        arguments = models, config, batch, seed
        ours = self.timed("vapi_fast", clock, lambda: accumulate_gradients(*arguments, clock))
        kept = [parameter.grad for parameter in parameters]
        models.generator.zero_grad(set_to_none=True)
        same = {"tokens": ours.tokens, "drawn": ours.rollouts}
        terms = self.timed("published_recipe", self.clock, lambda: self.published_step(*arguments, self.clock, **same))
        published = [parameter.grad for parameter in parameters]
        advantages = [ops.group_advantages(rewards.float()).flatten() for rewards in (ours.rewards, terms["reward"])]
        self.errors.append(
            {
                "gradient": relative_error(kept, published),
                "advantages_cosine": float(F.cosine_similarity(*advantages, dim=0)),
                "tokens_equal": float((plain_tokens(models, batch) == ours.tokens).double().mean()),
            }
        )
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
        return ours

    def timed(self, name: str, clock: StageClock, run: Callable[[], Any]) -> Any:
        before = clock.seconds(wait=True)
        result = run()
        spent = {stage: seconds - before.get(stage, 0.0) for stage, seconds in clock.seconds(wait=True).items()}
        self.stages[name].append({stage: seconds for stage, seconds in spent.items() if seconds > 0})
        return result

    def seconds(self) -> float:
        """That the published recipe has taken so far."""
        return sum(self.clock.seconds().values())

    def record(self) -> dict[str, Any]:
        """For `run.json`: seconds a step by stage (medians over the steps), ratios, and the worst agreement."""
        seconds = {
            name: {stage: statistics.median(step[stage] for step in steps) for stage in steps[0]}
            for name, steps in self.stages.items()
        }
        ours, published = seconds["vapi_fast"], seconds["published_recipe"]
        totals = {name: statistics.median(sum(step.values()) for step in steps) for name, steps in self.stages.items()}
        return {
            "seconds_per_step": totals,
            "speedup_over_reference": totals["published_recipe"] / totals["vapi_fast"],
            "comparison": {
                "steps": len(self.errors),
                "stages": seconds,
                "speedup": {stage: published[stage] / ours[stage] for stage in ours if stage in published},
                "gradient_relative_error": max(errors["gradient"] for errors in self.errors),
                "advantages_cosine": min(errors["advantages_cosine"] for errors in self.errors),
                "tokens_equal": min(errors["tokens_equal"] for errors in self.errors),
            },
        }


@torch.no_grad()
def plain_tokens(models: Models, batch: ImageBatch) -> Tensor:
    """The images' tokens by the plain tokenizer, an image at a time."""
    return torch.cat([models.tokenizer.encode(image) for image in batch.images.split(1)])


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """‖ours − theirs‖ / ‖theirs‖ over all parameters together."""
    difference = sum((a - b).double().square().sum() for a, b in zip(ours, theirs, strict=True))
    return float((difference / sum(b.double().square().sum() for b in theirs)).sqrt())
