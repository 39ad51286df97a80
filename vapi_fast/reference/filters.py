"""Top-k and top-p."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Top-k, then top-p, as LlamaGen samples: removed logits become −inf.

    Top-k removes what is strictly below the k-th largest logit, so ties stay. Top-p keeps the shortest prefix of the
    descending order whose probability exceeds top_p, at least one token; among equal logits the lower index goes first.
    """
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        exceeded = ordered.softmax(-1).cumsum(-1) > top_p
        first_kept = torch.zeros_like(exceeded[..., :1])
        removed = torch.cat([first_kept, exceeded[..., :-1]], dim=-1)
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -math.inf)
    return logits
