"""Drawing tokens on Triton: the reference's own draws, its filters and its noise, on a GPU or interpreted."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from accuracy import RELATIVE_L2
from fused import DEVICE, DTYPES, cast, misaligned, strided
from torch import Tensor

from vapi_fast import ops
from vapi_fast.kernels import head
from vapi_fast.kernels import philox as philox_kernels
from vapi_fast.kernels.philox import open_uniform23, random_words, uniform24
from vapi_fast.reference import philox as reference_philox
from vapi_fast.reference.filters import filter_logits
from vapi_fast.reference.philox import GROUP_SAMPLE, GUMBEL, NOISY_PREFIX, default_sample_ids, seed_key
from vapi_fast.reference.philox import open_uniform23 as reference_open_uniform23
from vapi_fast.reference.philox import uniform24 as reference_uniform24

fused = kernels = importlib.import_module("vapi_fast.kernels.group_sample")
noisy = importlib.import_module("vapi_fast.kernels.noisy_prefix")
FILTERS = [{"top_k": 20}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.6, "temperature": 0.7}]
INTERPRETED = DEVICE.type == "cpu"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="replaces a piece of a kernel, or gives it very large blocks")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def draw(logits: Tensor, group_size: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
    with ops.use_backend("triton"):
        return ops.group_sample(logits, group_size, **kwargs)


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
    uniform = reference_uniform24(reference_philox(counter, seed_key(seed))[0], torch.float64)
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


@pytest.fixture
def many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rollouts that no GPU could hold: the interpreter takes as long for many as for few."""
    monkeypatch.setattr(fused, "MAX_BLOCK_G", 4096)


@triton.jit
def words_and_uniforms(seed_ptr, counters_ptr, words_ptr, uniforms_ptr, OPERATION: tl.constexpr, LENGTH: tl.constexpr):
    lane = tl.arange(0, LENGTH)
    position = tl.load(counters_ptr + lane)
    index = tl.load(counters_ptr + LENGTH + lane)
    sample_id = tl.load(counters_ptr + 2 * LENGTH + lane)
    w0, w1, w2, w3 = random_words(tl.load(seed_ptr), position, index, sample_id, OPERATION)
    tl.store(words_ptr + lane, w0.to(tl.int64))
    tl.store(words_ptr + LENGTH + lane, w1.to(tl.int64))
    tl.store(words_ptr + 2 * LENGTH + lane, w2.to(tl.int64))
    tl.store(words_ptr + 3 * LENGTH + lane, w3.to(tl.int64))
    tl.store(uniforms_ptr + lane, uniform24(w0))
    tl.store(uniforms_ptr + LENGTH + lane, open_uniform23(w0))


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 3, -(2**63), 2**63 - 1, 0x299F31D0A4093822])
def test_random_words(seed: int) -> None:
    counters = torch.randint(-(2**40), 2**40, (3, 64), device=DEVICE)
    # Counters of Random123's known answers; the last of them has this test's last seed as its key.
    counters[:, :3] = torch.tensor([[0, 2**32 - 1, 0x243F6A88], [0, 2**32 - 1, 0x85A308D3], [0, 2**32 - 1, 0x13198A2E]])
    words = torch.zeros(4, 64, dtype=torch.int64, device=DEVICE)
    uniforms = torch.zeros(2, 64, device=DEVICE)
    for operation in (3, 0x03707344):
        words_and_uniforms[(1,)](torch.tensor(seed, device=DEVICE), counters, words, uniforms, operation, 64)
        expected = reference_philox((*(counters & (2**32 - 1)), operation), seed_key(seed))
        assert torch.equal(words, torch.stack(expected))
        assert torch.equal(uniforms[0], reference_uniform24(expected[0], torch.float32))
        assert torch.equal(uniforms[1], reference_open_uniform23(expected[0], torch.float32))
    if seed == 0x299F31D0A4093822:
        assert words[:, 2].tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_operations_have_the_reference_counters() -> None:
    constants = philox_kernels.GROUP_SAMPLE, philox_kernels.NOISY_PREFIX, philox_kernels.GUMBEL
    assert tuple(constant.value for constant in constants) == (GROUP_SAMPLE, NOISY_PREFIX, GUMBEL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((1, 1, 1), 1), ((2, 2, 5), 3), ((1, 1, 1000), 16), ((1, 2, 16384), 8), ((1, 1, 16385), 33)],
)
def test_group_sample(shape: tuple[int, int, int], group_size: int, dtype: torch.dtype) -> None:
    assert_group_sample(2 * torch.randn(shape), group_size, dtype, seed=2**40 + 7)


def test_many_rows() -> None:
    assert_group_sample(torch.randn(1, 65, 100), 1, seed=3)


