"""VA-π alignment: batch → rollout → reward → loss → step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.checkpoint import CheckpointError
from vapi_fast.clock import StageClock
from vapi_fast.config import AlignConfig
from vapi_fast.data import ImageBatch
from vapi_fast.distributed import sum_gradients, sum_over_ranks
from vapi_fast.models import LPIPS, LlamaGen, VQTokenizer
from vapi_fast.reward import PixelReward
from vapi_fast.rollout import roll_out, teacher_forced_hidden, token_logprobs

DECODED_PIXELS = 1 << 21  # decoded at once, over the sequences of a chunk
METRICS = ("loss", "reward", "mse", "lpips", "cross_entropy", "kl")


class NonFiniteError(RuntimeError):
    """A reward, loss or gradient is NaN or infinite; raised before the optimizer step, so the weights are good."""


@dataclass(frozen=True)
class Models:
    """What a step works with. `generator` is trained, the rest is frozen; `base` is a copy of its start, if needed."""

    generator: LlamaGen
    tokenizer: VQTokenizer
    reward: PixelReward
    base: LlamaGen | None = None


def load_models(config: AlignConfig, device: torch.device) -> Models:
    """Load the checkpoints that `config` names; raises CheckpointError when one does not fit."""
    tokenizer = VQTokenizer.from_checkpoint(config.vq_ckpt, config.tokenizer)
    if config.vgg_weights is None:
        lpips = LPIPS.from_name(config.lpips)
    else:
        lpips = LPIPS.from_checkpoint(config.vgg_weights, config.lpips)
    generator = LlamaGen.from_checkpoint(config.gpt_ckpt, config.model, grid_size=config.grid_size)
    for module in (tokenizer, lpips):
        module.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    if generator.config.caption_tokens:
        raise CheckpointError(
            f"{config.gpt_ckpt} is a text-conditioned generator, and the image data has class labels only: pass a "
            "class-conditional checkpoint"
        )
    generator.to(device)
    base = copy.deepcopy(generator).eval().requires_grad_(False) if config.prior == "kl" or config.compare else None
    generator.dropout = config.dropout
    chunk = max(1, min(64, DECODED_PIXELS // config.image_size**2))
    reward = PixelReward(tokenizer, lpips, config.mse_weight, config.lpips_weight, chunk)
    return Models(generator.train(), tokenizer, reward, base)


def make_optimizer(generator: nn.Module, config: AlignConfig) -> torch.optim.AdamW:
    """AdamW as in the paper: betas 0.9/0.999, no weight decay on the norms' weights."""
    norms = [p for name, p in generator.named_parameters() if "norm" in name]
    others = [p for name, p in generator.named_parameters() if "norm" not in name]
    groups = [{"params": others, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=norms[0].is_cuda)


def vapi_loss(
    models: Models, config: AlignConfig, batch: ImageBatch, tokens: Tensor, seed: int, clock: StageClock
) -> dict[str, Tensor]:
    """The paper's objective, one micro-batch: one forward, G rollouts, group advantages, clipped policy loss, prior."""
    with clock("rollout"):
        draw = {"seed": seed, "sample_ids": batch.sample_ids}
        rollout = roll_out(models.generator, tokens, batch.labels, config, **draw)
    with clock("reward"):
        reward = models.reward.score(rollout.tokens, batch.images)
        advantages = ops.group_advantages(reward.total)
    with clock("loss"):
        base_logprobs = None
        if config.prior == "kl":
            with torch.no_grad():
                hidden = teacher_forced_hidden(models.base, tokens, batch.labels, config, **draw)
            base_logprobs = token_logprobs(hidden, models.base.output.weight, rollout.tokens, config.temperature)
        filtered = config.top_k > 0 or config.top_p < 1
        loss = ops.policy_loss(
            rollout.hidden,
            models.generator.output.weight,
            rollout.tokens,
            advantages,
            tokens,
            old_logprobs=rollout.logprobs if filtered else None,
            base_logprobs=base_logprobs,
            clip_range=config.clip_range,
            prior_weight=config.prior_weight if config.prior == "ce" else 0.0,
            kl_weight=config.prior_weight if config.prior == "kl" else 0.0,
            temperature=config.temperature,
        )
    distances = {"reward": reward.total, "mse": reward.mse, "lpips": reward.lpips}
    return {"loss": loss.loss, **distances, "cross_entropy": loss.prior, "kl": loss.kl}


def ste_loss(
    models: Models, config: AlignConfig, batch: ImageBatch, tokens: Tensor, seed: int, clock: StageClock
) -> dict[str, Tensor]:
    """Straight-through baseline: MSE + LPIPS of a hard Gumbel-softmax draw, back-propagated to the logits."""
    with clock("rollout"):
        draw = {"seed": seed, "sample_ids": batch.sample_ids}
        hidden = teacher_forced_hidden(models.generator, tokens, batch.labels, config, **draw)
        logits = models.generator.output(hidden).float() / config.temperature
    with clock("reward"):
        embeddings, _ = ops.straight_through_lookup(logits, models.tokenizer.codebook(), tau=1.0, **draw)
        reward = models.reward.compare(models.tokenizer.decode_embeddings(embeddings), batch.images)
    with clock("loss"):
        prior = ops.linear_cross_entropy(hidden, models.generator.output.weight, tokens)
    loss = -reward.total.mean() + config.prior_weight * prior
    return {"loss": loss, "reward": reward.total, "mse": reward.mse, "lpips": reward.lpips, "cross_entropy": prior}


def ntp_loss(
    models: Models, config: AlignConfig, batch: ImageBatch, tokens: Tensor, seed: int, clock: StageClock
) -> dict[str, Tensor]:
    """Next-token prediction alone, on the same images: what the prior does without a reward."""
    with clock("rollout"):
        hidden = teacher_forced_hidden(
            models.generator, tokens, batch.labels, config, seed=seed, sample_ids=batch.sample_ids
        )
    with clock("loss"):
        loss = ops.linear_cross_entropy(hidden, models.generator.output.weight, tokens)
    return {"loss": loss, "cross_entropy": loss}


LOSSES: dict[str, Callable[..., dict[str, Tensor]]] = {"vapi": vapi_loss, "ste": ste_loss, "ntp": ntp_loss}


def accumulate_gradients(
    models: Models, config: AlignConfig, batch: ImageBatch, seed: int, clock: StageClock
) -> dict[str, float]:
    """Forward and backward over this rank's images, micro-batch by micro-batch; means over all ranks' images.

    Raises NonFiniteError when a reward or the loss is not finite, naming the images.
    """
    with clock("encode"), torch.no_grad():
        tokens = models.tokenizer.encode(batch.images)
    zero = torch.zeros((), device=tokens.device)
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=tokens.device)
    for start in range(0, len(tokens), config.micro_batch):
        part = ImageBatch(*(value[start : start + config.micro_batch] for value in batch))
        terms = LOSSES[config.method](models, config, part, tokens[start : start + config.micro_batch], seed, clock)
        share = len(part.images) / config.batch_size
        with clock("backward"):
            (terms["loss"] * share).backward()
        means = torch.stack([terms.get(name, zero).detach().mean() for name in METRICS]).double()
        if not means.isfinite().all():
            raise_non_finite(terms, part)
        sums += means * share
    return dict(zip(METRICS, sum_over_ranks(sums).tolist(), strict=True))


