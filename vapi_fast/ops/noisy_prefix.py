"""The corruption of a teacher-forced prefix, and the loss of the clean tokens after it."""

from __future__ import annotations

from torch import Tensor, nn

from .backends import implementation
from .checks import MAX_VOCABULARY, ArgumentChecks
from .losses import linear_cross_entropy


def noisy_prefix(
    tokens: Tensor, noise_prob: float, vocab_size: int, *, seed: int | Tensor, sample_ids: Tensor | None = None
) -> Tensor:
    """Input tokens of a teacher-forced forward, each replaced with probability ξ by a uniformly random one.

    The replacement may equal the original. The last token is never an input, so it is left out.

    Args:
        tokens: int64 `[B, T]`, T ≥ 1, in [0, vocab_size).
        noise_prob: ξ in [0, 1].
        vocab_size: V in [1, 65536].
        seed, sample_ids: as in `group_sample`.

    Returns:
        int64 `[B, T − 1]`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    """
    checks = ArgumentChecks("noisy_prefix")
    checks.integers("tokens", tokens, "B T")
    checks.not_empty("tokens", "T")
    checks.probability("noise_prob", noise_prob)
    checks.count("vocab_size", vocab_size, 1)
    if vocab_size > MAX_VOCABULARY:
        raise ValueError(f"noisy_prefix: vocab_size must be at most {MAX_VOCABULARY}, got {vocab_size}")
    checks.seed(seed)
    checks.sample_ids(sample_ids)
    checks.token_range("tokens", tokens, vocab_size)
    return implementation(tokens).noisy_prefix(tokens, noise_prob, vocab_size, seed=seed, sample_ids=sample_ids)


def noisy_prefix_cross_entropy(
    model: nn.Module,
    tokens: Tensor,
    condition: Tensor,
    *,
    noise_prob: float,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the clean tokens given a corrupted prefix: the drop-in for a LlamaGen training step.

    Args:
        model: called as `model(prefix, condition, return_hidden=True)` → hidden `[B, T, D]`; its LM head is
            `model.output`, a linear layer `[V, D]` with or without a bias.
        tokens: int64 `[B, T]`, T ≥ 1.
        condition: what the model takes, e.g. class ids int64 `[B]`.
        noise_prob, seed, sample_ids: as in `noisy_prefix`.

    Returns:
        0-d mean over B·T, in nats, with gradients to the model.

    Raises:
        TypeError, ValueError: as `noisy_prefix` and `linear_cross_entropy`.
    """
    weight, bias = model.output.weight, getattr(model.output, "bias", None)
    prefix = noisy_prefix(tokens, noise_prob, weight.shape[0], seed=seed, sample_ids=sample_ids)
    return linear_cross_entropy(model(prefix, condition, return_hidden=True), weight, tokens, bias=bias)
