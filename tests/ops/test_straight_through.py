"""The straight-through draw: noise by a loop, gradients by their formula, Triton against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from accuracy import RELATIVE_L2, assert_accurate, relative_l2
from fused import DEVICE, DTYPES, cast, misaligned, strided
from torch import Tensor
from torch.nn import functional as F

from vapi_fast import ops
from vapi_fast.reference.philox import GUMBEL, philox, seed_key
from vapi_fast.reference.straight_through import gumbel_noise

# ---- the formulas


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
def test_draw_and_gradients_are_the_formulas(shape: tuple[int, int, int], tau: float) -> None:
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


def test_bad_arguments() -> None:
    codebook = torch.zeros(5, 8)
    with pytest.raises(ValueError, match=r"codebook must be floating \[V, C\] with V=6, got float32 \[5, 8\]"):
        ops.straight_through_lookup(torch.zeros(1, 2, 6), codebook, tau=1.0, seed=0)
    with pytest.raises(ValueError, match="straight_through_lookup: tau must be positive and finite, got 0"):
        ops.straight_through_lookup(torch.zeros(1, 2, 5), codebook, tau=0.0, seed=0)
    wide = torch.zeros(1, 2, 5, device=DEVICE).double()
    with ops.use_backend("triton"), pytest.raises(TypeError, match="_lookup: logits must be float32, bfloat16 or"):
        ops.straight_through_lookup(wide, codebook.to(DEVICE), tau=1.0, seed=0)


# ---- on Triton, against float64


def perturbed(logits: Tensor, tau: float, seed: int | Tensor, sample_ids: Tensor | None) -> Tensor:
    noise = gumbel_noise(logits.shape, seed, sample_ids, torch.float64, logits.device)
    return (logits.double() + noise) / tau


def assert_straight_through_accurate(
    logits: Tensor,
    codebook: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    tau: float = 1.0,
    seed: int | Tensor = 5,
    sample_ids: Tensor | None = None,
    variants: bool = False,
) -> Tensor:
    """The code drawn in float64 but for rounding, its entry as it is, gradients near float64's; returns the codes."""
    low = [cast(x, dtype).requires_grad_() for x in (logits, codebook)]
    exact = [x.detach().double().requires_grad_() for x in low]
    draw = {"tau": tau, "seed": seed, "sample_ids": sample_ids}
    with ops.use_backend("reference"):
        expected, codes = ops.straight_through_lookup(*exact, **draw)
    with ops.use_backend("triton"):
        z_q, indices = ops.straight_through_lookup(*low, **draw)
    assert (z_q.dtype, indices.dtype, indices.shape) == (dtype, torch.int64, logits.shape[:2])
    assert torch.equal(z_q.detach(), low[1].detach()[indices])

    noisy = perturbed(exact[0].detach(), tau, seed, sample_ids)
    gap = noisy.amax(-1) - noisy.gather(-1, indices[..., None])[..., 0]
    assert (gap <= 2e-6 * (1 + noisy.amax(-1).abs())).all()
    assert (indices != codes).float().mean() < 0.01

    direction = torch.randn(expected.shape, device=DEVICE).to(dtype)
    expected_gradients = torch.autograd.grad(expected, exact, direction.double())
    gradients = torch.autograd.grad(z_q, low, direction, retain_graph=True)
    for x, gradient, expected_gradient in zip(low, gradients, expected_gradients, strict=True):
        assert gradient.dtype == x.dtype
        assert gradient.shape == x.shape
        if logits.shape[-1] == 1 and x is low[0]:
            assert gradient.abs().max() < 1e-5  # a softmax of one class has no gradient
        else:
            assert relative_l2(gradient, expected_gradient) < RELATIVE_L2[dtype]
    if variants:  # one of the gradients alone, and none
        for x, gradient in zip(low, gradients, strict=True):
            assert torch.equal(torch.autograd.grad(z_q, x, direction, retain_graph=True)[0], gradient)
        with ops.use_backend("triton"), torch.no_grad():
            for again, before in zip(ops.straight_through_lookup(*low, **draw), (z_q, indices), strict=True):
                assert torch.equal(again, before)
    return indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "width", "tau"),
    [
        ((1, 1, 1), 8, 1.0),
        ((1, 63, 5), 1, 2.0),
        ((1, 65, 66), 3, 0.5),
        ((2, 3, 1000), 16, 1.0),
        ((1, 577, 7), 8, 1.0),
        ((2, 5, 300), 100, 1.0),
    ],
)
def test_straight_through_lookup(shape: tuple[int, int, int], width: int, tau: float, dtype: torch.dtype) -> None:
    assert_straight_through_accurate(torch.randn(shape), torch.randn(shape[-1], width), dtype, tau=tau)


