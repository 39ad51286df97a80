"""Drawing tokens: against naive inverse CDF, LlamaGen's filters and float64, and in what a draw depends on."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from draws import FILTERS, assert_group_sample, assert_same_draws, draw, draw_linear
from fused import DEVICE, DTYPES, cast, misaligned, strided
from torch import Tensor

from vapi_fast import ops
from vapi_fast.kernels import head
from vapi_fast.ops.backends import override
from vapi_fast.reference import philox
from vapi_fast.reference.filters import filter_logits
from vapi_fast.reference.philox import GROUP_SAMPLE, seed_key

# The packages' attributes of this name are the operation.
kernels, reference = (sys.modules[f"vapi_fast.{room}.group_sample"] for room in ("kernels", "reference"))
interpreted = pytest.mark.skipif(
    DEVICE.type != "cpu", reason="replaces a piece of a kernel, or gives it very large blocks"
)
on_both = pytest.mark.usefixtures("backend")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def naive_uniform(position: int, rollout: int, sample_id: int, seed: int) -> float:
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
                threshold, reached, token = naive_uniform(t, g, b, seed), 0.0, 0
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


@pytest.fixture
def many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rollouts that no GPU could hold: the interpreter takes as long for many as for few."""
    monkeypatch.setattr(kernels, "MAX_BLOCK_G", 4096)


@on_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((1, 1, 1), 1), ((2, 2, 5), 3), ((1, 1, 1000), 16), ((1, 2, 16384), 8), ((1, 1, 16385), 33)],
)
def test_group_sample(shape: tuple[int, int, int], group_size: int, dtype: torch.dtype) -> None:
    assert_group_sample(2 * torch.randn(shape), group_size, dtype, seed=2**40 + 7)


@on_both
def test_many_rows() -> None:
    assert_group_sample(torch.randn(1, 65, 100), 1, seed=3)


def test_longest_rows() -> None:
    assert_group_sample(torch.randn(1, 1, 65536), 8, seed=-3)
    assert_group_sample(torch.randn(1, 1, 65536), 8, torch.bfloat16, seed=-3, top_k=500, top_p=0.7)


@on_both
@pytest.mark.parametrize("temperature", [0.05, 3.0])
def test_temperature(temperature: float) -> None:
    assert_group_sample(torch.randn(2, 3, 1000), 9, seed=5, temperature=temperature)


