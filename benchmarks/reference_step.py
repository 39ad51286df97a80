"""One step of the published VA-π recipe, written plainly: what `--path` compares with and the tests hold our step to.

It does what the released training script (Lil-Shake/VA-Pi, train_c2i_grpo.py) does, in its order: a sampling forward
without gradient or dropout; G token sequences drawn one after another; decoding and LPIPS eight sequences at a time in
float32 (TF32 products), with both images of every pair through the network; then a training forward and backward over
the G-fold repeated batch, eight sequences at a time, each row with dropout of its own if there is any (the script's
launcher asks for it, the script alone does not), and with the frozen base model's forward that the script runs whether
or not the KL term is used. Plain PyTorch throughout, maps in NCHW: none of our kernels or layouts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast import ops, reference
from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.models import Models, frozen_copy
from vapi_fast.alignment.rollout import condition_of
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.models import LPIPS, Condition, Dropout, LlamaGen, VQTokenizer
from vapi_fast.models.transformer import Block
from vapi_fast.runtime.clock import Clock

CHUNK = 8  # images encoded, sequences decoded, compared, and trained on at once
M = TypeVar("M", bound=nn.Module)


class PublishedModels(NamedTuple):
    """What the published recipe works with: our generator, and the frozen networks in plain layouts (NCHW)."""

    generator: LlamaGen
    tokenizer: VQTokenizer
    lpips: LPIPS
    base: LlamaGen

    @classmethod
    def of(cls, models: Models) -> PublishedModels:
        tokenizer, lpips = in_plain_layout(models.tokenizer), in_plain_layout(models.reward.lpips)
        return cls(models.generator, tokenizer, lpips, models.base or frozen_copy(models.generator))


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


def published_step(
    models: PublishedModels,
    config: AlignConfig,
    batch: ImageBatch,
    seed: int,
    clock: Clock = nullcontext,
    *,
    tokens: Tensor | None = None,
    drawn: Tensor | None = None,
    shared_masks: bool = False,
) -> dict[str, Tensor]:
    """Add one step's gradients to `models.generator`'s; returns the loss, the share of clipped tokens (both 0-d) and
    the rollouts' terms `[B,G]`.

    Args:
        seed: of the noise, if there is any; the rollouts are drawn from PyTorch's own generator, as released.
        clock: times the stages.
        tokens, drawn: int64 `[B,T]` and `[B,G,T]`, the images' tokens and the rollouts to train on instead of its own,
            to compare with another implementation (its own are made all the same, and timed).
        shared_masks: give each row the dropout that ours has for its image, to compare, instead of its own.
    """
    group_size = config.group_size
    with ops.use_backend("reference"), released_precision():
        with clock("encode"), torch.no_grad():
            own_tokens = torch.cat([encode(models.tokenizer, images) for images in batch.images.split(CHUNK)])
            tokens = own_tokens if tokens is None else tokens
            inputs = context(models, config, batch, tokens, seed)
        with clock("forward"), torch.no_grad():
            condition = models.generator.checked_condition(*condition_of(batch))
            logits = forward(models.generator, inputs, condition)
        with clock("sample"):
            own_drawn = draw(logits, group_size, config.temperature)
            drawn = own_drawn if drawn is None else drawn
            old_logprobs = gathered(logits, config, drawn.transpose(1, 2)).transpose(1, 2)
            del logits
        rewards = score(models, config, drawn.flatten(0, 1), batch.images.repeat_interleave(group_size, 0), clock)
        grouped = {name: value.unflatten(0, (-1, group_size)) for name, value in rewards.items()}
        with clock("loss"):
            total = grouped["reward"]
            advantages = (total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + config.advantage_eps)
            limit = config.advantage_clip or math.inf
            rows = {
                "inputs": inputs.repeat_interleave(group_size, 0),
                "targets": tokens.repeat_interleave(group_size, 0),
                "sample_ids": batch.sample_ids.repeat_interleave(group_size, 0),
                "drawn": drawn.flatten(0, 1),
                "old_logprobs": old_logprobs.flatten(0, 1),
                "advantages": advantages.clamp(-limit, limit).flatten(),
            }
            condition = condition.take(torch.arange(len(tokens), device=tokens.device).repeat_interleave(group_size))
        return train(models, config, rows, condition, seed if shared_masks else None, clock) | grouped


@contextmanager
def released_precision() -> Iterator[None]:
    """TF32 in float32's matrix products and convolutions, as the released script turns it on."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def encode(tokenizer: VQTokenizer, images: Tensor) -> Tensor:
    """Tokens int64 `[N,T]`: the nearest code by ‖z‖² + ‖e‖² − 2 z·e, as LlamaGen's quantizer has it."""
    z, codebook = F.normalize(tokenizer.latents(images), dim=-1).flatten(0, 2), tokenizer.codebook()
    distances = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
    return distances.argmin(1).unflatten(0, (len(images), -1))


