"""Philox4x32-10, the counter-based random generator of Salmon et al., "Parallel random numbers" (SC 2011).

Every stochastic operation draws its words from the counter `(position, rollout, sample id, operation)` under the key
`seed`. A draw is therefore a pure function of these five numbers: it does not depend on the batch it is part of, on
the number of ranks, or on the backend. The fourth counter word is one of:

| constant        | value | drawn                                                                            |
|-----------------|-------|----------------------------------------------------------------------------------|
| `GROUP_SAMPLE`  | 1     | word 0: the uniform of token t of rollout g                                      |
| `NOISY_PREFIX`  | 2     | rollout 0; word 0: whether position t is replaced; word 1: by which token        |
| `GUMBEL`        | 3     | second counter word v // 4, output word v % 4: the Gumbel noise of logit v       |
| `FOLD_SEED`     | 4     | counter (step low, step high, 0); words 0 and 1: the seed of that step           |
| `CONTROL`       | 5     | word 0: the made-up reward of rollout g (position 0) or of its token t; word 1   |
|                 |       | of position and rollout 0: whose advantages an image gets instead of its own     |
|                 |       | (`vapi_fast.alignment.control`)                                                  |
| `DROPOUT`       | 6     | position (T − 1 − t)·⌈D/8⌉ + c, second counter word the site; bits 0–15 and      |
|                 |       | 16–31 of the words 0 to 3: whether columns c, c + ⌈D/8⌉, … are dropped           |
| `LABEL_DROPOUT` | 7     | position and rollout 0; word 0: whether the image's condition is dropped         |
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_SAMPLE = 1
NOISY_PREFIX = 2
GUMBEL = 3
FOLD_SEED = 4
CONTROL = 5
DROPOUT = 6
LABEL_DROPOUT = 7

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

Word = Tensor | int


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Four random 32-bit words for each counter.

    Counter and key words are ints in [0, 2³²) or int64 tensors of such, broadcast against each other; so are the
    words returned. With ints alone the result is four ints.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2⁶⁴, and the mask drops the sign extension: exact for any pair of 32-bit words.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


def seed_key(seed: Word) -> tuple[Word, Word]:
    """Key of a 64-bit seed (int or 0-d int64 tensor): its low and its high 32 bits."""
    return seed & MASK, (seed >> 32) & MASK


def uniform24(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform in [0, 1) from the upper 24 bits of a word: exact in float32."""
    return (word >> 8).to(dtype) * 2.0**-24


def open_uniform23(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform in (0, 1), ends excluded, from the upper 23 bits of a word: (x + ½)·2⁻²³, exact in float32.

    One bit fewer than `uniform24`: with 24 bits the half would need a 25th, and the largest value would round to 1.
    """
    return ((word >> 9).to(dtype) + 0.5) * 2.0**-23


def default_sample_ids(batch: int, sample_ids: Tensor | None, device: torch.device) -> Tensor:
    """Third counter word `[B]`: the low 32 bits of the global sample ids, or 0…B−1 if there are none."""
    if sample_ids is None:
        return torch.arange(batch, device=device)
    return sample_ids & MASK


def fold_seed(seed: Word, step: Word) -> Word:
    """Seed of one step of a run, in [0, 2⁶³): independent streams for different steps or different run seeds.

    seed: int in [−2⁶³, 2⁶³) or 0-d int64 tensor; step: int ≥ 0 or 0-d int64 tensor. Two ints give an int, otherwise
    the result is a 0-d int64 tensor.
    """
    high, low, _, _ = philox((*seed_key(step), 0, FOLD_SEED), seed_key(seed))
    return ((high & 0x7FFFFFFF) << 32) | low
