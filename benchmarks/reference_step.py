"""One step of the published VA-π recipe, written plainly: what `--compare` times and what the tests hold our step to.

It does what the released training script (Lil-Shake/VA-Pi, train_c2i_grpo.py) does, in its order: a sampling forward
without gradient; G token sequences drawn one after another; decoding and LPIPS eight sequences at a time, with both
images of every pair through the network; then a training forward and backward over the G-fold repeated batch, eight
sequences at a time, with the frozen base model's forward that the script runs whether or not the KL term is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vapi_fast import ops
from vapi_fast.alignment import Models
from vapi_fast.config import AlignConfig
from vapi_fast.data import ImageBatch
from vapi_fast.models import LlamaGen

CHUNK = 8  # sequences decoded, compared, and trained on at once


def published_step(
    models: Models, config: AlignConfig, batch: ImageBatch, step: int, drawn: Tensor | None = None
) -> float:
    """Add one step's gradients to `models.generator`'s; returns the loss.

    Args:
        drawn: int64 `[B,G,T]`, rollouts to use instead of drawing them (to compare with another implementation).
    """
    group_size = config.group_size
    tokens = models.tokenizer.encode(batch.images)
    seed = ops.fold_seed(config.seed, step)
    inputs = tokens[:, :-1]
    if config.noise_prob:
        inputs = ops.noisy_prefix(
            tokens, config.noise_prob, models.generator.config.vocab_size, seed=seed, sample_ids=batch.sample_ids
        )

    with torch.no_grad():
        models.generator.eval()
        logits = forward(models.generator, inputs, batch.labels)
        if drawn is None:
            drawn = draw(logits, group_size, config.temperature)
        old_logprobs = (logits / config.temperature).log_softmax(-1).gather(-1, drawn.transpose(1, 2)).transpose(1, 2)
        rewards = score(models, config, drawn.flatten(0, 1), batch.images.repeat_interleave(group_size, 0))
    rewards = rewards.unflatten(0, (-1, group_size))
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-8)
    advantages = advantages.clamp(-5, 5)

    models.generator.train()
    rows = {
        "inputs": inputs.repeat_interleave(group_size, 0),
        "labels": batch.labels.repeat_interleave(group_size, 0),
        "targets": tokens.repeat_interleave(group_size, 0),
        "drawn": drawn.flatten(0, 1),
        "old_logprobs": old_logprobs.flatten(0, 1),
        "advantages": advantages.flatten(),
    }
    total = 0.0
    count = len(rows["drawn"])
    for start in range(0, count, CHUNK):
        part = {name: value[start : start + CHUNK] for name, value in rows.items()}
        loss = sequence_loss(models, config, part) * len(part["drawn"]) / count
        loss.backward()
        total += loss.item()
    return total


def forward(generator: LlamaGen, inputs: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
        return generator(inputs, labels)


def draw(logits: Tensor, group_size: int, temperature: float) -> Tensor:
    """G sequences `[B,G,T]`, one softmax and one multinomial each."""
    batch, length, vocab_size = logits.shape
    sequences = []
    for _ in range(group_size):
        probabilities = (logits / temperature).reshape(-1, vocab_size).softmax(-1)
        sequences.append(torch.multinomial(probabilities, 1).view(batch, length))
    return torch.stack(sequences, dim=1)


def score(models: Models, config: AlignConfig, sequences: Tensor, images: Tensor) -> Tensor:
    """R = −(w_mse · MSE + w_lpips · LPIPS) of sequences `[N,T]` for images `[N,3,H,W]`, eight at a time."""
    rewards = []
    for drawn, target in zip(sequences.split(CHUNK), images.split(CHUNK), strict=True):
        decoded = models.tokenizer.decode(drawn)
        mse = (decoded - target).square().mean((1, 2, 3))
        rewards.append(-(config.mse_weight * mse + config.lpips_weight * models.reward.lpips(decoded, target)))
    return torch.cat(rewards)


def sequence_loss(models: Models, config: AlignConfig, part: dict[str, Tensor]) -> Tensor:
    """Clipped policy loss and prior of a few sequences `[N,T]`."""
    logits = forward(models.generator, part["inputs"], part["labels"])
    logprobs = (logits / config.temperature).log_softmax(-1).gather(-1, part["drawn"].unsqueeze(-1)).squeeze(-1)
    divergence = torch.zeros_like(logprobs)
    if models.base is not None:
        with torch.no_grad():
            base_logits = forward(models.base, part["inputs"], part["labels"])
            base = (
                (base_logits / config.temperature).log_softmax(-1).gather(-1, part["drawn"].unsqueeze(-1)).squeeze(-1)
            )
        divergence = (base - logprobs).exp() - (base - logprobs) - 1
    ratio = (logprobs - part["old_logprobs"]).exp()
    advantages = part["advantages"].unsqueeze(1)
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped)
    if config.prior == "kl":
        return (policy + config.prior_weight * divergence).mean()
    return policy.mean() + config.prior_weight * F.cross_entropy(logits.flatten(0, 1), part["targets"].flatten())