@pytest.mark.parametrize("filters", [{}, *FILTERS])
def test_rows_of_several_tiles(filters: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SETTINGS", {"BLOCK_V": 128, "CHUNK": 32, "num_stages": 1})
    for name in ("ELEMENTS_PER_WARP", "FILTERED_PER_WARP"):
        monkeypatch.setattr(kernels, name, 64)
    logits = (4 * torch.randn(1, 1, 400)).round() / 2  # with ties
    assert_group_sample(logits, 8, seed=1, **filters)


@interpreted
@pytest.mark.usefixtures("many_at_a_time")
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_very_many_draws_from_a_large_vocabulary(scale: float) -> None:
    assert_group_sample(scale * torch.randn(1, 1, 16384), 30_000, seed=0)


@on_both
@interpreted
@pytest.mark.usefixtures("many_at_a_time")
@pytest.mark.parametrize("filters", [{}, {"top_k": 7, "top_p": 0.9}])
def test_frequencies_are_the_softmax(filters: dict[str, float]) -> None:
    stats = pytest.importorskip("scipy.stats")
    logits, draws = torch.randn(1, 2, 12, generator=torch.Generator().manual_seed(1)), 20_000
    tokens, _ = draw(logits, draws, seed=11, **filters)
    probs = filter_logits(logits.double(), filters.get("top_k", 0), filters.get("top_p", 1.0)).softmax(-1)[0].numpy()
    for t in range(2):
        counts = np.bincount(tokens[0, :, t].numpy(), minlength=12)
        assert not counts[probs[t] == 0].any()
        assert stats.chisquare(counts[probs[t] > 0], probs[t][probs[t] > 0] * draws).pvalue > 1e-3
    if not filters:  # two positions of a rollout are independent
        joint = np.bincount((tokens[0, :, 0] * 12 + tokens[0, :, 1]).numpy(), minlength=144)
        assert stats.chisquare(joint, np.outer(*probs).ravel() * draws).pvalue > 1e-3


@on_both
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, under the interpreter
@pytest.mark.parametrize("filters", [{}, *FILTERS])
def test_extreme_logits(filters: dict[str, float]) -> None:
    logits = 2 * torch.randn(1, 3, 600)
    logits[0, 0, :200] = logits[0, 0, 400:] = -math.inf
    logits[0, 1] -= 1e4
    logits[0, 1, 310] += 2e4
    logits[0, 2, 1:] = -math.inf
    assert_group_sample(logits, 8, seed=3, **filters)
    tokens, logprobs = draw(logits.to(DEVICE), 8, seed=3, **filters)
    assert ((tokens[:, :, 0] >= 200) & (tokens[:, :, 0] < 400)).all()
    assert (tokens[:, :, 1] == 310).all()
    assert (tokens[:, :, 2] == 0).all()
    assert not logprobs[:, :, 1:].any()
    few = logits[:, 1:].clone()
    few[..., 3:] = -math.inf  # fewer possible tokens than top-k asks for
    assert_group_sample(few, 8, seed=3, **filters)


@triton.jit
def smallest_uniform(word):
    return (word * 0).to(tl.float32)


@triton.jit
def largest_uniform(word):
    return (word * 0).to(tl.float32) + (1 - 2.0**-24)


@interpreted
def test_a_draw_past_the_rounded_sum_of_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "uniform24", largest_uniform)
    logits = torch.randn(1, 24, 128)
    logits[..., 120:] = -math.inf
    tokens, _ = draw(logits, 1, seed=0)
    assert (tokens >= 118).all()
    assert (tokens < 120).all()


@interpreted
@pytest.mark.parametrize("filters", [{}, {"top_k": 400}, {"top_p": 0.99}])
def test_extreme_uniforms(monkeypatch: pytest.MonkeyPatch, filters: dict[str, float]) -> None:
    logits = 3 * torch.randn(1, 4, 1000)
    logits[..., :3] = logits[..., 980:] = -math.inf
    possible = filter_logits(logits[0].double(), filters.get("top_k", 0), filters.get("top_p", 1.0)).isfinite().int()
    monkeypatch.setattr(kernels, "uniform24", smallest_uniform)
    assert torch.equal(draw(logits, 1, seed=0, **filters)[0][0, 0], possible.argmax(-1))
    monkeypatch.setattr(kernels, "uniform24", largest_uniform)
    tokens, logprobs = draw(logits, 1, seed=0, **filters)
    assert possible.gather(1, tokens[0].T).all()
    assert logprobs.isfinite().all()
    after = torch.arange(1000) > tokens[0].T  # what lies beyond has less probability than rounding
    assert ((logits[0].softmax(-1) * possible * after).sum(-1) < 1e-6).all()


