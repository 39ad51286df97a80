"""The noisy prefix, and the training loss behind it."""

from __future__ import annotations

import torch
from bench_losses import cross_entropy, of_head
from cases import GivenHidden
from operations import Operation, test_operation, words
from torch import Tensor

__all__ = ["OPERATIONS", "test_operation"]


def random_prefix(tokens: Tensor, vocab_size: int) -> Tensor:
    inputs = tokens[:, :-1]
    replaced = torch.rand(inputs.shape, device=tokens.device) < 0.5
    return torch.where(replaced, torch.randint_like(inputs, vocab_size), inputs)


def drawn_prefix(tokens: Tensor, vocab_size: int) -> Tensor:
    choice, code, *_ = words(len(tokens), tokens.shape[1] - 1, 0, 2, tokens.device)
    replaced = (choice[..., 0] >> 8).double() / 2**24 < 0.5
    return torch.where(replaced, code[..., 0] * vocab_size // 2**32, tokens[:, :-1])


def noisy_prefix_cross_entropy(model: GivenHidden, tokens: Tensor, _: None) -> Tensor:
    """The hidden states are given, whatever the prefix."""
    random_prefix(tokens, len(model.weight))
    return cross_entropy(*model, tokens)


OPERATIONS = [
    Operation(
        "noisy_prefix", ("rand, randint, where", random_prefix), lambda s, e: (16 * s.rows, 0), drawn=drawn_prefix
    ),
    of_head("noisy_prefix_cross_entropy", noisy_prefix_cross_entropy, forward=False),
]
