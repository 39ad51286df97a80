"""Drawing groups of tokens from teacher-forced logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .backends import implementation
from .checks import ArgumentChecks


class Draw(NamedTuple):
    """What a group's draws depend on beside the logits."""

    seed: int | Tensor
    sample_ids: Tensor | None
    temperature: float
    top_k: int
    top_p: float
    first_position: int | Tensor
    first_rollouts: Tensor | None

    def check(self, checks: ArgumentChecks, group_size: int) -> None:
        checks.count("group_size", group_size, 1)
        checks.seed(self.seed)
        checks.sample_ids(self.sample_ids)
        checks.positive("temperature", self.temperature)
        checks.count("top_k", self.top_k, 0)
        checks.probability("top_p", self.top_p, zero=False)
        checks.position("first_position", self.first_position)
        if self.first_rollouts is not None:
            checks.integers("first_rollouts", self.first_rollouts, "B")


def group_sample(
    logits: Tensor,
    group_size: int,
    *,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    first_position: int | Tensor = 0,
    first_rollouts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw G independent tokens per position from one softmax.

    By inverse CDF in vocabulary order: the first token whose cumulative probability exceeds u·total, u = k·2⁻²⁴ from
    Philox at (t, g, sample id). A rollout depends on the seed, its image's id and its index in the group alone.

    Args:
        logits: floating `[B, T, V]`, V ≤ 65536; computed in fp32 (float64 in float64).
        group_size: G ≥ 1.
        seed: int in [−2⁶³, 2⁶³) or 0-d int64 tensor.
        sample_ids: int64 `[B]`, global ids of the images; default 0…B−1. The low 32 bits count.
        temperature: > 0, divides the logits.
        top_k: keep the k largest logits and their ties; 0 keeps all.
        top_p: in (0, 1]; then keep the most likely tokens up to the one that makes their probability exceed top_p; 1
            keeps all.
        first_position: t of `logits[:, 0]`, for token-by-token decoding: int ≥ 0, or 0-d int64 tensor (not checked).
        first_rollouts: int64 `[B]`, index in its group of each row's first draw, for rows that are rollouts of one
            image, each with logits of its own; default 0. The low 32 bits count.

    Returns:
        tokens int64 `[B, G, T]`; logprobs `[B, G, T]`, fp32 (float64 for float64), in nats, of the distribution drawn
        from, after temperature and filters. No gradient. NaN logits give valid tokens and NaN logprobs.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    """
    checks = ArgumentChecks("group_sample")
    checks.floating("logits", logits, "B T V")
    checks.vocabulary("logits")
    draw = Draw(seed, sample_ids, temperature, top_k, top_p, first_position, first_rollouts)
    draw.check(checks, group_size)
    return implementation(logits).group_sample(logits, group_size, **draw._asdict())


def linear_group_sample(
    hidden: Tensor,
    weight: Tensor,
    group_size: int,
    *,
    bias: Tensor | None = None,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    first_position: int | Tensor = 0,
    first_rollouts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`group_sample` of the logits hidden·weightᵀ + bias: the same draws, without the caller holding the logits.

    hidden floating `[B, T, D]`, weight floating `[V, D]` (the LM head), bias floating `[V]` or None; the rest, the
    results and the errors are those of `group_sample`.
    """
    checks = ArgumentChecks("linear_group_sample")
    checks.floating("hidden", hidden, "B T D")
    checks.floating("weight", weight, "V D")
    checks.vocabulary("weight")
    checks.not_empty("weight", "D")
    if bias is not None:
        checks.floating("bias", bias, "V")
    draw = Draw(seed, sample_ids, temperature, top_k, top_p, first_position, first_rollouts)
    draw.check(checks, group_size)
    return implementation(hidden).linear_group_sample(hidden, weight, group_size, bias=bias, **draw._asdict())