@on_both
def test_tokens_without_probability_are_never_drawn() -> None:
    # Trailing and leading impossible tokens, at the smallest and the largest uniforms there are.
    logits = torch.full((1, 200, 300), -math.inf, device=DEVICE)
    logits[..., 100:200] = torch.randn(100, device=DEVICE)
    tokens, logprobs = draw(logits, 1000 if override() == "reference" else 25, seed=0)
    assert tokens.min() == 100
    assert tokens.max() == 199
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("value", [0, 2**32 - 1])
def test_extreme_uniforms_of_the_reference(monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    monkeypatch.setattr(reference, "philox", lambda counter, key: [torch.full((2, 9, 1), value)])
    logits = torch.randn(2, 9, 65) * 5
    logits[..., :3] = logits[..., 60:] = -math.inf
    tokens, logprobs = ops.group_sample(logits, 1, seed=0)
    assert (tokens >= 3).all()
    assert (tokens < 60).all()
    assert logprobs.isfinite().all()
    if value == 0:
        assert (tokens == 3).all()


@on_both
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, under the interpreter
@pytest.mark.parametrize("filters", [{}, *FILTERS])
def test_nan_never_passes(filters: dict[str, float]) -> None:
    logits = torch.randn(1, 6, 300, device=DEVICE)
    logits[0, 0, 5] = math.nan
    logits[0, 1, 205] = math.inf
    logits[0, 2] = -math.inf
    logits[0, 3] = math.nan
    logits[0, 4, 299] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # NaN with its sign bit set
    tokens, logprobs = draw(logits, 4, seed=0, **filters)
    assert ((tokens >= 0) & (tokens < 300)).all()
    assert logprobs[:, :, :5].isnan().all()
    assert logprobs[:, :, 5].isfinite().all()


@on_both
def test_a_rollout_depends_on_seed_sample_id_position_and_rollout_alone() -> None:
    logits = torch.randn(4, 3, 200, device=DEVICE)
    ids = torch.tensor([40, 7, 2**33 + 1, -5], device=DEVICE)
    tokens, logprobs = draw(logits, 9, seed=1, sample_ids=ids)
    assert_same_draws((tokens, logprobs), logits, seed=1, sample_ids=ids)
    assert torch.equal(draw(logits, 4, seed=1, sample_ids=ids)[0], tokens[:, :4])
    order = torch.tensor([3, 1], device=DEVICE)
    some = draw(logits[order], 9, seed=torch.tensor(1, device=DEVICE), sample_ids=ids[order])
    assert torch.equal(some[0], tokens[order])
    assert torch.equal(some[1], logprobs[order])
    strided_ids = torch.stack([ids, ids + 9], dim=1)[:, 0]
    assert torch.equal(draw(logits, 9, seed=1, sample_ids=strided_ids % 2**32)[0], tokens)
    last = torch.tensor(2, device=DEVICE)
    assert torch.equal(draw(logits[:, 2:], 9, seed=1, sample_ids=ids, first_position=last)[0], tokens[:, :, 2:])
    assert torch.equal(draw(logits[:, 1:], 9, seed=1, sample_ids=ids, first_position=1)[0], tokens[:, :, 1:])
    assert not torch.equal(draw(logits, 9, seed=2, sample_ids=ids)[0], tokens)
    rollouts = {"first_rollouts": torch.full_like(ids, 2**32 + 4)}
    assert torch.equal(draw(logits, 2, seed=1, sample_ids=ids, **rollouts)[0], tokens[:, 4:6])
    eye, later = torch.eye(logits.shape[-1], device=DEVICE), {"first_position": 2, **rollouts}
    linear = draw_linear(logits[:, 2:], eye, 2, seed=1, sample_ids=ids, **later)
    assert torch.equal(linear[0], tokens[:, 4:6, 2:])
    assert not torch.equal(draw(logits, 9, seed=1)[0], tokens)
    flat = draw(torch.zeros(2, 6, 50, device=DEVICE), 6, seed=0)[0].permute(0, 2, 1).reshape(12, 6)
    assert len({tuple(row) for row in flat.tolist()}) == 12
    assert len({tuple(row) for row in flat.T.tolist()}) == 6


@on_both
def test_rows_can_be_rollouts_of_one_image() -> None:
    """With the same logits in each row, a row's own draw is the group's."""
    logits = torch.randn(3, 4, 33, device=DEVICE)
    ids = torch.tensor([5, 9, 2**34 + 1], device=DEVICE)
    tokens, logprobs = draw(logits, 6, seed=1, sample_ids=ids)
    rows, rollouts = logits.repeat_interleave(6, 0), torch.arange(6, device=DEVICE).repeat(3)
    options = {"seed": 1, "sample_ids": ids.repeat_interleave(6), "first_rollouts": rollouts + 2**32}
    alone, alone_logprobs = draw(rows, 1, **options)
    assert torch.equal(alone.view(3, 6, 4), tokens)
    assert torch.equal(alone_logprobs.view(3, 6, 4), logprobs)
    last, _ = draw(logits, 2, seed=1, sample_ids=ids, first_rollouts=torch.full_like(ids, 4))
    assert torch.equal(last, tokens[:, 4:])
    eye = torch.eye(33, device=DEVICE)
    for position in (3, torch.tensor(3, device=DEVICE)):
        later, _ = draw_linear(rows[:, 3:], eye, 1, **options, first_position=position)
        assert torch.equal(later.view(3, 6), tokens[:, :, 3])


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**32])
def test_seeds_of_64_bits(seed: int) -> None:
    assert_group_sample(torch.randn(1, 2, 100), 16, seed=seed, first_position=2**32 - 2)