def test_straight_through_lookup_of_16384_codes() -> None:
    logits, codebook = torch.randn(1, 3, 16384), F.normalize(torch.randn(16384, 8), dim=-1)
    assert_straight_through_accurate(logits, codebook)


@pytest.mark.parametrize("scale", [0.0, 3.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_straight_through_of_flat_and_of_concentrated_rows(scale: float, dtype: torch.dtype) -> None:
    logits = 0.5 + scale * torch.randn(2, 9, 1030)
    assert_straight_through_accurate(logits, F.normalize(torch.randn(1030, 8), dim=-1), dtype, variants=scale == 3)


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1, torch.tensor(-77)])
def test_straight_through_draws_as_the_reference(seed: int | Tensor) -> None:
    logits, codebook = torch.randn(3, 11, 130, device=DEVICE), torch.randn(130, 8, device=DEVICE)
    ids = torch.tensor([2**40 + 5, 0, -3], device=DEVICE)
    indices = assert_straight_through_accurate(logits, codebook, seed=seed, sample_ids=ids)
    others = assert_straight_through_accurate(logits, codebook, seed=seed)
    assert (indices[1] != others[1]).any()  # another sample id
    with ops.use_backend("triton"):
        _, same = ops.straight_through_lookup(logits[2:], codebook, tau=1.0, seed=seed, sample_ids=ids[2:])
    assert torch.equal(same, indices[2:])


@pytest.mark.parametrize("change", [misaligned, strided, lambda x: x.transpose(0, 1), lambda x: x[:, 1:, 3:]])
def test_straight_through_of_any_strides(change: Callable[[Tensor], Tensor]) -> None:
    logits = change(torch.randn(4, 3, 72))
    assert_straight_through_accurate(logits, torch.randn(8, logits.shape[-1]).T)


def test_straight_through_of_masked_logits() -> None:
    logits, codebook = torch.randn(2, 9, 1500), torch.randn(1500, 8)
    logits[0, :, :1400] = -math.inf  # the first blocks and the first split have nothing
    logits[0, 3:, 200:] = -math.inf
    logits[0, 3:, :200] = 0
    logits[1, ::2, ::3] = -1e4
    indices = assert_straight_through_accurate(logits, codebook)
    assert (indices[0, :3] >= 1400).all()
    assert (indices[0, 3:] < 200).all()


def test_straight_through_of_extreme_logits() -> None:
    codebook = torch.randn(1500, 8, device=DEVICE)
    logits = torch.full((1, 3, 1500), -1e4, device=DEVICE)
    logits[0, 0, 1234] = 1e4
    logits[0, 1] = 1e4
    logits[0, 2] = 1e4 * (torch.arange(1500, device=DEVICE) % 2 * 2 - 1)
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        x = logits.to(dtype).requires_grad_()
        with ops.use_backend(backend):
            z_q, indices = ops.straight_through_lookup(x, codebook.to(dtype), tau=1.0, seed=1)
        results.append((indices, *torch.autograd.grad(z_q, x, torch.ones_like(z_q))))
    assert results[1][0][0, 0] == 1234
    assert results[1][1][0, 0].abs().max() < 1e-6  # one certain code
    gaps = perturbed(logits, 1.0, 1, None)
    gaps = gaps.amax(-1) - gaps.gather(-1, results[1][0][..., None])[..., 0]
    assert gaps.max() < 2e-3  # 10⁴ has an ulp of 10⁻³
    assert relative_l2(results[1][1], results[0][1]) < 2e-3


# ---- on both


def test_straight_through_of_what_has_no_softmax(backend: str) -> None:
    logits = torch.randn(2, 4, 1500, device=DEVICE)
    logits[0, 1, 3], logits[0, 2], logits[1, 0, 1400], logits[1, 3, 2] = math.nan, -math.inf, math.inf, -math.nan
    expected = [[False, True, True, False], [True, False, False, True]]
    codebook = torch.randn(1500, 8, device=DEVICE)
    z_q, indices = ops.straight_through_lookup(logits, codebook, tau=1.0, seed=0)
    assert z_q.isnan().all(-1).tolist() == z_q.isnan().any(-1).tolist() == expected
    x = logits.clone().requires_grad_()
    z_q, indices = ops.straight_through_lookup(x, codebook, tau=1.0, seed=0)
    (gradient,) = torch.autograd.grad(z_q, x, torch.randn_like(z_q))
    assert z_q.isnan().all(-1).tolist() == z_q.isnan().any(-1).tolist() == expected
    assert gradient.isnan().all(-1).tolist() == gradient.isnan().any(-1).tolist() == expected
    assert ((indices >= 0) & (indices < 1500)).all()


