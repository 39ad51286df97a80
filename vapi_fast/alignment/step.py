"""VA-π alignment: batch → rollout → reward → loss → step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vapi_fast import ops
from vapi_fast.alignment.config import AlignConfig, reward_function
from vapi_fast.alignment.optimizer import clip_gradients, make_optimizer, step_unless
from vapi_fast.alignment.reward import PixelReward
from vapi_fast.alignment.rollout import roll_out, teacher_forced_hidden, token_logprobs
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.models import LPIPS, LlamaGen, VQTokenizer
from vapi_fast.models.lpips import LPIPS_CONFIGS
from vapi_fast.runtime.clock import Clock
from vapi_fast.runtime.distributed import gather_objects, rank, reduce_at, sum_over_ranks
from vapi_fast.runtime.errors import CheckpointError, ConfigError, NonFiniteError

METRICS = ("loss", "reward", "mse", "lpips", "cross_entropy", "kl")
# Where a term that is not finite comes from, in the order in which one such term spoils the next.
STAGES = {"mse": "decode", "lpips": "lpips", "reward": "lpips", "kl": "loss", "cross_entropy": "loss", "loss": "loss"}


@dataclass(frozen=True)
class Models:
    """What a step works with. `generator` is trained, the rest is frozen; `base` is a copy of its start, if needed."""

    generator: LlamaGen
    tokenizer: VQTokenizer
    reward: PixelReward
    base: LlamaGen | None = None


def load_models(config: AlignConfig, device: torch.device, reward_chunk: int | None = None) -> Models:
    """Load the checkpoints that `config` names; raises CheckpointError when one does not fit.

    reward_chunk: rollouts to decode at once; None: by the image size.
    """
    generator, tokenizer, lpips = random_models(config, device) if config.random_init else read_models(config)
    for module in (tokenizer, lpips):
        module.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    if generator.config.caption_tokens:
        raise CheckpointError(
            f"{config.gpt_ckpt} is a text-conditioned generator, and the image data has class labels only: pass a "
            "class-conditional checkpoint"
        )
    generator.to(device)
    base = frozen_copy(generator) if config.prior == "kl" else None
    generator.dropout = config.dropout
    reward = PixelReward(tokenizer, lpips, config.mse_weight, config.lpips_weight, reward_chunk)
    return Models(generator.train(), tokenizer, reward, base)


def frozen_copy(generator: LlamaGen) -> LlamaGen:
    """The generator as it is now, on a GPU in bf16, which it computes in; the released script casts it too."""
    base = copy.deepcopy(generator).eval().requires_grad_(False)
    if generator.output.weight.is_cuda:
        base.to(torch.bfloat16)
        base.rotary = generator.rotary
    base.dropout = 0.0
    return base


def read_models(config: AlignConfig) -> tuple[LlamaGen, VQTokenizer, LPIPS]:
    """The files that may be wrong come first: what LPIPS needs may have to be downloaded."""
    tokenizer = VQTokenizer.from_checkpoint(config.vq_ckpt, config.tokenizer)
    generator = LlamaGen.from_checkpoint(config.gpt_ckpt, config.model, grid_size=config.grid_size)
    if config.vgg_weights is None:
        lpips = LPIPS.from_name(config.lpips)
    else:
        lpips = LPIPS.from_checkpoint(config.vgg_weights, config.lpips)
    return generator, tokenizer, lpips


def random_models(config: AlignConfig, device: torch.device) -> tuple[LlamaGen, VQTokenizer, LPIPS]:
    """Untrained models of the right sizes, the same on every rank."""
    torch.manual_seed(config.seed)
    with device:  # a GPU draws 1.4 billion weights at once
        generator = LlamaGen.from_name(config.model, grid_size=config.grid_size)
        return generator, VQTokenizer.from_name(config.tokenizer), LPIPS(LPIPS_CONFIGS[config.lpips])


class Losses(NamedTuple):
    """A micro-batch's terms: `loss` (0-d, with its graph), the others 0-d or a row an image; and its rollouts."""

    terms: dict[str, Tensor]
    rollouts: Tensor  # int64 [b,G,T]; empty where nothing was sampled


def vapi_loss(
    models: Models, config: AlignConfig, batch: ImageBatch, tokens: Tensor, seed: int, clock: Clock
) -> Losses:
    """The paper's objective, one micro-batch: one forward, G rollouts, group advantages, clipped policy loss, prior."""
    draw = {"seed": seed, "sample_ids": batch.sample_ids}
    rollout = roll_out(models.generator, tokens, batch.labels, config, clock=clock, **draw)
    scores = score(models, config, rollout.tokens, batch, clock)
    with clock("loss"):
        filtered = config.top_k > 0 or config.top_p < 1
        loss = ops.policy_loss(
            rollout.hidden,
            head_weight(models.generator, rollout.hidden),
            rollout.tokens,
            ops.group_advantages(scores["reward"]),
            tokens,
            old_logprobs=rollout.logprobs if filtered else None,
            base_logprobs=base_logprobs(models, config, tokens, batch.labels, rollout.tokens, **draw),
            clip_range=config.clip_range,
            prior_weight=config.prior_weight if config.prior == "ce" else 0.0,
            kl_weight=config.prior_weight if config.prior == "kl" else 0.0,
            temperature=config.temperature,
        )
    terms = {"loss": loss.loss, **scores, "cross_entropy": loss.prior, "kl": loss.kl}
    return Losses(terms, rollout.tokens)