def raise_non_finite(terms: dict[str, Tensor], part: ImageBatch) -> None:
    for name in ("reward", "mse", "lpips", "loss", "cross_entropy", "kl"):
        bad = ~terms.get(name, torch.zeros(())).isfinite()
        if bad.any():
            rows = bad.view(len(bad), -1).any(1) if bad.ndim else bad.expand(len(part.image_ids))
            ids = part.image_ids[rows].tolist()
            raise NonFiniteError(f"{name} is not finite for the images with ids {ids[:8]}")


def align_step(
    models: Models,
    optimizer: torch.optim.Optimizer,
    config: AlignConfig,
    batch: ImageBatch,
    step: int,
    clock: StageClock,
) -> dict[str, float]:
    """One optimizer step on one batch; returns the means of METRICS and the gradient norm.

    The draws of a step depend on (config.seed, step, sample id) alone: not on micro-batches, ranks or backend.
    """
    seed = ops.fold_seed(config.seed, step)
    torch.manual_seed(seed)  # for dropout, the only draw that is not Philox's
    optimizer.zero_grad(set_to_none=True)
    metrics = accumulate_gradients(models, config, batch, seed, clock)
    with clock("optimizer"):
        sum_gradients(models.generator.parameters())
        norm = nn.utils.clip_grad_norm_(models.generator.parameters(), config.clip_grad_norm)
        if not norm.isfinite():
            raise NonFiniteError("the gradient is not finite though the loss is: lower --lr, or go on in float32")
        optimizer.step()
    return metrics | {"gradient_norm": norm.item()}