def decode(tokenizer: VQTokenizer, tokens: Tensor) -> Tensor:
    """Images `[N,3,H,W]` of tokens `[N,T]`, whose codes are put into an NCHW map, as LlamaGen's quantizer does."""
    side = round(tokens.shape[1] ** 0.5)
    codes = F.embedding(tokens, tokenizer.codebook()).unflatten(1, (side, side))
    return tokenizer.decoder(tokenizer.post_quant_conv(codes.permute(0, 3, 1, 2).contiguous()))


def context(models: PublishedModels, config: AlignConfig, batch: ImageBatch, tokens: Tensor, seed: int) -> Tensor:
    """The inputs `[B,T−1]`: the image's tokens, some replaced by noise."""
    if not config.noise_prob:
        return tokens[:, :-1]
    vocab_size = models.generator.config.vocab_size
    return ops.noisy_prefix(tokens, config.noise_prob, vocab_size, seed=seed, sample_ids=batch.sample_ids)


class RowDropout(NamedTuple):
    """Dropout by PyTorch's own generator, each row for itself, as LlamaGen's modules have it in training mode."""

    share: float
    label_share: float

    def states(self, x: Tensor, site: int) -> Tensor:
        return F.dropout(x, self.share)

    def condition(self, rows: Tensor, unconditional: Tensor) -> Tensor:
        return torch.where(torch.rand(len(rows), device=rows.device) < self.label_share, unconditional, rows)


class SharedDropout(Dropout):
    """Ours, by our kernel: in plain PyTorch its masks take longer than the whole forward on a GPU."""

    def states(self, x: Tensor, site: int) -> Tensor:
        with ops.use_backend("triton" if x.is_cuda else "reference"):
            return super().states(x, site)


def forward(
    generator: LlamaGen, inputs: Tensor, condition: Condition, dropout: RowDropout | SharedDropout | None = None
) -> Tensor:
    """Float32 logits `[N,T,V]` by LlamaGen's own forward, operation by operation; in bf16 on a GPU, as released."""
    dtype = torch.bfloat16 if inputs.is_cuda else torch.float32
    rows, mask = condition
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
        if dropout:
            rows = dropout.condition(rows, generator.unconditional(rows))
        h = torch.cat([generator.cls_embedding(rows), generator.tok_embeddings(inputs)], dim=1).to(dtype)
        h = dropout.states(h, 0) if dropout else h
        rotary = generator.rotary[: h.shape[1]]
        if mask is not None:  # of keys, to which each position adds itself
            keys = F.pad(mask, (0, h.shape[1] - mask.shape[1]), value=True)[:, None, None]
            square = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device)
            mask = keys & square.tril() | torch.eye(h.shape[1], dtype=torch.bool, device=h.device)
        for i, layer in enumerate(generator.layers):
            h = block(layer, h, rotary, mask, lambda x, place, i=i: dropout.states(x, 2 * i + place) if dropout else x)
        h = h[:, generator.config.prefix_len - 1 :]
        return generator.output(rms_norm(h, generator.norm.weight)).float()


def block(
    layer: Block,
    h: Tensor,
    rotary: Tensor,
    mask: Tensor | None = None,
    dropped: Callable[[Tensor, int], Tensor] = lambda x, place: x,
) -> Tensor:
    """States `[N,S,D]` after a layer; dropped: of what its first and its second branch add."""
    attention, feed_forward = layer.attention, layer.feed_forward
    n = rms_norm(h, layer.attention_norm.weight)
    q, k, v = attention.wqkv(n).unflatten(-1, (3, attention.heads, -1)).unbind(2)
    q, k = reference.rotary_2d(q, rotary), reference.rotary_2d(k, rotary)
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*by_head, attn_mask=mask, is_causal=mask is None)
    h = h + dropped(attention.wo(out.transpose(1, 2).flatten(2)), 1)
    n = rms_norm(h, layer.ffn_norm.weight)
    return h + dropped(feed_forward.w2(F.silu(feed_forward.w1(n)) * feed_forward.w3(n)), 2)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return normed.to(x.dtype) * weight.to(x.dtype)


