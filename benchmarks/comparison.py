"""Our step beside the published recipe's, on the same weights and batches: time by stage, memory, agreement."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from reference_step import CHUNK, PublishedModels, published_step
from torch import Tensor

from vapi_fast import ops
from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.costs import parameters
from vapi_fast.alignment.figures import mean_terms, non_finite
from vapi_fast.alignment.kernel_costs import BF16, FP32
from vapi_fast.alignment.loop import GradientSource
from vapi_fast.alignment.memory import Beside, frozen_parameters
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.step import Gradients, accumulate_gradients
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.models.families import generator_config
from vapi_fast.models.sizes import GeneratorConfig
from vapi_fast.runtime.clock import Clock, StageClock
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.graphs import Pool, idle_bytes
from vapi_fast.runtime.packages import installed

PATH_NAMES = {"vapi_fast": "vapi-fast", "published_recipe": "published recipe"}
COMPARED_STEPS = 2  # of --path both, the last ones: ours alone are known before
WARM_UP = CHUNK  # sequences: one chunk of each of the published recipe's stages
T = TypeVar("T")


class PublishedRecipe(GradientSource):
    """`--path reference`: the published recipe in the place of our steps."""

    path = "reference"

    def check(self, config: AlignConfig) -> None:
        name = f"--path {self.path}"
        if config.rollouts == "free" or config.reward:
            raise ConfigError(f"{name} needs the published recipe's own --rollouts and --reward")
        if config.method != "vapi":
            raise ConfigError(f"{name} needs --method vapi: the published recipe is VA-π")
        if config.control:
            raise ConfigError(f"{name} goes without --control: the published recipe's advantages are its rewards'")
        if config.rollout_mode == "train" and (config.dropout or config.label_dropout):
            raise ConfigError(f"{name} needs --rollout-mode eval: the published recipe draws rollouts without dropout")
        if config.credit_window:
            raise ConfigError(f"{name} goes without --credit-window: the published recipe judges whole images")
        if config.top_k or config.top_p < 1:
            raise ConfigError(f"{name} needs --top-k 0 and --top-p 1: the published recipe has no filters")
        if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ConfigError(f"{name} needs one process, this is one of {processes}")

    def memory(self, config: AlignConfig, world_size: int) -> Beside:
        generator = replace(generator_config(config.model), grid_size=config.grid_size)
        held = {"tokenizer and LPIPS": FP32 * frozen_parameters(config.tokenizer, config.lpips)}
        if config.prior != "kl":  # else our own is one and the same
            held["base model"] = BF16 * parameters(generator)
        others = {
            "published recipe": published_bytes(generator, config.batch_size // world_size, masks=config.dropout > 0)
        }
        return Beside(held, others, "pass --path fast")

    def prepare(self, models: Models, config: AlignConfig, device: torch.device) -> None:
        self.device = device
        self.published = PublishedModels.of(models)

    def of_step(self, step: int, start_step: int, config: AlignConfig) -> Callable[..., Gradients]:
        return self.published_alone

    def published_alone(
        self, models: Models, config: AlignConfig, batch: ImageBatch, seed: int, clock: Clock
    ) -> Gradients:
        torch.manual_seed(seed)  # of its draws and masks, so that they do not depend on the steps before
        terms = published_step(self.published, config, batch, seed, clock)
        none = torch.empty(0, dtype=torch.int64, device=batch.images.device)
        return Gradients(mean_terms(terms), non_finite(terms, len(batch.images)), none, none, terms["reward"])


class Comparison(PublishedRecipe):
    """`--path both`: ours count, and the published recipe's are measured beside them in the last steps.

    Each side's memory is the most that was allocated during its part of a step, without what only the other side keeps
    there: the copies of tokenizer and LPIPS that it works with, its base model, the graphs of our reward, the gradients
    that are put aside. What both use (weights, optimizer) counts for both; so does what the graphs of our reward hold
    between replays for ours. On a CPU it is not measured.
    """

    path = "both"
    waits = True  # a published step is long

    def check(self, config: AlignConfig) -> None:
        super().check(config)
        if config.steps < 2:
            raise ConfigError("--path both needs --steps 2 or more: it does not compare the first, which warms up")

    def memory(self, config: AlignConfig, world_size: int) -> Beside:
        found = super().memory(config, world_size)
        generator = replace(generator_config(config.model), grid_size=config.grid_size)
        return found._replace(held={**found.held, "compared gradients": FP32 * parameters(generator)})

    def prepare(self, models: Models, config: AlignConfig, device: torch.device) -> None:
        super().prepare(models, config, device)
        self.clock = StageClock(device)  # of the published recipe
        self.stages: dict[str, list[dict[str, float]]] = {"vapi_fast": [], "published_recipe": []}
        self.peaks: dict[str, list[int]] = {"vapi_fast": [], "published_recipe": []}
        self.errors: list[dict[str, float]] = []

    def of_step(self, step: int, start_step: int, config: AlignConfig) -> Callable[..., Gradients]:
        first = max(start_step + 1, config.steps - COMPARED_STEPS)  # the one before it warms up
        return self.gradients if step >= first else accumulate_gradients

    @property
    def compared(self) -> int:
        return len(self.errors)

    @property
    def seconds(self) -> float:
        """That the published recipe has taken so far, its warm-up included."""
        return sum(self.clock.seconds().values())

    def gradients(
        self, models: Models, config: AlignConfig, batch: ImageBatch, seed: int, clock: StageClock
    ) -> Gradients:
        """Ours, after both were computed and compared; `clock` gets our time alone."""
        parameters = list(models.generator.parameters())
        theirs = [self.published.tokenizer, self.published.lpips, self.published.base if config.prior != "kl" else None]
        ours = self.measured(
            "vapi_fast",
            clock,
            lambda: accumulate_gradients(models, config, batch, seed, clock),
            others=theirs,
            pools=lambda: [models.codec.pool, models.recordings.pool],
        )
        models.recordings.release()
        kept = [parameter.grad for parameter in parameters]
        models.generator.zero_grad(set_to_none=True)
        if not self.errors:  # a GPU's first calls load kernels and choose algorithms: ours did in the run's first step
            images = max(1, WARM_UP // config.group_size)
            first = batch.take(slice(images))
            published_step(self.published, config, first, seed, self.clock)
            models.generator.zero_grad(set_to_none=True)
        same = {"tokens": ours.tokens, "drawn": ours.rollouts, "shared_masks": True}
        terms = self.measured(
            "published_recipe",
            self.clock,
            lambda: published_step(self.published, config, batch, seed, self.clock, **same),
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
        self,
        name: str,
        clock: StageClock,
        run: Callable[[], T],
        others: list[object],
        pools: Callable[[], list[Pool | None]] = list,
    ) -> T:
        """`run`'s result. Notes seconds by stage, and memory: with what `pools` keep, without what `others` do."""
        before = clock.seconds(wait=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        result = run()
        spent = {stage: seconds - before.get(stage, 0.0) for stage, seconds in clock.seconds(wait=True).items()}
        self.stages[name].append({stage: seconds for stage, seconds in spent.items() if seconds > 0})
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peaks[name].append(peak + sum(map(idle_bytes, filter(None, pools()))) - held_bytes(others))
        return result

    def record(self) -> dict[str, Any]:
        """For `run.json`: seconds a step by stage (medians over the steps), ratios, and the worst agreement."""
        if not self.errors:
            return {}
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

    def write(self, record: dict[str, Any], output: Path) -> None:
        """Both paths' seconds: printed, and drawn into the run's `stages.png` where matplotlib is."""
        print("\n".join(comparison_table(record)))
        if installed("matplotlib"):
            from vapi_fast.alignment.charts import save_stage_bars

            stages = record["comparison"]["stages"]
            save_stage_bars(output / "stages.png", [(name, stages[key]) for key, name in PATH_NAMES.items()])


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


def published_bytes(generator: GeneratorConfig, images: int, *, masks: bool) -> int:
    """The greater of the published recipe's two peaks: sampling for all images, or training on a few sequences.

    masks: of dropout, two a layer, a byte a number.
    """
    width, hidden, vocab = generator.width, generator.hidden_width, generator.vocab_size
    length = generator.grid_size**2
    sampling = 4 * FP32 * images * length * vocab  # logits, scaled, probabilities, the draw's exponentials
    # Bytes that its plain layers keep of a position.
    layer = (34 + 2 * masks) * width + 8 * hidden + FP32 * generator.heads
    training = CHUNK * length * (generator.layers * layer + 24 * vocab)
    return max(sampling, training)


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


PATHS: dict[str, type[GradientSource]] = {"fast": GradientSource, "reference": PublishedRecipe, "both": Comparison}