def test_straight_through_of_a_codebook_with_nan_is_nan(backend: str) -> None:
    codebook = torch.randn(70, 8, device=DEVICE, requires_grad=True)
    with torch.no_grad():
        codebook[69, 2] = math.nan
    z_q, _ = ops.straight_through_lookup(torch.randn(1, 5, 70, device=DEVICE), codebook, tau=1.0, seed=0)
    assert z_q[..., 2].isnan().all()


def test_straight_through_draws_from_the_softmax_by_sample_id(backend: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    rows, logits = 20_000 if backend == "reference" else 2000, torch.randn(7, device=DEVICE)
    repeated, eye = logits.expand(4, rows // 4, 7), torch.eye(7, device=DEVICE)
    z_q, indices = ops.straight_through_lookup(repeated, eye, tau=0.3, seed=8)
    counts = np.bincount(indices.flatten().cpu().numpy(), minlength=7)
    assert stats.chisquare(counts, logits.double().softmax(-1).cpu().numpy() * rows).pvalue > 1e-4
    ids, seed = torch.tensor([3, 1], device=DEVICE), torch.tensor(8, device=DEVICE)
    some, _ = ops.straight_through_lookup(repeated[:2], eye, tau=0.3, seed=seed, sample_ids=ids)
    assert torch.equal(some, z_q[ids])


def test_the_tails_of_the_noise() -> None:
    """Of perturbed logits that are almost equal one with an error of the noise wins, however large the noise."""
    noise = gumbel_noise(torch.Size([1, 20, 4096]), 3, None, torch.float64, DEVICE)
    assert noise.max() > 8
    logits = (1e-5 * torch.randn_like(noise) - noise).float()
    with ops.use_backend("triton"):
        _, indices = ops.straight_through_lookup(logits, torch.randn(4096, 1, device=DEVICE), tau=1.0, seed=3)
    exact = logits + noise
    assert (exact.amax(-1) - exact.gather(-1, indices[..., None])[..., 0]).max() < 1e-5


def test_empty_batch(backend: str) -> None:
    codebook = torch.randn(9, 8, device=DEVICE, requires_grad=True)
    logits = torch.empty(2, 0, 9, device=DEVICE, requires_grad=True)
    z_q, indices = ops.straight_through_lookup(logits, codebook, tau=1.0, seed=0)
    assert (z_q.shape, indices.shape) == ((2, 0, 8), (2, 0))
    gradients = torch.autograd.grad(z_q.sum(), (logits, codebook))
    assert gradients[0].shape == logits.shape
    assert gradients[1].tolist() == [[0.0] * 8] * 9


def test_opcheck() -> None:
    codebook, logits = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((33, 8), (2, 5, 33)))
    seed, ids = torch.tensor(3, device=DEVICE), torch.tensor([4, 9], device=DEVICE)
    straight_through = torch.ops.vapi_fast.straight_through_lookup.default
    torch.library.opcheck(straight_through, (logits, codebook, seed, ids, 0.7, True))
    inputs = (logits.detach(), codebook.detach(), seed, None)
    torch.library.opcheck(straight_through, (*inputs, 1.0, False))
    statistics = straight_through(*inputs, 1.0, True)[2:]
    for needs in ((True, False), (False, True), (True, True)):
        arguments = (torch.randn(2, 5, 8, device=DEVICE), *inputs, *statistics, 1.0, *needs)
        torch.library.opcheck(torch.ops.vapi_fast.straight_through_lookup_backward.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_production_sizes(dtype: torch.dtype) -> None:
    codebook = F.normalize(torch.randn(16384, 8), dim=-1)
    assert_straight_through_accurate(3 * torch.randn(1, 577, 16384), codebook, dtype)
    for shape in ((2, 576, 16384), (1, 63, 65536)):
        assert_straight_through_accurate(torch.randn(shape), torch.randn(shape[-1], 8), dtype, seed=-9)
