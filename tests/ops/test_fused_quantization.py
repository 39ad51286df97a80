"""The codebook's operations on Triton against the reference in float64: codes, entries, gradients, draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from accuracy import RELATIVE_L2, relative_l2
from fused import DEVICE, DTYPES, assert_fused_accurate, cast, misaligned, strided
from torch import Tensor
from torch.nn import functional as F

from vapi_fast import ops
from vapi_fast.kernels import codebook as kernels
from vapi_fast.reference.straight_through import gumbel_noise


def assert_vq_accurate(
    z: Tensor, codebook: Tensor, dtype: torch.dtype = torch.float32, *, l2_norm: bool = True
) -> Tensor:
    """Codes nearest in float64 but for rounding, their entries in z's dtype, and the gradient; returns the codes."""
    z = cast(z, dtype).requires_grad_()
    codebook = codebook.to(DEVICE).requires_grad_()
    exact, exact_codebook = z.detach().double().requires_grad_(), codebook.detach().double()
    with ops.use_backend("triton"):
        z_q, indices = ops.vq_lookup(z, codebook, l2_norm=l2_norm)
        entries = ops.codebook_lookup(indices, codebook, l2_norm=l2_norm).detach()
    with ops.use_backend("reference"):
        expected, nearest = ops.vq_lookup(exact, exact_codebook, l2_norm=l2_norm)
    assert (z_q.dtype, z_q.shape) == (dtype, z.shape)
    assert (indices.dtype, indices.shape) == (torch.int64, z.shape[:-1])
    truncation = 0 if dtype is torch.float32 else 2**-7  # of the interpreter, where hardware rounds
    torch.testing.assert_close(z_q.detach(), entries.to(dtype), rtol=truncation, atol=0)

    latents, codes = exact.detach().reshape(-1, z.shape[-1]), exact_codebook
    if l2_norm:
        latents, codes = F.normalize(latents, dim=-1), F.normalize(codes, dim=-1)
    found, least = ((latents - codes[i.flatten()]).norm(dim=-1) for i in (indices, nearest))
    rounding = 1e-6 * (least + torch.finfo(dtype).tiny if not l2_norm else least + 0.1)
    assert (found <= least + rounding).all()
    wrong = (indices != nearest).float().mean()
    assert wrong < 0.01 or z.shape[-1] == 1  # unit vectors of one dimension are all ties, and rounding decides
    assert relative_l2(z_q.detach(), codes[indices]) < RELATIVE_L2[dtype]

    direction = torch.randn(expected.shape, device=DEVICE).to(dtype)
    gradient, none = torch.autograd.grad(z_q, (z, codebook), direction, allow_unused=True)
    assert none is None
    assert gradient.dtype == dtype
    if l2_norm and z.shape[-1] == 1:
        assert gradient.abs().max() <= 1e-5 * (direction / exact).abs().max()  # ±1 has no gradient
    else:
        (expected_gradient,) = torch.autograd.grad(expected, exact, direction.double())
        assert relative_l2(gradient, expected_gradient) < RELATIVE_L2[dtype]
    return indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize(
    ("shape", "vocab"),
    [
        ((1, 8), 1),
        ((63, 1), 5),
        ((65, 3), 1000),
        ((5, 16), 2049),
        ((7, 100), 130),
        ((2, 3, 4, 8), 129),
        ((577, 8), 63),
    ],
)
def test_vq_lookup(shape: tuple[int, ...], vocab: int, l2_norm: bool, dtype: torch.dtype) -> None:
    assert_vq_accurate(torch.randn(shape), torch.randn(vocab, shape[-1]), dtype, l2_norm=l2_norm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vq_lookup_of_16384_codes(dtype: torch.dtype) -> None:
    assert_vq_accurate(torch.randn(32, 8), torch.randn(16384, 8), dtype)


def channels_last(x: Tensor) -> Tensor:
    """As the tokenizer passes its latents: `[B, C, H, W]` in memory, channels last in shape."""
    return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    "change", [misaligned, strided, channels_last, lambda x: x.transpose(0, 1), lambda x: x[:, 1:, ::2, :7]]
)
def test_vq_lookup_of_any_strides(change: Callable[[Tensor], Tensor]) -> None:
    z = change(torch.randn(2, 3, 5, 8))
    assert_vq_accurate(z, torch.randn(70, 2 * z.shape[-1])[:, ::2])


