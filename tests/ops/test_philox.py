"""Philox4x32-10 against Random123's published known-answer vectors, and the seeds and uniforms made from it."""

from __future__ import annotations

import pytest
import torch

from vapi_fast.ops import fold_seed
from vapi_fast.reference.philox import open_uniform23, philox, seed_key, uniform24

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