@on_both
@pytest.mark.parametrize("change", [misaligned, strided, lambda x: x.transpose(0, 1), lambda x: x[:, 1:, 3:-5]])
def test_logits_of_any_strides(change: object) -> None:
    for dtype in DTYPES:
        assert_group_sample(change(torch.randn(2, 3, 128)), 3, dtype, seed=6)


@on_both
def test_empty_batches_and_no_gradient() -> None:
    for shape in [(0, 3, 17), (2, 0, 17)]:
        for filters in ({}, {"top_p": 0.5}):
            tokens, logprobs = draw(torch.zeros(shape, device=DEVICE), 4, seed=0, **filters)
            assert tokens.shape == logprobs.shape == (shape[0], 4, shape[1])
    _, logprobs = draw(torch.randn(1, 1, 9, device=DEVICE, requires_grad=True), 2, seed=0)
    assert not logprobs.requires_grad


@on_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, 65, device=DEVICE).to(dtype)
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(TypeError, match=r"group_sample: logits must be float32, .* got float64"):
            ops.group_sample(logits, 3, seed=5)
        return
    tokens, logprobs = ops.group_sample(logits, 3, seed=5)
    with ops.use_backend("reference"):
        expected_tokens, expected = ops.group_sample(logits.double(), 3, seed=5)
    assert torch.equal(tokens, expected_tokens)
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)


@on_both
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("filters", [{}, {"top_k": 30, "top_p": 0.9, "temperature": 0.8}])
def test_linear_group_sample(
    dtype: torch.dtype, filters: dict[str, float], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 3 * 4 * 65)  # chunks of 3 rows, then of one
    monkeypatch.setattr(head, "ROW_MULTIPLE", 1)
    hidden, weight = (cast(torch.randn(shape), dtype) for shape in ((2, 5, 24), (65, 24)))
    bias = cast(3 * torch.randn(65, 2)[:, 0], dtype) if biased else None
    ids = torch.tensor([9, 4], device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        drawn = draw_linear(hidden, weight, 3, bias=bias, seed=8, sample_ids=ids, **filters)
    logits = hidden.double() @ weight.double().T
    assert_same_draws(drawn, logits + bias.double() if biased else logits, seed=8, sample_ids=ids, **filters)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}])
def test_a_bias_over_tiles_of_a_row(filters: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SETTINGS", {"BLOCK_V": 128, "CHUNK": 32, "num_stages": 1})
    hidden, weight, bias = torch.randn(1, 2, 5).to(DEVICE), torch.randn(400, 5).to(DEVICE), torch.randn(400).to(DEVICE)
    drawn = draw_linear(hidden, weight, 8, bias=bias, seed=1, **filters)
    assert_same_draws(drawn, hidden.double() @ weight.double().T + bias.double(), seed=1, **filters)
    never = torch.where(torch.arange(400, device=DEVICE) % 2 == 0, -math.inf, bias)
    assert (draw_linear(hidden, weight, 64, bias=never, seed=1, **filters)[0] % 2 == 1).all()


@on_both
def test_linear_group_sample_of_nothing() -> None:
    for shape in [(0, 3, 17), (2, 0, 17)]:
        tokens, logprobs = draw_linear(torch.zeros(shape, device=DEVICE), torch.zeros(9, 17, device=DEVICE), 4, seed=0)
        assert tokens.shape == logprobs.shape == (shape[0], 4, shape[1])


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
            r"linear_group_sample: bias must be floating \[V\] with V=9, got float32 \[5\]",
            lambda: ops.linear_group_sample(LOGITS, torch.zeros(9, 5), 2, bias=torch.zeros(5), seed=0),
        ),
        (
            TypeError,
            r"linear_group_sample: bias must be floating \[V\], got int64 \[9\]",
            lambda: ops.linear_group_sample(LOGITS, torch.zeros(9, 5), 2, bias=torch.arange(9), seed=0),
        ),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, call: object) -> None:
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def scalar(value: int) -> Tensor:
    return torch.tensor(value, device=DEVICE)


