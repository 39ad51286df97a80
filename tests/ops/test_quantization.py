"""The codebook: nearest codes by brute force, straight-through gradients by their defining formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from scipy import stats
from torch.nn import functional as F

from vapi_fast import ops, reference
from vapi_fast.reference.philox import GUMBEL, philox, seed_key
from vapi_fast.reference.straight_through import gumbel_noise


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("shape", [(1,), (63, 8), (2, 5, 13, 8), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vq_lookup_against_brute_force(l2_norm: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z, codebook = torch.randn(shape, dtype=dtype), torch.randn(65, shape[-1], dtype=dtype)
    z_q, indices = ops.vq_lookup(z, codebook, l2_norm=l2_norm)
    latents, codes = z.double().reshape(-1, shape[-1]).numpy(), codebook.double().numpy()
    if l2_norm:
        latents = latents / np.linalg.norm(latents, axis=-1, keepdims=True)
        codes = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    expected = ((latents[:, None] - codes) ** 2).sum(-1).argmin(-1)
    assert indices.shape == shape[:-1]
    if shape != (1,):  # unit vectors of one dimension are all ties, and rounding decides
        assert indices.flatten().tolist() == expected.tolist()
    torch.testing.assert_close(z_q, torch.from_numpy(codes)[indices].to(dtype))


@pytest.mark.parametrize(("tokens", "vocab", "width"), [(1, 2047, 256), (3, 512, 8), (129, 515, 8)])
def test_ties_go_to_the_lowest_index(tokens: int, vocab: int, width: int) -> None:
    codebook = torch.randn(vocab, width)
    codebook[-1] = codebook[vocab // 2] = codebook[7]
    z = codebook[7] + 1e-3 * torch.randn(tokens, width)
    assert ops.vq_lookup(z, codebook, l2_norm=False)[1].tolist() == [7] * tokens
    assert ops.vq_lookup(z, torch.ones(vocab, width))[1].tolist() == [0] * tokens


def test_vq_lookup_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = torch.randn(100, 8), torch.randn(33, 8)
    whole = ops.vq_lookup(z, codebook)[1]
    monkeypatch.setattr(reference.codebook, "DISTANCES_AT_ONCE", 33 * 7)
    assert torch.equal(ops.vq_lookup(z, codebook)[1], whole)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_vq_lookup_is_straight_through(l2_norm: bool) -> None:
    z = torch.randn(4, 7, 8, dtype=torch.float64).transpose(0, 1).requires_grad_()
    codebook = torch.randn(33, 8, dtype=torch.float64, requires_grad=True)
    z_q, indices = ops.vq_lookup(z, codebook, l2_norm=l2_norm)
    assert torch.equal(z_q, ops.codebook_lookup(indices, codebook, l2_norm=l2_norm))
    direction = torch.randn_like(z_q)
    gradient, codebook_gradient = torch.autograd.grad(z_q, (z, codebook), direction, allow_unused=True)
    assert codebook_gradient is None
    # The gradient of z / |z|, written out: (d − ẑ (ẑ·d)) / |z|.
    norm = z.norm(dim=-1, keepdim=True)
    expected = (direction - z / norm * (z / norm * direction).sum(-1, keepdim=True)) / norm if l2_norm else direction
    torch.testing.assert_close(gradient, expected)


def test_vq_lookup_of_nan_is_nan() -> None:
    z = torch.randn(3, 8)
    z[1, 2] = math.nan
    z_q, indices = ops.vq_lookup(z, torch.randn(33, 8))
    assert z_q.isnan().any(-1).tolist() == [False, True, False]
    assert 0 <= indices[1] < 33


def test_bfloat16_latents_are_compared_in_float32() -> None:
    z, codebook = torch.randn(50, 8).bfloat16(), torch.randn(1025, 8)
    z_q, indices = ops.vq_lookup(z, codebook)
    assert torch.equal(indices, ops.vq_lookup(z.double(), codebook.double())[1])
    assert z_q.dtype == torch.bfloat16


@pytest.mark.parametrize("l2_norm", [True, False])
def test_codebook_lookup_and_its_gradient(l2_norm: bool) -> None:
    codebook = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[3, 3, 0], [8, 1, 3]])
    entries = codebook / codebook.norm(dim=-1, keepdim=True) if l2_norm else codebook
    torch.testing.assert_close(ops.codebook_lookup(indices, codebook, l2_norm=l2_norm), entries[indices])
    assert torch.autograd.gradcheck(lambda c: ops.codebook_lookup(indices, c, l2_norm=l2_norm), codebook)
    assert ops.codebook_lookup(torch.zeros(0, 5).long(), codebook).shape == (0, 5, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codebook_lookup_accuracy(dtype: torch.dtype) -> None:
    indices = torch.randint(0, 33, (3, 63))
    assert_accurate(lambda codebook: ops.codebook_lookup(indices, codebook), [torch.randn(33, 8)], dtype)


@pytest.mark.parametrize("vocab", [1, 4, 63, 65])
def test_gumbel_noise_against_a_loop(vocab: int) -> None:
    ids = torch.tensor([4, 90])
    noise = gumbel_noise(torch.Size([2, 3, vocab]), 77, ids, torch.float64, torch.device("cpu"))
    for b, sample_id in enumerate(ids.tolist()):
        for t in range(3):
            for v in range(vocab):
                word = philox((t, v // 4, sample_id, GUMBEL), seed_key(77))[v % 4]
                uniform = ((word >> 9) + 0.5) / 2**23
                assert noise[b, t, v].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)
    low = gumbel_noise(torch.Size([2, 3, vocab]), 77, ids, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(low.double(), noise, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "tau"), [((2, 3, 17), 1.0), ((1, 1, 65), 0.5), ((2, 63, 5), 2.0)])
def test_straight_through_lookup(shape: tuple[int, int, int], tau: float) -> None:
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(shape[-1], 4, dtype=torch.float64, requires_grad=True)
    z_q, indices = ops.straight_through_lookup(logits, codebook, tau=tau, seed=5)
    perturbed = logits + gumbel_noise(logits.shape, 5, None, torch.float64, logits.device)
    assert torch.equal(indices, perturbed.argmax(-1))
    assert torch.equal(z_q, codebook[indices])
    soft = torch.einsum("btv,vc->btc", F.softmax(perturbed / tau, dim=-1), codebook)
    direction = torch.randn_like(z_q)
    for gradient, expected in zip(
        torch.autograd.grad(z_q, (logits, codebook), direction),
        torch.autograd.grad(soft, (logits, codebook), direction),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_straight_through_accuracy(dtype: torch.dtype, autocast: bool) -> None:
    def embeddings(logits: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ops.straight_through_lookup(logits, codebook, tau=1.0, seed=0)[0]

    assert_accurate(embeddings, [torch.randn(2, 63, 33), torch.randn(33, 8)], dtype)


def test_straight_through_draws_from_the_softmax_by_sample_id() -> None:
    logits = torch.randn(1, 1, 7).expand(20_000, 1, 7)
    codebook = torch.eye(7)
    z_q, indices = ops.straight_through_lookup(logits, codebook, tau=1.0, seed=8)
    counts = np.bincount(indices.flatten().numpy(), minlength=7)
    assert stats.chisquare(counts, logits[0, 0].double().softmax(-1).numpy() * 20_000).pvalue > 1e-3
    ids = torch.tensor([700, 3])
    some, _ = ops.straight_through_lookup(logits[:2], codebook, tau=1.0, seed=torch.tensor(8), sample_ids=ids)
    assert torch.equal(some, z_q[ids])


def test_straight_through_of_nan_is_nan() -> None:
    logits = torch.randn(1, 2, 7)
    logits[0, 1, 3] = math.nan
    z_q, indices = ops.straight_through_lookup(logits, torch.randn(7, 4), tau=1.0, seed=0)
    assert z_q.isnan().any(-1).tolist() == [[False, True]]
    assert 0 <= indices[0, 1] < 7


def test_bad_arguments() -> None:
    codebook = torch.zeros(5, 8)
    with pytest.raises(ValueError, match=r"vq_lookup: codebook must be .* \[V, C\] with C=4, got float32 \[5, 8\]"):
        ops.vq_lookup(torch.zeros(3, 4), codebook)
    with pytest.raises(TypeError, match=r"vq_lookup: z must be floating \[..., C\], got int64 \[3\]"):
        ops.vq_lookup(torch.zeros(3).long(), codebook)
    with pytest.raises(ValueError, match=r"vq_lookup: z must be floating \[..., C\], got float32 \[\]"):
        ops.vq_lookup(torch.zeros(()), codebook)
    with pytest.raises(ValueError, match="vq_lookup: codebook must have V > 0"):
        ops.vq_lookup(torch.zeros(3, 8), codebook[:0])
    with pytest.raises(ValueError, match=r"codebook_lookup: indices must be in \[0, 5\), got -1"):
        ops.codebook_lookup(torch.tensor([0, -1]), codebook)
    with pytest.raises(TypeError, match=r"codebook_lookup: indices must be int64 \[...\], got int32 \[2\]"):
        ops.codebook_lookup(torch.zeros(2, dtype=torch.int32), codebook)
    with pytest.raises(ValueError, match=r"codebook must be floating \[V, C\] with V=6, got float32 \[5, 8\]"):
        ops.straight_through_lookup(torch.zeros(1, 2, 6), codebook, tau=1.0, seed=0)
    with pytest.raises(ValueError, match="straight_through_lookup: tau must be positive and finite, got 0"):
        ops.straight_through_lookup(torch.zeros(1, 2, 5), codebook, tau=0.0, seed=0)