def test_codes_of_very_different_norms() -> None:
    codebook = torch.randn(500, 8) * 10 ** torch.linspace(-4, 4, 500)[:, None]
    z = codebook[torch.randperm(500)[:200]] * (1 + 1e-3 * torch.randn(200, 8))
    indices = assert_vq_accurate(z, codebook, l2_norm=False)
    assert len(indices.unique()) > 100
    assert_vq_accurate(z, codebook)


@pytest.mark.parametrize(("vocab", "width"), [(131, 8), (4200, 8), (2100, 20)])
def test_ties_go_to_the_lowest_index(vocab: int, width: int) -> None:
    codebook = torch.randn(vocab, width)
    codebook[-1] = codebook[vocab // 2] = codebook[7]
    z = (codebook[7] + 1e-3 * torch.randn(9, width)).to(DEVICE)
    with ops.use_backend("triton"):
        for l2_norm in (False, True):
            assert ops.vq_lookup(z, codebook.to(DEVICE), l2_norm=l2_norm)[1].tolist() == [7] * 9
            assert ops.vq_lookup(z, torch.ones_like(codebook).to(DEVICE), l2_norm=l2_norm)[1].tolist() == [0] * 9


def vq_on(backend: str, z: Tensor, codebook: Tensor, l2_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    z = z.clone().requires_grad_()
    with ops.use_backend(backend):
        z_q, indices = ops.vq_lookup(z, codebook, l2_norm=l2_norm)
    return z_q.detach(), indices, torch.autograd.grad(z_q.sum(), z)[0]


@pytest.mark.parametrize("l2_norm", [True, False])
def test_vq_lookup_of_zero_tiny_large_and_nan(l2_norm: bool) -> None:
    codebook, z = torch.randn(200, 8, device=DEVICE), torch.randn(9, 8, device=DEVICE)
    z[0], z[1], z[2], z[3], z[4, 3] = 0, z[1] * 1e-14, z[2] * 1e-6, z[3] * 1e4, math.nan
    (z_q, indices, gradient), expected = (vq_on(backend, z, codebook, l2_norm) for backend in ("triton", "reference"))
    assert z_q.isnan().any(-1).tolist() == [row == 4 for row in range(9)]
    assert 0 <= indices[0] < 200
    first = 1 if l2_norm else 0  # all unit vectors are equally far from 0, and rounding decides
    assert torch.equal(indices[first:], expected[1][first:])
    torch.testing.assert_close(z_q[first:], expected[0][first:], equal_nan=True)
    torch.testing.assert_close(gradient, expected[2], rtol=1e-4, atol=1e-5, equal_nan=True)

    codebook[150, 2] = math.nan  # such a code is the nearest of all, as torch.argmin has it: never hidden
    z_q, indices, _ = vq_on("triton", z[5:], codebook, l2_norm)
    assert indices.tolist() == vq_on("reference", z[5:], codebook, l2_norm)[1].tolist() == [150] * 4
    assert z_q.isnan().any(-1).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize(
    ("shape", "vocab", "width"), [((), 3, 8), ((577,), 33, 8), ((3, 65), 1000, 3), ((2, 3, 4), 1, 5), ((130,), 9, 100)]
)
def test_codebook_lookup(shape: tuple[int, ...], vocab: int, width: int, l2_norm: bool, dtype: torch.dtype) -> None:
    indices = torch.randint(0, vocab, shape, device=DEVICE)

    def entries(codebook: Tensor) -> Tensor:
        return ops.codebook_lookup(indices, codebook, l2_norm=l2_norm)

    assert_fused_accurate(entries, [torch.randn(vocab, width)], dtype)


@pytest.mark.parametrize("change", [misaligned, strided, lambda x: x.T, lambda x: x[3:, 1:]])
def test_codebook_lookup_of_any_strides(change: Callable[[Tensor], Tensor]) -> None:
    codebook = change(torch.randn(20, 20))
    indices = torch.randint(0, len(codebook), (7, 6), device=DEVICE).T[::2]
    assert_fused_accurate(lambda c: ops.codebook_lookup(indices, c), [codebook], torch.float32)


def test_codebook_lookup_of_zero_nan_and_unknown_codes() -> None:
    codebook = torch.randn(5, 8, device=DEVICE)
    codebook[1], codebook[2, 3] = 0, math.nan
    codebook.requires_grad_()
    indices = torch.tensor([0, 1, 2, -1, 5], device=DEVICE)
    # The public operation refuses unknown codes where it can see them, on a CPU.
    entries = kernels.codebook_lookup(indices, codebook)
    assert entries.isnan().any(-1).tolist() == [False, False, True, True, True]
    assert entries[1].tolist() == [0.0] * 8
    (gradient,) = torch.autograd.grad(entries, codebook, torch.ones_like(entries))
    torch.testing.assert_close(gradient[1], torch.full((8,), 1e12, device=DEVICE))  # of x / eps
    assert gradient.isnan().any(-1).tolist() == [False, False, True, False, False]
    assert gradient[3:].count_nonzero() == 0


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


def test_straight_through_of_what_has_no_softmax() -> None:
    logits = torch.randn(2, 4, 1500, device=DEVICE)
    logits[0, 1, 3], logits[0, 2], logits[1, 0, 1400], logits[1, 3, 2] = math.nan, -math.inf, math.inf, -math.nan
    expected = [[False, True, True, False], [True, False, False, True]]
    codebook = torch.randn(1500, 8, device=DEVICE)
    with ops.use_backend("triton"):
        z_q, indices = ops.straight_through_lookup(logits, codebook, tau=1.0, seed=0)
        assert z_q.isnan().all(-1).tolist() == z_q.isnan().any(-1).tolist() == expected
        x = logits.clone().requires_grad_()
        z_q, indices = ops.straight_through_lookup(x, codebook, tau=1.0, seed=0)
        (gradient,) = torch.autograd.grad(z_q, x, torch.randn_like(z_q))
    assert z_q.isnan().all(-1).tolist() == z_q.isnan().any(-1).tolist() == expected
    assert gradient.isnan().all(-1).tolist() == gradient.isnan().any(-1).tolist() == expected
    assert ((indices >= 0) & (indices < 1500)).all()


def test_straight_through_of_a_codebook_with_nan_is_nan() -> None:
    codebook = torch.randn(70, 8, device=DEVICE, requires_grad=True)
    with torch.no_grad():
        codebook[69, 2] = math.nan
    with ops.use_backend("triton"):
        z_q, _ = ops.straight_through_lookup(torch.randn(1, 5, 70, device=DEVICE), codebook, tau=1.0, seed=0)
    assert z_q[..., 2].isnan().all()


def test_straight_through_draws_from_the_softmax() -> None:
    stats = pytest.importorskip("scipy.stats")
    rows, logits = 2000, torch.randn(7, device=DEVICE)
    with ops.use_backend("triton"):
        repeated = logits.expand(4, rows // 4, 7)
        _, indices = ops.straight_through_lookup(repeated, torch.eye(7, device=DEVICE), tau=0.3, seed=8)
    counts = np.bincount(indices.flatten().cpu().numpy(), minlength=7)
    assert stats.chisquare(counts, logits.double().softmax(-1).cpu().numpy() * rows).pvalue > 1e-4


def test_the_tails_of_the_noise() -> None:
    """Of perturbed logits that are almost equal one with an error of the noise wins, however large the noise."""
    noise = gumbel_noise(torch.Size([1, 20, 4096]), 3, None, torch.float64, DEVICE)
    assert noise.max() > 8
    logits = (1e-5 * torch.randn_like(noise) - noise).float()
    with ops.use_backend("triton"):
        _, indices = ops.straight_through_lookup(logits, torch.randn(4096, 1, device=DEVICE), tau=1.0, seed=3)
    exact = logits + noise
    assert (exact.amax(-1) - exact.gather(-1, indices[..., None])[..., 0]).max() < 1e-5


def test_empty_batches() -> None:
    codebook = torch.randn(9, 8, device=DEVICE, requires_grad=True)
    with ops.use_backend("triton"):
        z = torch.empty(0, 3, 8, device=DEVICE, requires_grad=True)
        z_q, indices = ops.vq_lookup(z, codebook)
        assert (z_q.shape, indices.shape) == ((0, 3, 8), (0, 3))
        assert torch.autograd.grad(z_q.sum(), z)[0].shape == z.shape
        entries = ops.codebook_lookup(indices, codebook)
        assert torch.autograd.grad(entries.sum(), codebook)[0].tolist() == [[0.0] * 8] * 9
        logits = torch.empty(2, 0, 9, device=DEVICE, requires_grad=True)
        z_q, indices = ops.straight_through_lookup(logits, codebook, tau=1.0, seed=0)
        assert (z_q.shape, indices.shape) == ((2, 0, 8), (2, 0))
        gradients = torch.autograd.grad(z_q.sum(), (logits, codebook))
    assert gradients[0].shape == logits.shape
    assert gradients[1].tolist() == [[0.0] * 8] * 9


@pytest.mark.parametrize("name", ["vq_lookup", "codebook_lookup", "straight_through_lookup"])
def test_float64_is_refused(name: str) -> None:
    wide = torch.randn(2, 3, 8, device=DEVICE).double()
    calls = {
        "vq_lookup": lambda: ops.vq_lookup(wide, wide[0]),
        "codebook_lookup": lambda: ops.codebook_lookup(torch.zeros(2, device=DEVICE).long(), wide[0]),
        "straight_through_lookup": lambda: ops.straight_through_lookup(wide, wide[0].T, tau=1.0, seed=0),
    }
    with ops.use_backend("triton"), pytest.raises(TypeError, match=rf"{name}: \w+ must be float32, bfloat16 or"):
        calls[name]()


def test_opcheck() -> None:
    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    z, codebook, logits = new(2, 5, 8).requires_grad_(), new(33, 8).requires_grad_(), new(2, 5, 33).requires_grad_()
    indices, seed = torch.randint(0, 33, (2, 5), device=DEVICE), torch.tensor(3, device=DEVICE)
    ids = torch.tensor([4, 9], device=DEVICE)
    for l2_norm in (True, False):
        torch.library.opcheck(torch.ops.vapi_fast.vq_lookup.default, (z, codebook, l2_norm))
        torch.library.opcheck(torch.ops.vapi_fast.codebook_lookup.default, (indices, codebook, l2_norm))
        arguments = (new(2, 5, 8), indices, codebook.detach(), l2_norm)
        torch.library.opcheck(torch.ops.vapi_fast.codebook_lookup_backward.default, arguments)
    torch.library.opcheck(torch.ops.vapi_fast.unit_backward.default, (new(2, 5, 8), z.detach()))
    straight_through = torch.ops.vapi_fast.straight_through_lookup.default
    torch.library.opcheck(straight_through, (logits, codebook, seed, ids, 0.7, True))
    torch.library.opcheck(straight_through, (logits.detach(), codebook.detach(), seed, None, 1.0, False))
    inputs = (logits.detach(), codebook.detach(), seed, None)
    statistics = straight_through(*inputs, 1.0, True)[2:]
    for needs in ((True, False), (False, True), (True, True)):
        arguments = (new(2, 5, 8), *inputs, *statistics, 1.0, *needs)
        torch.library.opcheck(torch.ops.vapi_fast.straight_through_lookup_backward.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_production_sizes(dtype: torch.dtype) -> None:
    assert_vq_accurate(channels_last(torch.randn(16, 24, 24, 8)), torch.randn(16384, 8), dtype)
    tokens = torch.randint(0, 16384, (16, 8, 576), device=DEVICE)
    assert_fused_accurate(lambda c: ops.codebook_lookup(tokens, c), [torch.randn(16384, 8)], dtype)
    codebook = F.normalize(torch.randn(16384, 8), dim=-1)
    assert_straight_through_accurate(3 * torch.randn(1, 577, 16384), codebook, dtype)
    for shape in ((2, 576, 16384), (1, 63, 65536)):
        assert_straight_through_accurate(torch.randn(shape), torch.randn(shape[-1], 8), dtype, seed=-9)
