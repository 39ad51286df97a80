"""Philox4x32-10 against Random123's known answers, the seeds and uniforms made from it, and the kernels'."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from fused import DEVICE

from vapi_fast.kernels import philox as kernels
from vapi_fast.ops import fold_seed
from vapi_fast.reference.philox import (
    GROUP_SAMPLE,
    GUMBEL,
    NOISY_PREFIX,
    open_uniform23,
    philox,
    seed_key,
    uniform24,
)

# Random123's tests/kat_vectors, lines "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_of_ints(counter: str, key: str, expected: str) -> None:
    assert philox(words(counter), words(key)) == words(expected)


def test_known_answers_of_tensors() -> None:
    counter = tuple(torch.tensor([words(c)[i] for c, _, _ in KNOWN_ANSWERS]) for i in range(4))
    key = tuple(torch.tensor([words(k)[i] for _, k, _ in KNOWN_ANSWERS]) for i in range(2))
    drawn = torch.stack(philox(counter, key), dim=-1)
    assert drawn.tolist() == [list(words(expected)) for _, _, expected in KNOWN_ANSWERS]


def test_counter_words_broadcast() -> None:
    rows, columns = torch.arange(3)[:, None], torch.arange(5)
    drawn = philox((rows, columns, 7, 1), (11, 13))[0]
    assert drawn.shape == (3, 5)
    assert drawn[2, 4] == philox((2, 4, 7, 1), (11, 13))[0]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
def test_seed_tensor_equals_seed_int(seed: int) -> None:
    assert seed_key(seed) == (seed % 2**32, (seed >> 32) % 2**32)
    assert tuple(int(word) for word in seed_key(torch.tensor(seed))) == seed_key(seed)


def test_uniforms_are_exact_and_inside_their_interval() -> None:
    extremes = torch.tensor([0, 2**32 - 1])
    assert uniform24(extremes, torch.float32).tolist() == [0.0, 1 - 2**-24]
    assert open_uniform23(extremes, torch.float32).tolist() == [2**-24, 1 - 2**-24]
    word = torch.stack(philox((torch.arange(1000), 0, 0, 0), (0, 0)))
    for uniform in (uniform24, open_uniform23):
        assert torch.equal(uniform(word, torch.float32).double(), uniform(word, torch.float64))


def test_fold_seed() -> None:
    seeds = [fold_seed(seed, step) for seed in (0, 1, -5, 2**62) for step in (0, 1, 2, 2**33)]
    assert len(set(seeds)) == len(seeds)
    assert all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds)
    high, low, _, _ = philox((2, 1, 0, 4), (7, 0))  # step 2³² + 2
    assert fold_seed(7, 2**32 + 2) == (high % 2**31) * 2**32 + low


@pytest.mark.parametrize(
    ("seed", "step"), [(torch.tensor(3), 9), (3, torch.tensor(9)), (torch.tensor(3), torch.tensor(9))]
)
def test_fold_seed_of_tensors(seed: int | torch.Tensor, step: int | torch.Tensor) -> None:
    folded = fold_seed(seed, step)
    assert (folded.shape, folded.dtype, int(folded)) == ((), torch.int64, fold_seed(3, 9))


@triton.jit
def words_and_uniforms(seed_ptr, counters_ptr, words_ptr, uniforms_ptr, OPERATION: tl.constexpr, LENGTH: tl.constexpr):
    lane = tl.arange(0, LENGTH)
    position = tl.load(counters_ptr + lane)
    index = tl.load(counters_ptr + LENGTH + lane)
    sample_id = tl.load(counters_ptr + 2 * LENGTH + lane)
    w0, w1, w2, w3 = kernels.random_words(tl.load(seed_ptr), position, index, sample_id, OPERATION)
    tl.store(words_ptr + lane, w0.to(tl.int64))
    tl.store(words_ptr + LENGTH + lane, w1.to(tl.int64))
    tl.store(words_ptr + 2 * LENGTH + lane, w2.to(tl.int64))
    tl.store(words_ptr + 3 * LENGTH + lane, w3.to(tl.int64))
    tl.store(uniforms_ptr + lane, kernels.uniform24(w0))
    tl.store(uniforms_ptr + LENGTH + lane, kernels.open_uniform23(w0))


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 3, -(2**63), 2**63 - 1, 0x299F31D0A4093822])
def test_random_words(seed: int) -> None:
    counters = torch.randint(-(2**40), 2**40, (3, 64), device=DEVICE)
    # Counters of Random123's known answers; the last of them has this test's last seed as its key.
    counters[:, :3] = torch.tensor([[0, 2**32 - 1, 0x243F6A88], [0, 2**32 - 1, 0x85A308D3], [0, 2**32 - 1, 0x13198A2E]])
    words = torch.zeros(4, 64, dtype=torch.int64, device=DEVICE)
    uniforms = torch.zeros(2, 64, device=DEVICE)
    for operation in (3, 0x03707344):
        words_and_uniforms[(1,)](torch.tensor(seed, device=DEVICE), counters, words, uniforms, operation, 64)
        expected = philox((*(counters & (2**32 - 1)), operation), seed_key(seed))
        assert torch.equal(words, torch.stack(expected))
        assert torch.equal(uniforms[0], uniform24(expected[0], torch.float32))
        assert torch.equal(uniforms[1], open_uniform23(expected[0], torch.float32))
    if seed == 0x299F31D0A4093822:
        assert words[:, 2].tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_operations_have_the_reference_counters() -> None:
    constants = kernels.GROUP_SAMPLE, kernels.NOISY_PREFIX, kernels.GUMBEL
    assert tuple(constant.value for constant in constants) == (GROUP_SAMPLE, NOISY_PREFIX, GUMBEL)
