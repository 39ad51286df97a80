"""Our step beside the published recipe's, on the same weights and batches: time by stage, memory, agreement."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.figures import mean_terms, non_finite
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.step import Gradients, accumulate_gradients
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.models import LPIPS, Generator, VQTokenizer
from vapi_fast.runtime.clock import Clock, StageClock
from vapi_fast.runtime.graphs import Pool, idle_bytes

# (PublishedModels, config, batch, seed, clock, *, tokens=None, drawn=None) → terms `loss`, `reward`, `mse`, `lpips`;
# adds one step's gradients. benchmarks/reference_step.py has the published one.
PublishedStep = Callable[..., dict[str, Tensor]]
WARM_UP = 8  # sequences: one chunk of each of the published recipe's stages
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class PublishedModels(NamedTuple):
    """What the published recipe works with: our generator, and the frozen networks in plain layouts (NCHW)."""

    generator: Generator
    tokenizer: VQTokenizer
    lpips: LPIPS
    base: Generator | None

    @classmethod
    def of(cls, models: Models) -> PublishedModels:
        tokenizer, lpips = in_plain_layout(models.tokenizer), in_plain_layout(models.reward.lpips)
        return cls(models.generator, tokenizer, lpips, models.base)


def in_plain_layout(module: M) -> M:
    """The module, or a copy if a parameter lies otherwise than a new one.

    Under channels-last weights, 1×1 ones among them, a convolution copies an NCHW input and gives an NHWC result.
    """
    if all(is_plain(parameter) for parameter in module.parameters()):
        return module
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return module


def is_plain(x: Tensor) -> bool:
    """Whether x has a new tensor's strides, in dimensions of size 1 as well: `is_contiguous` passes over those."""
    return x.stride() == torch.empty(x.shape, device="meta").stride()


def published_gradients(published_step: PublishedStep) -> Callable[..., Gradients]:
    """The published recipe in the place of `accumulate_gradients`."""

    def gradients(models: Models, config: AlignConfig, batch: ImageBatch, seed: int, clock: Clock) -> Gradients:
        terms = published_step(PublishedModels.of(models), config, batch, seed, clock)
        none = torch.empty(0, dtype=torch.int64, device=batch.images.device)
        return Gradients(mean_terms(terms), non_finite(terms, len(batch.images)), none, none, terms["reward"])

    return gradients


class Comparison:
    """Takes the place of `accumulate_gradients` in a step: ours count, the published recipe's are measured.

    Each side's memory is the most that was allocated during its part of a step, without what only the other side keeps
    there: the copies of tokenizer and LPIPS that it works with, its base model, the graphs of our reward, the gradients
    that are put aside. What both use (weights, optimizer) counts for both; so does what the graphs of our reward hold
    between replays for ours. On a CPU it is not measured.
    """

    def __init__(self, published_step: PublishedStep, models: Models, device: torch.device) -> None:
        self.published_step = published_step
        self.published = PublishedModels.of(models)
        self.device = device
        self.clock = StageClock(device)  # of the published recipe
        self.stages: dict[str, list[dict[str, float]]] = {"vapi_fast": [], "published_recipe": []}
        self.peaks: dict[str, list[int]] = {"vapi_fast": [], "published_recipe": []}
        self.errors: list[dict[str, float]] = []

    def gradients(
        self, models: Models, config: AlignConfig, batch: ImageBatch, seed: int, clock: StageClock
    ) -> Gradients:
        """Ours, after both were computed and compared; `clock` gets our time alone."""
        parameters = list(models.generator.parameters())
        theirs = [self.published.tokenizer, self.published.lpips, models.base if config.prior != "kl" else None]
        ours = self.measured(
            "vapi_fast",
            clock,
            lambda: accumulate_gradients(models, config, batch, seed, clock),
            others=theirs,
            pool=models.codec.pool,
        )
        kept = [parameter.grad for parameter in parameters]
        models.generator.zero_grad(set_to_none=True)
        if not self.errors:  # a GPU's first calls load kernels and choose algorithms: ours did in the run's first step
            images = max(1, WARM_UP // config.group_size)
            first = ImageBatch(*(value[:images] for value in batch))
            self.published_step(self.published, config, first, seed, self.clock)
            models.generator.zero_grad(set_to_none=True)
        same = {"tokens": ours.tokens, "drawn": ours.rollouts}
        terms = self.measured(
            "published_recipe",
            self.clock,
            lambda: self.published_step(self.published, config, batch, seed, self.clock, **same),
            others=[models.tokenizer, models.reward, kept],
        )
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

    def measured(
        self, name: str, clock: StageClock, run: Callable[[], T], others: list[object], pool: Pool | None = None
    ) -> T:
        """`run`'s result. Notes seconds by stage, and memory: with what `pool` keeps, without what `others` do."""
        before = clock.seconds(wait=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        result = run()
        spent = {stage: seconds - before.get(stage, 0.0) for stage, seconds in clock.seconds(wait=True).items()}
        self.stages[name].append({stage: seconds for stage, seconds in spent.items() if seconds > 0})
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peaks[name].append(peak + (idle_bytes(pool) if pool else 0) - held_bytes(others))
        return result

    def seconds(self) -> float:
        """That the published recipe has taken so far, its warm-up included."""
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
                "peak_memory": {name: max(peaks, default=None) for name, peaks in self.peaks.items()},  # bytes
            },
        }


@torch.no_grad()
def plain_tokens(models: Models, batch: ImageBatch) -> Tensor:
    """The images' tokens by the plain tokenizer, an image at a time."""
    return torch.cat([models.tokenizer.encode(image) for image in batch.images.split(1)])


def held_bytes(holders: Iterable[object]) -> int:
    """Memory of the tensors in modules, containers and plain objects, however deep; shared memory counts once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    found = list(holders)
    while found:
        each = found.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(each, dict):
            found += each.values()
        elif isinstance(each, list | tuple):
            found += each
        elif hasattr(each, "__dict__"):
            found.append(vars(each))
    return sum(storages.values())


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """‖ours − theirs‖ / ‖theirs‖ over all parameters together."""
    difference = sum((a - b).double().square().sum() for a, b in zip(ours, theirs, strict=True))
    return float((difference / sum(b.double().square().sum() for b in theirs)).sqrt())