def score(models: Models, config: AlignConfig, rollouts: Tensor, batch: ImageBatch, clock: Clock) -> dict[str, Tensor]:
    """Terms `[b,G]` of rollouts `[b,G,T]`: `reward`, and if that is the pixels', `mse` and `lpips`."""
    if config.reward is None:
        reward = models.reward.score(rollouts, batch.images, clock)
        return {"reward": reward.total, "mse": reward.mse, "lpips": reward.lpips}
    with clock("decode"):
        images = models.reward.decode(rollouts.flatten(0, 1)).float().clamp(-1, 1)
    with clock("lpips"), torch.no_grad():
        rewards = reward_function(config.reward)(images, batch.labels.repeat_interleave(rollouts.shape[1]))
    if not isinstance(rewards, Tensor) or rewards.shape != images.shape[:1]:
        shape = list(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ConfigError(
            f"--reward {config.reward} must return a tensor [{len(images)}], a reward an image; got {shape}"
        )
    return {"reward": rewards.float().view(rollouts.shape[:2])}


def base_logprobs(
    models: Models, config: AlignConfig, tokens: Tensor, labels: Tensor, rollouts: Tensor, **draw: Any
) -> Tensor | None:
    """Log-probs `[b,G,T]` of the rollouts under the frozen base model, if the prior needs them."""
    if config.prior != "kl":
        return None
    with torch.no_grad():
        hidden = teacher_forced_hidden(models.base, tokens, labels, config, **draw)
    return token_logprobs(hidden, models.base.output.weight, rollouts, config.temperature)


def ste_loss(models: Models, config: AlignConfig, batch: ImageBatch, tokens: Tensor, seed: int, clock: Clock) -> Losses:
    """Straight-through baseline: MSE + LPIPS of a hard Gumbel-softmax draw, back-propagated to the logits."""
    draw = {"seed": seed, "sample_ids": batch.sample_ids}
    with clock("forward"):
        hidden = teacher_forced_hidden(models.generator, tokens, batch.labels, config, **draw)
        head = head_weight(models.generator, hidden)
    with clock("sample"):
        logits = (hidden @ head.T).float() / config.temperature
        embeddings, _ = ops.straight_through_lookup(logits, models.tokenizer.codebook(), tau=1.0, **draw)
    with clock("decode"):
        decoded = models.tokenizer.decode_embeddings(embeddings)
    with clock("lpips"):
        reward = models.reward.compare(decoded, batch.images)
    with clock("loss"):
        prior = ops.linear_cross_entropy(hidden, head, tokens)
        loss = -reward.total.mean() + config.prior_weight * prior
    distances = {"reward": reward.total, "mse": reward.mse, "lpips": reward.lpips}
    return Losses({"loss": loss, **distances, "cross_entropy": prior}, tokens[:, :0])


def ntp_loss(models: Models, config: AlignConfig, batch: ImageBatch, tokens: Tensor, seed: int, clock: Clock) -> Losses:
    """Next-token prediction alone, on the same images: what the prior does without a reward."""
    with clock("forward"):
        hidden = teacher_forced_hidden(
            models.generator, tokens, batch.labels, config, seed=seed, sample_ids=batch.sample_ids
        )
    with clock("loss"):
        loss = ops.linear_cross_entropy(hidden, head_weight(models.generator, hidden), tokens)
    return Losses({"loss": loss, "cross_entropy": loss}, tokens[:, :0])


LOSSES: dict[str, Callable[..., Losses]] = {"vapi": vapi_loss, "ste": ste_loss, "ntp": ntp_loss}


class Gradients(NamedTuple):
    """What the backward passes over this rank's images leave, besides the gradients; all on the device."""

    means: Tensor  # float64 [len(METRICS)]: this rank's share of the means over all images
    bad: Tensor  # bool [len(METRICS), b]: the term is not finite for the image
    tokens: Tensor  # int64 [b,T]
    rollouts: Tensor  # int64 [b,G,T]
    rewards: Tensor  # [b,G]; empty where nothing was sampled


def accumulate_gradients(models: Models, config: AlignConfig, batch: ImageBatch, seed: int, clock: Clock) -> Gradients:
    """Forward and backward over this rank's images, micro-batch by micro-batch."""
    with clock("encode"):
        tokens = models.reward.encode(batch.images)
    means, bad, rollouts, rewards = [], [], [], []
    for start in range(0, len(tokens), config.micro_batch):
        part = ImageBatch(*(value[start : start + config.micro_batch] for value in batch))
        reduce_at(models.generator, last=start + config.micro_batch >= len(tokens))
        losses = LOSSES[config.method](models, config, part, tokens[start : start + config.micro_batch], seed, clock)
        share = len(part.images) / config.batch_size
        with clock("backward"):
            (losses.terms["loss"] * share).backward()
        means.append(share * mean_terms(losses.terms))
        bad.append(non_finite(losses.terms, len(part.images)))
        rollouts.append(losses.rollouts)
        rewards.append(losses.terms.get("reward", losses.terms["loss"].new_empty(0)))
    return Gradients(torch.stack(means).sum(0), torch.cat(bad, 1), tokens, torch.cat(rollouts), torch.cat(rewards))


def mean_terms(terms: dict[str, Tensor]) -> Tensor:
    """Means of METRICS, float64 `[len(METRICS)]`; 0 for a term that the method does not have."""
    zero = torch.zeros_like(terms["loss"])
    return torch.stack([terms.get(name, zero).detach().double().mean() for name in METRICS])


def non_finite(terms: dict[str, Tensor], images: int) -> Tensor:
    """Bool `[len(METRICS), images]`; a term without a row an image counts for all of them."""
    zero = torch.zeros_like(terms["loss"])
    rows = [~terms.get(name, zero).detach().isfinite() for name in METRICS]
    return torch.stack([row.view(images, -1).any(1) if row.ndim else row.expand(images) for row in rows])


@dataclass(frozen=True)
class Trainer:
    """What stays from step to step. `failed`: 0-d float32 on the device, 1 once a value was not finite."""

    models: Models
    optimizer: torch.optim.Optimizer
    config: AlignConfig
    clock: Clock
    failed: Tensor


def make_trainer(models: Models, config: AlignConfig, clock: Clock = nullcontext) -> Trainer:
    """What `align_step` needs, with AdamW over the generator as it is now: shard it before."""
    device = models.generator.output.weight.device
    return Trainer(models, make_optimizer(models.generator, config), config, clock, torch.zeros((), device=device))


class StepResult:
    """A step's figures on their way to the host, so that the next step can be launched before they are there.

    A reward, loss or gradient that is not finite leaves the weights as they were, on all ranks, in this step and in
    any later one: the optimizer's update is skipped on the device, and `read` says what it was.
    """

    def __init__(self, step: int, figures: Tensor, bad: Tensor, batch: ImageBatch) -> None:
        self.step = step
        self.batch = batch
        self.figures = to_host(figures)
        self.bad = to_host(bad)
        self.arrived = None
        if figures.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> tuple[dict[str, float], bool]:
        """The means of METRICS and the gradient norm; and whether a rank wants to stop. Waits for the step.

        Raises NonFiniteError, on all ranks alike, naming the stage and the images.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        *metrics, norm, bad, stop = self.figures.tolist()
        if bad:
            raise NonFiniteError(next(filter(None, gather_objects(self.reason()))))
        if not math.isfinite(norm):
            raise NonFiniteError("the gradient is not finite though the loss is (stage backward): lower --lr")
        return dict(zip(METRICS, metrics, strict=True)) | {"gradient_norm": norm}, bool(stop)

    def reason(self) -> str:
        for name, stage in STAGES.items():
            rows = self.bad[METRICS.index(name)]
            if rows.any():
                ids = self.batch.image_ids.cpu()[rows].tolist()
                return f"{name} is not finite (stage {stage}) for the images with ids {ids[:8]}"
        return ""


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU, from a GPU without waiting for it."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def align_step(
    trainer: Trainer,
    batch: ImageBatch,
    step: int,
    *,
    gradients: Callable[..., Gradients] = accumulate_gradients,
    stop: bool = False,
) -> StepResult:
    """One optimizer step on one batch.

    The draws of a step depend on (config.seed, step, sample id) alone: not on micro-batches, ranks or backend. Only
    dropout's masks do.

    Args:
        gradients: computes them, by `accumulate_gradients`'s signature.
        stop: this rank wants to stop; all ranks learn it from their `StepResult`.
    """
    config, generator, clock = trainer.config, trainer.models.generator, trainer.clock
    seed = ops.fold_seed(config.seed, step)
    torch.manual_seed(ops.fold_seed(seed, rank()))  # for dropout, the only draw that is not Philox's
    trainer.optimizer.zero_grad(set_to_none=True)
    found = gradients(trainer.models, config, batch, seed, clock)
    with clock("optimizer"):
        flags = torch.stack([found.bad.any(), torch.full_like(found.bad[0, 0], stop)]).to(found.means)
        figures = sum_over_ranks(torch.cat([found.means, flags]))
        norm = clip_gradients(generator.parameters(), config.clip_grad_norm)
        trainer.failed.copy_(torch.maximum(trainer.failed, ((figures[-2] > 0) | ~norm.isfinite()).float()))
        step_unless(trainer.optimizer, trainer.failed)
    figures = torch.cat([figures[:-2], norm.detach().double().view(1), figures[-2:]])
    return StepResult(step, figures, found.bad, batch)


def head_weight(generator: LlamaGen, hidden: Tensor) -> Tensor:
    """The LM head `[V,D]` in the dtype that the forward computed in."""
    return generator.output.weight.to(hidden.dtype)