@pytest.mark.parametrize("with_ids", [False, True])
def test_opcheck(with_ids: bool) -> None:
    ids = torch.arange(2, device=DEVICE) if with_ids else None
    shapes = ((2, 1, 9), (2, 1, 4), (9, 4), (9,))
    logits, hidden, weight, bias = (torch.randn(shape, device=DEVICE) for shape in shapes)
    group_sample, linear = torch.ops.vapi_fast.group_sample.default, torch.ops.vapi_fast.linear_group_sample.default
    place = scalar(7), ids
    torch.library.opcheck(group_sample, (logits, 3, scalar(1), ids, 0.9, 0, 1.0, *place))
    torch.library.opcheck(group_sample, (logits, 3, scalar(1), ids, 0.9, 2, 1.0, *place))
    for each in (None, bias):
        torch.library.opcheck(linear, (hidden, weight, 3, scalar(1), ids, 1.0, 0, 1.0, *place, each))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", [{}, {"top_k": 2000}, {"top_k": 2000, "top_p": 0.9}, {"top_p": 0.5}])
def test_production_sizes(dtype: torch.dtype, filters: dict[str, float]) -> None:
    for spread in (0.1, 2.0):
        assert_group_sample(spread * torch.randn(4, 576, 16384), 8, dtype, seed=1, **filters)
    assert_group_sample(torch.randn(256, 1, 16384), 1, dtype, seed=1, first_position=9, **filters)
    assert_group_sample(torch.randn(64, 1, 65536), 1, dtype, seed=1, **filters)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_production_sizes(dtype: torch.dtype) -> None:
    hidden, weight = (cast(torch.randn(shape), dtype) for shape in ((16, 576, 1536), (16384, 1536)))
    weight *= 0.05
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tokens, logprobs = draw_linear(hidden, weight, 8, seed=1)
    assert torch.cuda.max_memory_allocated() - before < 2 * head.CHUNK_BYTES
    for image in range(16):
        drawn, ids = (tokens[image : image + 1], logprobs[image : image + 1]), torch.tensor([image], device=DEVICE)
        assert_same_draws(drawn, hidden[image : image + 1].double() @ weight.double().T, seed=1, sample_ids=ids)


@pytest.mark.gpu
def test_other_values_compile_nothing_new() -> None:
    logits = torch.randn(16, 3, 1000, device=DEVICE)
    draw(logits, 8, seed=0)
    draw(logits, 8, seed=0, top_k=5, top_p=0.5)
    compiled = len(kernels.group_sample_kernel.device_caches[DEVICE.index or 0][0])
    for value in (1, 16, 17):
        draw(logits, 8, seed=value, temperature=value / 2, first_position=value)
        draw(
            logits[:, :1].expand(16, value, 1000), 8, seed=value, temperature=value, top_k=value, top_p=0.1 + value / 99
        )
    assert compiled == len(kernels.group_sample_kernel.device_caches[DEVICE.index or 0][0])


@pytest.mark.gpu
def test_graph_replays_draw_anew() -> None:
    logits, seed, position = torch.randn(8, 1, 16384, device=DEVICE), scalar(0), scalar(0)
    draw(logits, 1, seed=seed, first_position=position)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, _ = draw(logits, 1, seed=seed, first_position=position)
    for t in range(3):
        position.fill_(t)
        seed.fill_(40 + t)
        graph.replay()
        assert torch.equal(tokens, draw(logits, 1, seed=40 + t, first_position=t)[0])