def test_longest_rows() -> None:
    assert_group_sample(torch.randn(1, 1, 65536), 8, seed=-3)
    assert_group_sample(torch.randn(1, 1, 65536), 8, torch.bfloat16, seed=-3, top_k=500, top_p=0.7)


@pytest.mark.parametrize("temperature", [0.05, 3.0])
def test_temperature(temperature: float) -> None:
    assert_group_sample(torch.randn(2, 3, 1000), 9, seed=5, temperature=temperature)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("filters", [*FILTERS, {"top_k": 5000}, {"top_k": 0, "top_p": 1e-9}, {"top_k": 1}])
def test_filters(filters: dict[str, float], dtype: torch.dtype) -> None:
    assert_group_sample(2 * torch.randn(1, 2, 1000), 8, dtype, seed=11, **filters)


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


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.77, 0.9])
@pytest.mark.parametrize("top_k", [0, 150])
def test_ties(top_k: int, top_p: float) -> None:
    """Half of the kept ones are ties of the last; one tie more or less shifts all log-probs by more than 1e-3."""
    logits = torch.randint(0, 4, (1, 2, 300)) - 2.0
    logits[logits == 0] *= torch.randint(0, 2, (int((logits == 0).sum()),)) * 2 - 1  # zeros of both signs
    assert_group_sample(logits, 32, torch.bfloat16 if top_k else torch.float32, seed=4, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_p": 0.3, "top_k": 2}])
def test_equal_rows(filters: dict[str, float]) -> None:
    for fill in (0.0, 1e4, -1e4):
        assert_group_sample(torch.full((1, 1, 257), fill), 32, seed=1, **filters)
    tokens, logprobs = draw(torch.tensor([[[0.0, -0.0, -1.0, 0.0]]], device=DEVICE), 64, seed=2, top_k=2)
    assert set(tokens.flatten().tolist()) == {0, 1, 3}
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(3)))
    tokens, logprobs = draw(torch.tensor([[[-0.0, 0.0, -1.0, -0.0]]], device=DEVICE), 64, seed=2, top_p=0.5)
    assert set(tokens.flatten().tolist()) == {0, 1}
    assert (logprobs > -0.71).all()


def test_a_share_rounded_to_one_keeps_everything() -> None:
    assert_group_sample(torch.randn(1, 2, 200), 16, seed=0, top_p=1 - 1e-12)
    assert_group_sample(torch.randn(1, 2, 200), 16, seed=0, top_p=1 - 1e-12, top_k=9)
    assert_group_sample(torch.zeros(1, 1, 200), 16, seed=0, top_p=1 - 1e-12, top_k=3)


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


@triton.jit
def smallest_word(seed, position, index, sample_id, OPERATION: tl.constexpr):
    word = (sample_id + position).to(tl.uint32) * 0
    return word, word, word, word


@triton.jit
def largest_word(seed, position, index, sample_id, OPERATION: tl.constexpr):
    word = (sample_id + position).to(tl.uint32) * 0 + 0xFFFFFFFF
    return word, word, word, word


@interpreted
def test_extreme_words_of_noisy_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.full((2, 9), 5)
    monkeypatch.setattr(noisy, "random_words", smallest_word)
    for noise_prob, token in ((0.0, 5), (2.0**-24, 0)):
        assert (corrupted("triton", tokens, noise_prob, 65536, seed=0) == token).all()
    monkeypatch.setattr(noisy, "random_words", largest_word)
    for noise_prob, token in ((1 - 2.0**-24, 5), (1.0, 65535)):
        assert (corrupted("triton", tokens, noise_prob, 65536, seed=0) == token).all()


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
    linear = draw_linear(
        logits[:, 2:],
        torch.eye(logits.shape[-1], device=DEVICE),
        2,
        seed=1,
        sample_ids=ids,
        **rollouts,
        first_position=2,
    )
    assert torch.equal(linear[0], tokens[:, 4:6, 2:])
    assert not torch.equal(draw(logits, 9, seed=1)[0], tokens)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**32])
def test_seeds_of_64_bits(seed: int) -> None:
    assert_group_sample(torch.randn(1, 2, 100), 16, seed=seed, first_position=2**32 - 2)


@pytest.mark.parametrize("change", [misaligned, strided, lambda x: x.transpose(0, 1), lambda x: x[:, 1:, 3:-5]])
def test_logits_of_any_strides(change: object) -> None:
    for dtype in DTYPES:
        assert_group_sample(change(torch.randn(2, 3, 128)), 3, dtype, seed=6)


