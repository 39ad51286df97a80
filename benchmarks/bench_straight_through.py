"""Hard Gumbel-softmax code embeddings with the soft gradient."""

from __future__ import annotations

import math

import torch
from operations import BOTH, FORWARD, Operation, share, test_operation, wide, words
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "test_operation"]


def gumbel_softmax(logits: Tensor, codebook: Tensor) -> Tensor:
    return F.gumbel_softmax(wide(logits), tau=0.9, hard=True) @ codebook


def drawn(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    images, length, vocabulary = logits.shape
    fours = torch.arange(math.ceil(vocabulary / 4), device=logits.device)
    noise = torch.stack(words(images, length, fours, 3, logits.device), -1).flatten(-2)[..., :vocabulary]
    uniform = ((noise >> 9).double() + 0.5) / 2**23
    soft = ((logits - (-uniform.log()).log()) / 0.9).softmax(-1)
    indices = soft.argmax(-1)
    return (F.one_hot(indices, vocabulary) + soft - soft.detach()) @ codebook, indices


OPERATIONS = [
    Operation(
        "straight_through_lookup",
        ("F.gumbel_softmax", gumbel_softmax),
        lambda s, e: (
            e * s.logits + 4 * s.code_width * (s.vocabulary + s.rows) + 8 * s.rows,
            2 * e * s.logits + 4 * s.code_width * (s.vocabulary + s.rows),
        ),
        drawn=drawn,
        targets=share(0.70, FORWARD, BOTH),
    )
]
