"""How draws are tested: they are the reference's in float64, but for uniforms on a boundary of the CDF."""

from __future__ import annotations

from typing import Any

import torch
from accuracy import RELATIVE_L2
from fused import DEVICE, cast
from torch import Tensor

from vapi_fast import ops
from vapi_fast.ops.backends import override
from vapi_fast.reference import philox
from vapi_fast.reference.filters import filter_logits
from vapi_fast.reference.philox import GROUP_SAMPLE, default_sample_ids, seed_key, uniform24

FILTERS = [{"top_k": 20}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.6, "temperature": 0.7}]


def draw(logits: Tensor, group_size: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """On Triton, unless the test has chosen another backend."""
    with ops.use_backend(override() or "triton"):
        return ops.group_sample(logits, group_size, **kwargs)


def draw_linear(hidden: Tensor, weight: Tensor, group_size: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
    with ops.use_backend(override() or "triton"):
        return ops.linear_group_sample(hidden, weight, group_size, **kwargs)


def assert_same_draws(
    drawn: tuple[Tensor, Tensor],
    logits: Tensor,
    *,
    seed: int,
    sample_ids: Tensor | None = None,
    first_position: int = 0,
    **filters: float,
) -> None:
    """Tokens and log-probs as the reference's in float64, but for uniforms that lie on a boundary of the CDF."""
    tokens, logprobs = drawn
    batch, length, vocab_size = logits.shape
    group_size = tokens.shape[1]
    options = {"seed": seed, "sample_ids": sample_ids, "first_position": first_position}
    with ops.use_backend("reference"):
        expected, _ = ops.group_sample(logits.double(), group_size, **options, **filters)
    assert tokens.shape == logprobs.shape == (batch, group_size, length)
    assert (tokens.dtype, logprobs.dtype) == (torch.int64, torch.float32)
    assert ((tokens >= 0) & (tokens < vocab_size)).all()
    # At most 1 in 10⁴ differs, and four standard deviations of that many.
    chance = 1e-4 * tokens.numel()
    assert (tokens != expected).sum() <= chance + 4 * chance**0.5

    kept = logits.double() / filters.get("temperature", 1.0)
    kept = filter_logits(kept, filters.get("top_k", 0), filters.get("top_p", 1.0))
    exact = kept.log_softmax(-1)
    probs, index = exact.exp(), tokens.transpose(1, 2)
    counter = (
        torch.arange(length, device=DEVICE)[:, None] + first_position,
        torch.arange(group_size, device=DEVICE),
        default_sample_ids(batch, sample_ids, DEVICE)[:, None, None],
        GROUP_SAMPLE,
    )
    uniform = uniform24(philox(counter, seed_key(seed))[0], torch.float64)
    upper, chosen = probs.cumsum(-1).gather(-1, index), probs.gather(-1, index)
    assert (chosen > 0).all()
    assert (torch.maximum(uniform - upper, upper - chosen - uniform) < 2e-7).all()
    # Relative to the log-probs' own size, but where they are so near 0 that 1 + rest rounds in fp32.
    expected_logprobs = exact.gather(-1, index).transpose(1, 2)
    tolerance = RELATIVE_L2[torch.float32] * expected_logprobs.norm() + 2e-7 * logprobs.numel() ** 0.5
    assert (logprobs - expected_logprobs).norm() <= tolerance


def assert_group_sample(logits: Tensor, group_size: int, dtype: torch.dtype = torch.float32, **kwargs: Any) -> None:
    x = cast(logits, dtype)
    assert_same_draws(draw(x, group_size, **kwargs), x, **kwargs)
