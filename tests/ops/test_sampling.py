"""Drawing tokens: against naive inverse CDF, exact probabilities, LlamaGen's filters, and in what a draw depends on."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from vapi_fast import ops
from vapi_fast.reference.philox import GROUP_SAMPLE, NOISY_PREFIX, philox, seed_key


def uniform(position: int, rollout: int, sample_id: int, seed: int) -> float:
    return (philox((position, rollout, sample_id, GROUP_SAMPLE), seed_key(seed))[0] >> 8) / 2**24


def naive_filter(row: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    row = row.copy()
    if top_k:
        row[row < np.sort(row)[::-1][min(top_k, len(row)) - 1]] = -np.inf
    if top_p < 1:
        probs, reached, kept = np.exp(row - row.max()), 0.0, []
        probs /= probs.sum()
        for index in sorted(range(len(row)), key=lambda i: -row[i]):
            kept.append(index)
            reached += probs[index]
            if reached > top_p:
                break
        row[[i for i in range(len(row)) if i not in kept]] = -np.inf
    return row


def naive_sample(
    logits: Tensor, group_size: int, seed: int, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    batch, length, vocab_size = logits.shape
    tokens = torch.zeros(batch, group_size, length, dtype=torch.int64)
    logprobs = torch.zeros(batch, group_size, length, dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            row = naive_filter(logits[b, t].double().numpy() / temperature, top_k, top_p)
            probs = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            for g in range(group_size):
                threshold, reached, token = uniform(t, g, b, seed), 0.0, 0
                for token in range(vocab_size):
                    reached += probs[token]
                    if reached > threshold:
                        break
                tokens[b, g, t], logprobs[b, g, t] = token, math.log(probs[token])
    return tokens, logprobs


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(
    ("group_size", "temperature", "top_k", "top_p"),
    [(1, 1.0, 0, 1.0), (5, 0.7, 0, 1.0), (4, 1.3, 7, 1.0), (3, 1.0, 0, 0.8), (3, 1.0, 20, 0.5), (2, 1.0, 99, 1e-9)],
)
def test_against_naive_inverse_cdf(length: int, group_size: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(2, length, 63, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    kwargs = {"seed": 2**40 + 5, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens, logprobs = ops.group_sample(logits, group_size, **kwargs)
    expected_tokens, expected_logprobs = naive_sample(logits, group_size, **kwargs)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vocab_size", [1, 5, 63, 65])
def test_linear_group_sample_is_group_sample_of_the_logits(vocab_size: int) -> None:
    hidden, weight = torch.randn(3, 4, 7), torch.randn(vocab_size, 7)
    kwargs = {"seed": 3, "temperature": 0.9, "top_k": 4, "top_p": 0.9}
    expected = ops.group_sample(hidden @ weight.T, 2, **kwargs)
    drawn = ops.linear_group_sample(hidden, weight, 2, **kwargs)
    assert torch.equal(drawn[0], expected[0])
    torch.testing.assert_close(drawn[1], expected[1], rtol=1e-5, atol=1e-5)


def test_linear_group_sample_keeps_bfloat16_products_in_float32() -> None:
    hidden, weight = torch.randn(2, 8, 64).bfloat16(), torch.randn(65, 64).bfloat16()
    expected = ops.group_sample(hidden.double() @ weight.double().T, 4, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, logprobs = ops.linear_group_sample(hidden, weight, 4, seed=0)
    assert torch.equal(tokens, expected[0])
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected[1].float(), rtol=1e-5, atol=1e-5)


def test_frequencies_are_the_softmax() -> None:
    logits = torch.randn(1, 3, 10, generator=torch.Generator().manual_seed(1))
    draws = 20_000
    tokens, _ = ops.group_sample(logits, draws, seed=11)
    probs = logits.double().softmax(-1)[0].numpy()
    for t in range(3):
        counts = np.bincount(tokens[0, :, t].numpy(), minlength=10)
        assert stats.chisquare(counts, probs[t] * draws).pvalue > 1e-3
    # Independent between positions: the joint frequencies are the product.
    joint = np.bincount((tokens[0, :, 0] * 10 + tokens[0, :, 1]).numpy(), minlength=100)
    assert stats.chisquare(joint, np.outer(probs[0], probs[1]).ravel() * draws).pvalue > 1e-3


def test_a_rollout_depends_on_seed_sample_id_position_and_rollout_alone() -> None:
    logits = torch.randn(5, 9, 33)
    ids = torch.tensor([40, 7, 2**33 + 1, 0, 12])
    tokens, logprobs = ops.group_sample(logits, 8, seed=1, sample_ids=ids)
    fewer, _ = ops.group_sample(logits, 4, seed=1, sample_ids=ids)
    assert torch.equal(fewer, tokens[:, :4])
    order = torch.tensor([3, 1])
    some, some_logprobs = ops.group_sample(logits[order], 8, seed=torch.tensor(1), sample_ids=ids[order])
    assert torch.equal(some, tokens[order])
    assert torch.equal(some_logprobs, logprobs[order])
    later, _ = ops.group_sample(logits[:, 6:], 8, seed=1, sample_ids=ids, first_position=6)
    assert torch.equal(later, tokens[:, :, 6:])
    last, _ = ops.group_sample(logits[:, 8:], 8, seed=1, sample_ids=ids, first_position=torch.tensor(8))
    assert torch.equal(last, tokens[:, :, 8:])
    assert torch.equal(ops.group_sample(logits, 8, seed=1, sample_ids=ids % 2**32)[0], tokens)
    assert not torch.equal(ops.group_sample(logits, 8, seed=2, sample_ids=ids)[0], tokens)
    assert not torch.equal(ops.group_sample(logits, 8, seed=1)[0], tokens)
    equal_rows = ops.group_sample(torch.zeros(2, 6, 50), 6, seed=0)[0]
    flat = equal_rows.permute(0, 2, 1).reshape(12, 6)
    assert len({tuple(row) for row in flat.tolist()}) == 12
    assert len({tuple(row) for row in flat.T.tolist()}) == 6


def test_rows_can_be_rollouts_of_one_image() -> None:
    """With the same logits in each row, a row's own draw is the group's."""
    logits = torch.randn(3, 4, 33)
    ids = torch.tensor([5, 9, 2**34 + 1])
    tokens, logprobs = ops.group_sample(logits, 6, seed=1, sample_ids=ids)
    rows, rollouts = logits.repeat_interleave(6, 0), torch.arange(6).repeat(3)
    options = {"seed": 1, "sample_ids": ids.repeat_interleave(6), "first_rollouts": rollouts + 2**32}
    alone, alone_logprobs = ops.group_sample(rows, 1, **options)
    assert torch.equal(alone.view(3, 6, 4), tokens)
    assert torch.equal(alone_logprobs.view(3, 6, 4), logprobs)
    last, _ = ops.group_sample(logits, 2, seed=1, sample_ids=ids, first_rollouts=torch.tensor([4, 4, 4]))
    assert torch.equal(last, tokens[:, 4:])
    eye = torch.eye(33)
    for position in (3, torch.tensor(3)):
        later, _ = ops.linear_group_sample(rows[:, 3:], eye, 1, **options, first_position=position)
        assert torch.equal(later.view(3, 6), tokens[:, :, 3])


def test_non_contiguous_logits_and_empty_batches() -> None:
    logits = torch.randn(6, 3, 17)
    strided = logits.transpose(0, 1)[:, ::2]
    for drawn, expected in zip(
        ops.group_sample(strided, 2, seed=0), ops.group_sample(strided.contiguous(), 2, seed=0), strict=True
    ):
        assert torch.equal(drawn, expected)
    for shape in [(0, 3, 17), (2, 0, 17)]:
        tokens, logprobs = ops.group_sample(torch.zeros(shape), 4, seed=0, top_p=0.5)
        assert tokens.shape == logprobs.shape == (shape[0], 4, shape[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, 65).to(dtype)
    tokens, logprobs = ops.group_sample(logits, 3, seed=5)
    expected_tokens, expected = ops.group_sample(logits.double(), 3, seed=5)
    assert torch.equal(tokens, expected_tokens)
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (0, 1e-9)])
def test_narrowest_filters_give_the_argmax(top_k: int, top_p: float) -> None:
    logits = torch.randn(3, 7, 65)
    tokens, logprobs = ops.group_sample(logits, 4, seed=0, top_k=top_k, top_p=top_p)
    assert torch.equal(tokens, logits.argmax(-1)[:, None].expand(3, 4, 7))
    assert torch.equal(logprobs, torch.zeros(3, 4, 7))


def test_ties_stay_under_top_k_and_go_by_index_under_top_p() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 2.0, 2.0]).expand(1, 200, 5)
    tokens, logprobs = ops.group_sample(logits, 1, seed=0, top_k=2)
    assert set(tokens.flatten().tolist()) == {1, 3, 4}
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(3)))
    assert set(ops.group_sample(logits, 1, seed=0, top_p=0.4)[0].flatten().tolist()) == {1, 3}


def test_tokens_without_probability_are_never_drawn() -> None:
    # Trailing and leading impossible tokens, at the smallest and the largest uniforms there are.
    logits = torch.full((1, 1, 300), -math.inf)
    logits[..., 100:200] = torch.randn(100)
    tokens, logprobs = ops.group_sample(logits, 200_000, seed=0)
    assert tokens.min() == 100
    assert tokens.max() == 199
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("value", [0, 2**32 - 1])
def test_extreme_uniforms(monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    monkeypatch.setattr(
        sys.modules["vapi_fast.reference.group_sample"], "philox", lambda counter, key: [torch.full((2, 9, 1), value)]
    )
    logits = torch.randn(2, 9, 65) * 5
    logits[..., :3] = logits[..., 60:] = -math.inf
    tokens, logprobs = ops.group_sample(logits, 1, seed=0)
    assert (tokens >= 3).all()
    assert (tokens < 60).all()
    assert logprobs.isfinite().all()
    if value == 0:
        assert (tokens == 3).all()


@pytest.mark.parametrize("fill", [1e4, -1e4, 0.0])
def test_extreme_and_equal_logits(fill: float) -> None:
    logits = torch.full((1, 100, 64), fill)
    tokens, logprobs = ops.group_sample(logits, 4, seed=0)
    assert tokens.unique().numel() > 60
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(64)))
    logits[..., 9] = fill + 1e4
    tokens, logprobs = ops.group_sample(logits, 4, seed=0)
    assert (tokens == 9).all()
    assert (logprobs == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.9)])
def test_nan_never_passes(bad: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(2, 3, 17)
    logits[1, 2, 5] = bad
    tokens, logprobs = ops.group_sample(logits, 4, seed=0, top_k=top_k, top_p=top_p)
    assert ((tokens >= 0) & (tokens < 17)).all()
    assert logprobs[1, :, 2].isnan().all()
    assert logprobs.isnan().sum() == 4


def naive_noisy_prefix(tokens: Tensor, noise_prob: float, vocab_size: int, seed: int) -> Tensor:
    prefix = tokens[:, :-1].clone()
    for b in range(prefix.shape[0]):
        for t in range(prefix.shape[1]):
            choice, replacement, _, _ = philox((t, 0, b, NOISY_PREFIX), seed_key(seed))
            if (choice >> 8) / 2**24 < noise_prob:
                prefix[b, t] = replacement * vocab_size // 2**32
    return prefix


@pytest.mark.parametrize("length", [1, 2, 63, 65])
@pytest.mark.parametrize("noise_prob", [0.0, 0.3, 0.5, 1.0])
def test_noisy_prefix_against_a_loop(length: int, noise_prob: float) -> None:
    tokens = torch.randint(0, 1000, (3, length))
    prefix = ops.noisy_prefix(tokens, noise_prob, 1000, seed=-9)
    assert prefix.shape == (3, length - 1)
    assert torch.equal(prefix, naive_noisy_prefix(tokens, noise_prob, 1000, -9))
    if noise_prob == 0:
        assert torch.equal(prefix, tokens[:, :-1])


def test_noisy_prefix_replaces_the_asked_share_uniformly() -> None:
    tokens = torch.full((40, 501), 7)
    prefix = ops.noisy_prefix(tokens, 0.25, 8, seed=0)
    counts = np.bincount(prefix.flatten().numpy(), minlength=8)
    expected = np.full(8, 0.25 / 8)
    expected[7] += 0.75
    assert stats.chisquare(counts, expected * 20_000).pvalue > 1e-3


def test_noisy_prefix_depends_on_the_sample_id_alone() -> None:
    tokens, ids = torch.randint(0, 16384, (4, 33)), torch.tensor([9, 2, 30, 5])
    prefix = ops.noisy_prefix(tokens, 0.5, 16384, seed=1, sample_ids=ids)
    one = ops.noisy_prefix(tokens[2:3], 0.5, 16384, seed=torch.tensor(1), sample_ids=ids[2:3])
    assert torch.equal(one, prefix[2:3])
    assert not torch.equal(ops.noisy_prefix(tokens, 0.5, 16384, seed=1), prefix)


LOGITS = torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            TypeError,
            r"group_sample: logits must be floating \[B, T, V\], got int64 \[4, 7\]",
            lambda: ops.group_sample(torch.zeros(4, 7, dtype=torch.int64), 2, seed=0),
        ),
        (
            ValueError,
            r"logits must be floating \[B, T, V\], got float32 \[5\]",
            lambda: ops.group_sample(LOGITS[0, 0], 2, seed=0),
        ),
        (ValueError, r"logits must have V > 0", lambda: ops.group_sample(LOGITS[..., :0], 2, seed=0)),
        (TypeError, r"logits .* got list", lambda: ops.group_sample([1.0], 2, seed=0)),
        (ValueError, r"group_size must be an int >= 1, got 0", lambda: ops.group_sample(LOGITS, 0, seed=0)),
        (TypeError, r"group_size must be an int >= 1, got float", lambda: ops.group_sample(LOGITS, 2.0, seed=0)),
        (TypeError, r"seed must be an int .* got float", lambda: ops.group_sample(LOGITS, 2, seed=0.5)),
        (TypeError, r"seed .* got int64 \[1\]", lambda: ops.group_sample(LOGITS, 2, seed=torch.tensor([1]))),
        (ValueError, r"seed .* got 9223372036854775808", lambda: ops.group_sample(LOGITS, 2, seed=2**63)),
        (
            ValueError,
            r"sample_ids must be int64 \[B\] with B=2, got int64 \[3\]",
            lambda: ops.group_sample(LOGITS, 2, seed=0, sample_ids=torch.arange(3)),
        ),
        (
            TypeError,
            r"sample_ids must be int64 \[B\], got int32 \[2\]",
            lambda: ops.group_sample(LOGITS, 2, seed=0, sample_ids=torch.arange(2, dtype=torch.int32)),
        ),
        (
            ValueError,
            r"temperature must be positive and finite, got 0",
            lambda: ops.group_sample(LOGITS, 2, seed=0, temperature=0),
        ),
        (ValueError, r"top_k must be an int >= 0, got -1", lambda: ops.group_sample(LOGITS, 2, seed=0, top_k=-1)),
        (ValueError, r"top_p must be in \(0, 1\], got 1.5", lambda: ops.group_sample(LOGITS, 2, seed=0, top_p=1.5)),
        (ValueError, r"top_p must be in", lambda: ops.group_sample(LOGITS, 2, seed=0, top_p=math.nan)),
        (ValueError, r"top_p must be in \(0, 1\], got 0", lambda: ops.group_sample(LOGITS, 2, seed=0, top_p=0)),
        (
            ValueError,
            r"group_sample: logits must have V <= 65536, got V=65537",
            lambda: ops.group_sample(torch.zeros(1, 1, 65537), 2, seed=0),
        ),
        (
            ValueError,
            r"first_position must be an int >= 0, got -1",
            lambda: ops.group_sample(LOGITS, 2, seed=0, first_position=-1),
        ),
        (
            ValueError,
            r"linear_group_sample: weight must be floating \[V, D\] with D=5, got float32 \[9, 4\]",
            lambda: ops.linear_group_sample(LOGITS, torch.zeros(9, 4), 2, seed=0),
        ),
        (
            ValueError,
            r"weight must be on hidden's device cpu, got meta",
            lambda: ops.linear_group_sample(LOGITS, torch.zeros(9, 5, device="meta"), 2, seed=0),
        ),
        (
            ValueError,
            r"noisy_prefix: tokens must be in \[0, 4\), got 4",
            lambda: ops.noisy_prefix(torch.arange(5)[None], 0.5, 4, seed=0),
        ),
        (ValueError, r"noise_prob must be in", lambda: ops.noisy_prefix(torch.arange(5)[None], 1.1, 5, seed=0)),
        (ValueError, r"tokens must have T > 0", lambda: ops.noisy_prefix(torch.zeros(2, 0).long(), 0.1, 5, seed=0)),
        (TypeError, r"tokens must be int64 \[B, T\], got float32", lambda: ops.noisy_prefix(LOGITS[0], 0.1, 5, seed=0)),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, call: object) -> None:
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