def draw(logits: Tensor, group_size: int, temperature: float) -> Tensor:
    """G sequences `[B,G,T]`, one softmax and one multinomial each."""
    batch, length, vocab_size = logits.shape
    sequences = []
    for _ in range(group_size):
        probabilities = (logits / temperature).reshape(-1, vocab_size).softmax(-1)
        sequences.append(torch.multinomial(probabilities, 1).view(batch, length))
        del probabilities
    return torch.stack(sequences, dim=1)


def gathered(logits: Tensor, config: AlignConfig, tokens: Tensor) -> Tensor:
    """Log-probs of tokens `[N,T,·]` under logits `[N,T,V]`."""
    return (logits / config.temperature).log_softmax(-1).gather(-1, tokens)


@torch.no_grad()
def score(
    models: PublishedModels, config: AlignConfig, sequences: Tensor, images: Tensor, clock: Clock
) -> dict[str, Tensor]:
    """Reward, MSE and LPIPS `[N]` of sequences `[N,T]` for images `[N,3,H,W]`, eight at a time."""
    parts = []
    for drawn, target in zip(sequences.split(CHUNK), images.split(CHUNK), strict=True):
        with clock("decode"):
            decoded = decode(models.tokenizer, drawn)
        with clock("lpips"):
            mse = (decoded - target).square().mean((1, 2, 3))
            lpips = models.lpips(decoded, target)
            parts.append((-(config.mse_weight * mse + config.lpips_weight * lpips), mse, lpips))
    return dict(zip(("reward", "mse", "lpips"), map(torch.cat, zip(*parts, strict=True)), strict=True))


def train(
    models: PublishedModels,
    config: AlignConfig,
    rows: dict[str, Tensor],
    condition: Condition,
    seed: int | None,
    clock: Clock,
) -> dict[str, Tensor]:
    """Forward and backward over all N sequences, eight at a time; the means of loss and clipped share.

    seed: of our masks; None: each row has its own.
    """
    count = len(rows["drawn"])
    shares = config.dropout, config.label_dropout
    totals = {name: torch.zeros((), device=rows["drawn"].device) for name in ("loss", "clipped")}
    for start in range(0, count, CHUNK):
        part = {name: value[start : start + CHUNK] for name, value in rows.items()}
        drawn_from = condition.take(slice(start, start + CHUNK))
        with clock("forward"):
            dropout = None
            if any(shares):
                dropout = RowDropout(*shares) if seed is None else SharedDropout(*shares, seed, part["sample_ids"])
            logits = forward(models.generator, part["inputs"], drawn_from, dropout)
            with torch.no_grad():
                base_logits = forward(models.base, part["inputs"], drawn_from)
        with clock("loss"):
            share = len(part["drawn"]) / count
            loss, clipped = sequence_loss(config, part, logits, base_logits)
        with clock("backward"):
            (loss * share).backward()
        totals["loss"] += loss.detach() * share
        totals["clipped"] += clipped * share
    return totals


def sequence_loss(
    config: AlignConfig, part: dict[str, Tensor], logits: Tensor, base_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Clipped policy loss and prior of a few sequences `[N,T]`; and the share of tokens whose ratio is clipped."""
    drawn = part["drawn"].unsqueeze(-1)
    logprobs = gathered(logits, config, drawn).squeeze(-1)
    base = gathered(base_logits, config, drawn).squeeze(-1)
    divergence = (base - logprobs).exp() - (base - logprobs) - 1
    ratio = (logprobs - part["old_logprobs"]).exp()
    advantages = part["advantages"].unsqueeze(1)
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped)
    outside = ((ratio.detach() - 1).abs() > config.clip_range).float().mean()
    if config.prior == "kl":
        return (policy + config.prior_weight * divergence).mean(), outside
    prior = F.cross_entropy(logits.flatten(0, 1), part["targets"].flatten())
    return policy.mean() + config.prior_weight * prior, outside
