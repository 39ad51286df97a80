"""A group's draws from logits or hidden states."""

from __future__ import annotations

import math

import torch
from operations import FORWARD, Operation, test_operation, wide, words
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "test_operation"]


def multinomial(logits: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    probabilities = wide(logits).softmax(-1)
    tokens = torch.multinomial(probabilities.flatten(0, 1), group_size, replacement=True).view(*logits.shape[:2], -1)
    return tokens.transpose(1, 2), probabilities.gather(-1, tokens).log().transpose(1, 2)


def filtered(logits: Tensor) -> Tensor:
    """Temperature 0.9, then the 100 largest, then the fewest of these with a probability of more than 0.9."""
    logits = wide(logits) / 0.9
    logits = logits.masked_fill(logits < logits.topk(100).values[..., -1:], -math.inf)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # which of equal logits goes is fixed
    removed = (ordered.softmax(-1).cumsum(-1) > 0.9).roll(1, -1)
    removed[..., 0] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)


def drawn(logits: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative probability exceeds a uniform number."""
    rollouts = torch.arange(group_size, device=logits.device)
    uniform = (words(*logits.shape[:2], rollouts, 1, logits.device)[0] >> 8).double() / 2**24
    probabilities = logits.softmax(-1)
    tokens = (probabilities.cumsum(-1)[:, :, None] <= uniform[..., None]).sum(-1)
    return tokens.transpose(1, 2), probabilities.gather(-1, tokens).log().transpose(1, 2)


OPERATIONS = [
    Operation(
        "group_sample",
        ("multinomial", multinomial),
        lambda s, e: (e * s.logits + 12 * s.group * s.rows, 0),
        drawn=drawn,
        targets={FORWARD: [("ms", 0.25)]},
    ),
    Operation(
        "group_sample top-k, top-p",
        ("multinomial", lambda logits, group_size: multinomial(filtered(logits), group_size)),
        lambda s, e: (e * s.logits + 12 * s.group * s.rows, 0),
        drawn=lambda logits, group_size: drawn(filtered(logits), group_size),
    ),
    Operation(
        "linear_group_sample",
        ("multinomial", lambda hidden, weight, group_size: multinomial(F.linear(hidden, weight), group_size)),
        lambda s, e: (e * s.width * (s.rows + s.vocabulary) + 12 * s.group * s.rows, 0),
        lambda s: (s.gemm, 0),
        drawn=lambda hidden, weight, group_size: drawn(F.linear(hidden, weight), group_size),
    ),
]
