"""The corruption of a teacher-forced prefix, and the loss of the clean tokens after it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .losses import linear_cross_entropy
from .philox import MASK, NOISY_PREFIX, default_sample_ids, philox, seed_key


def noisy_prefix(
    tokens: Tensor, noise_prob: float, vocab_size: int, *, seed: int | Tensor, sample_ids: Tensor | None = None
) -> Tensor:
    """Input tokens, each replaced with probability ξ by a random one; see `vapi_fast.ops.noisy_prefix`."""
    inputs = tokens[:, :-1]
    positions = torch.arange(inputs.shape[1], device=tokens.device)
    ids = default_sample_ids(tokens.shape[0], sample_ids, tokens.device)[:, None]
    choice, replacement, _, _ = philox((positions, 0, ids, NOISY_PREFIX), seed_key(seed))
    # u < ξ for u = k·2⁻²⁴ is k < ⌈ξ·2²⁴⌉: an integer comparison is the same on every backend.
    replaced = (choice >> 8) < math.ceil(noise_prob * 2**24)
    # (x·V) >> 32 maps a word to 0…V−1. The product of two words may pass 2⁶³; the mask drops the sign extension.
    return torch.where(replaced, ((replacement * vocab_size) >> 32) & MASK, inputs)


def noisy_prefix_cross_entropy(
    model: nn.Module,
    tokens: Tensor,
    condition: Tensor,
    *,
    noise_prob: float,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the clean tokens after a corrupted prefix; see `vapi_fast.ops.noisy_prefix_cross_entropy`."""
    weight, bias = model.output.weight, getattr(model.output, "bias", None)
    prefix = noisy_prefix(tokens, noise_prob, weight.shape[0], seed=seed, sample_ids=sample_ids)
    hidden = model(prefix, condition, return_hidden=True)
    return linear_cross_entropy(hidden, weight, tokens, bias=bias)
