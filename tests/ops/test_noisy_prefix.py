"""The corruption of a prefix against a loop, exactly; the loss of the clean tokens after it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fused import DEVICE
from torch import Tensor, nn
from torch.nn import functional as F

from vapi_fast import kernels, ops
from vapi_fast.reference import philox
from vapi_fast.reference.philox import NOISY_PREFIX, seed_key

interpreted = pytest.mark.skipif(DEVICE.type != "cpu", reason="replaces a piece of a kernel")


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
    stats = pytest.importorskip("scipy.stats")
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
    monkeypatch.setattr(sys.modules["vapi_fast.kernels.noisy_prefix"], "random_words", smallest_word)
    for noise_prob, token in ((0.0, 5), (2.0**-24, 0)):
        assert (corrupted("triton", tokens, noise_prob, 65536, seed=0) == token).all()
    monkeypatch.setattr(sys.modules["vapi_fast.kernels.noisy_prefix"], "random_words", largest_word)
    for noise_prob, token in ((1 - 2.0**-24, 5), (1.0, 65535)):
        assert (corrupted("triton", tokens, noise_prob, 65536, seed=0) == token).all()


class Recorder(nn.Module):
    """A model whose hidden state at t is the sum of the inputs before t, so that the prefix can be read from it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, dtype=torch.float64)
        self.condition = nn.Embedding(3, 6, dtype=torch.float64)
        self.output = nn.Linear(6, 11, bias=False, dtype=torch.float64)

    def forward(self, tokens: Tensor, condition: Tensor, *, return_hidden: bool = False) -> Tensor:
        inputs = torch.cat([self.condition(condition)[:, None], self.embedding(tokens)], dim=1)
        hidden = inputs.cumsum(1)
        return hidden if return_hidden else self.output(hidden)


@pytest.mark.parametrize("length", [1, 9])
def test_noisy_prefix_cross_entropy(length: int) -> None:
    model, tokens, condition = Recorder(), torch.randint(0, 11, (4, length)), torch.tensor([0, 2, 1, 0])
    ids = torch.tensor([5, 1, 8, 2])
    loss = ops.noisy_prefix_cross_entropy(model, tokens, condition, noise_prob=0.5, seed=3, sample_ids=ids)
    prefix = ops.noisy_prefix(tokens, 0.5, 11, seed=3, sample_ids=ids)
    expected = F.cross_entropy(model(prefix, condition).transpose(1, 2), tokens)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters()) if length > 1 else [model.condition.weight, model.output.weight]
    for gradient, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)


def test_noisy_prefix_cross_entropy_of_the_kernels() -> None:
    model = Recorder().float().to(DEVICE)
    tokens, condition = torch.randint(0, 11, (3, 9), device=DEVICE), torch.randint(0, 3, (3,), device=DEVICE)
    results = []
    for operations in (kernels, ops):
        with ops.use_backend("reference"):
            loss = operations.noisy_prefix_cross_entropy(model, tokens, condition, noise_prob=0.5, seed=3)
        results.append((loss.detach(), *torch.autograd.grad(loss, model.parameters())))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_ids", [False, True])
def test_opcheck(with_ids: bool) -> None:
    tokens, seed = torch.randint(0, 9, (2, 5), device=DEVICE), torch.tensor(1, device=DEVICE)
    ids = torch.arange(2, device=DEVICE) if with_ids else None
    torch.library.opcheck(torch.ops.vapi_fast.noisy_prefix.default, (tokens, 0.5, 9, seed, ids))


TOKENS = torch.arange(5)[None]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"tokens must be in \[0, 4\), got 4", lambda: ops.noisy_prefix(TOKENS, 0.5, 4, seed=0)),
        (ValueError, r"noise_prob must be in", lambda: ops.noisy_prefix(TOKENS, 1.1, 5, seed=0)),
        (ValueError, r"tokens must have T > 0", lambda: ops.noisy_prefix(TOKENS[:, :0], 0.1, 5, seed=0)),
        (
            TypeError,
            r"tokens must be int64 \[B, T\], got float32",
            lambda: ops.noisy_prefix(TOKENS + 0.0, 0.1, 5, seed=0),
        ),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=f"^noisy_prefix: {message}") as raised:
        call()
    assert "\n" not in str(raised.value)