def test_empty_batches_and_no_gradient() -> None:
    for shape in [(0, 3, 17), (2, 0, 17)]:
        for filters in ({}, {"top_p": 0.5}):
            tokens, logprobs = draw(torch.zeros(shape, device=DEVICE), 4, seed=0, **filters)
            assert tokens.shape == logprobs.shape == (shape[0], 4, shape[1])
    _, logprobs = draw(torch.randn(1, 1, 9, device=DEVICE, requires_grad=True), 2, seed=0)
    assert not logprobs.requires_grad
    with pytest.raises(TypeError, match=r"group_sample: logits must be float32, .* got float64"):
        draw(torch.zeros(1, 1, 9, device=DEVICE, dtype=torch.float64), 2, seed=0)


def draw_linear(hidden: Tensor, weight: Tensor, group_size: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
    with ops.use_backend("triton"):
        return ops.linear_group_sample(hidden, weight, group_size, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", [{}, {"top_k": 30, "top_p": 0.9, "temperature": 0.8}])
def test_linear_group_sample(dtype: torch.dtype, filters: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 3 * 4 * 65)  # chunks of 3 rows, then of one
    monkeypatch.setattr(head, "ROW_MULTIPLE", 1)
    hidden, weight = (cast(torch.randn(shape), dtype) for shape in ((2, 5, 24), (65, 24)))
    ids = torch.tensor([9, 4], device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        drawn = draw_linear(hidden, weight, 3, seed=8, sample_ids=ids, **filters)
    assert_same_draws(drawn, hidden.double() @ weight.double().T, seed=8, sample_ids=ids, **filters)


def test_linear_group_sample_of_nothing() -> None:
    for shape in [(0, 3, 17), (2, 0, 17)]:
        tokens, logprobs = draw_linear(torch.zeros(shape, device=DEVICE), torch.zeros(9, 17, device=DEVICE), 4, seed=0)
        assert tokens.shape == logprobs.shape == (shape[0], 4, shape[1])


def corrupted(backend: str, *args: Any, **kwargs: Any) -> Tensor:
    with ops.use_backend(backend):
        return ops.noisy_prefix(*args, **kwargs)


@pytest.mark.parametrize("noise_prob", [0.0, 1e-9, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("vocab_size", [1, 5, 1000, 16384, 16385, 65536])
@pytest.mark.parametrize("seed", [0, -9, 2**40])
def test_noisy_prefix_is_the_reference_exactly(noise_prob: float, vocab_size: int, seed: int) -> None:
    tokens = torch.randint(0, vocab_size, (7, 65), device=DEVICE)
    expected = corrupted("reference", tokens, noise_prob, vocab_size, seed=seed)
    prefix = corrupted("triton", tokens, noise_prob, vocab_size, seed=torch.tensor(seed, device=DEVICE))
    assert prefix.dtype == torch.int64
    assert torch.equal(prefix, expected)


def test_noisy_prefix_of_any_layout_and_sample_ids() -> None:
    ids = torch.tensor([3, 2**33 + 1, -7], device=DEVICE)
    square = torch.randint(0, 50, (64, 64), device=DEVICE)
    for tokens in (square.T[:3, ::2], square[:3, 5:6], square[:3, 63:], square[:3, :2]):
        expected = corrupted("reference", tokens, 0.5, 50, seed=1, sample_ids=ids)
        assert torch.equal(corrupted("triton", tokens, 0.5, 50, seed=1, sample_ids=ids), expected)
    assert corrupted("triton", square[:0], 0.5, 50, seed=1).shape == (0, 63)


def scalar(value: int) -> Tensor:
    return torch.tensor(value, device=DEVICE)


@pytest.mark.parametrize("with_ids", [False, True])
def test_opcheck(with_ids: bool) -> None:
    ids = torch.arange(2, device=DEVICE) if with_ids else None
    logits, hidden, weight = (torch.randn(shape, device=DEVICE) for shape in ((2, 1, 9), (2, 1, 4), (9, 4)))
    tokens = torch.randint(0, 9, (2, 5), device=DEVICE)
    for op, args in (
        (torch.ops.vapi_fast.group_sample, (logits, 3, scalar(1), ids, 0.9, 0, 1.0, scalar(7), ids)),
        (torch.ops.vapi_fast.group_sample, (logits, 3, scalar(1), ids, 0.9, 2, 1.0, scalar(7), ids)),
        (
            torch.ops.vapi_fast.linear_group_sample,
            (hidden, weight, None, 3, scalar(1), ids, 1.0, 0, 1.0, scalar(7), ids),
        ),
        (torch.ops.vapi_fast.noisy_prefix, (tokens, 0.5, 9, scalar(1), ids)),
    ):
        torch.library.opcheck(op.default, args)


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
