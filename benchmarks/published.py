"""Operations as the published recipe does them: the batch repeated G-fold, or G passes; what a CPU is compared with.

Each takes the inputs of the case in `cases.py` that names it.
"""

from __future__ import annotations

from collections.abc import Callable

import bench_losses as losses
import bench_perceptual as perceptual
import torch
from torch import Tensor
from torch.nn import functional as F


def group_sample(logits: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """A softmax and a draw for each rollout."""
    drawn = [torch.multinomial(logits.softmax(-1).flatten(0, 1), 1) for _ in range(group_size)]
    tokens = torch.stack([each.view(logits.shape[:2]) for each in drawn], dim=1)
    logprobs = logits.log_softmax(-1).gather(-1, tokens.transpose(1, 2))
    return tokens, logprobs.transpose(1, 2)


def linear_group_sample(hidden: Tensor, weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return group_sample(F.linear(hidden, weight), group_size)


def policy_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, advantages: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    """Logits for every rollout, each with its own copy of the hidden states."""
    group_size = tokens.shape[1]
    repeated, targets = (x.repeat_interleave(group_size, 0) for x in (hidden, targets))
    return losses.policy_loss(repeated, weight, tokens.flatten(0, 1)[:, None], advantages.flatten()[:, None], targets)


def lpips_distance(a: list[Tensor], b: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The image's features normalised for every rollout."""
    group_size = a[0].shape[1]
    repeated = [x.repeat_interleave(group_size, 0) for x in b]
    return perceptual.normalized_differences([x.flatten(0, 1) for x in a], repeated, weights).view(-1, group_size)


def mse(a: Tensor, b: Tensor) -> Tensor:
    group_size = a.shape[1]
    return perceptual.mse_loss(a.flatten(0, 1), b.repeat_interleave(group_size, 0)).view(-1, group_size)


PUBLISHED: dict[str, Callable] = {
    "group_sample": group_sample,
    "linear_group_sample": linear_group_sample,
    "policy_loss": policy_loss,
    "lpips_distance": lpips_distance,
    "mse": mse,
}
