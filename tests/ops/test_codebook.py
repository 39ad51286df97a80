"""The codebook: nearest codes by brute force, gradients by their formulas, Triton against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from accuracy import RELATIVE_L2, assert_accurate, relative_l2
from fused import DEVICE, DTYPES, assert_fused_accurate, cast, misaligned, strided
from torch import Tensor
from torch.nn import functional as F

from vapi_fast import ops
from vapi_fast.kernels import codebook as kernels
from vapi_fast.reference import codebook as reference

# ---- the formulas


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


def test_vq_lookup_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = torch.randn(100, 8), torch.randn(33, 8)
    whole = ops.vq_lookup(z, codebook)[1]
    monkeypatch.setattr(reference, "DISTANCES_AT_ONCE", 33 * 7)
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


# ---- on Triton, against float64


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


@pytest.mark.parametrize(
    ("rows", "vocab", "width"), [(9, 131, 8), (9, 4200, 8), (9, 2100, 20), (1, 2047, 256), (3, 512, 8), (129, 515, 8)]
)
def test_ties_go_to_the_lowest_index(backend: str, rows: int, vocab: int, width: int) -> None:
    codebook = torch.randn(vocab, width, device=DEVICE)
    codebook[-1] = codebook[vocab // 2] = codebook[7]
    z = codebook[7] + 1e-3 * torch.randn(rows, width, device=DEVICE)
    for l2_norm in (False, True):
        assert ops.vq_lookup(z, codebook, l2_norm=l2_norm)[1].tolist() == [7] * rows
        assert ops.vq_lookup(z, torch.ones_like(codebook), l2_norm=l2_norm)[1].tolist() == [0] * rows


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


def test_empty_batches(backend: str) -> None:
    codebook = torch.randn(9, 8, device=DEVICE, requires_grad=True)
    z = torch.empty(0, 3, 8, device=DEVICE, requires_grad=True)
    z_q, indices = ops.vq_lookup(z, codebook)
    assert (z_q.shape, indices.shape) == ((0, 3, 8), (0, 3))
    assert torch.autograd.grad(z_q.sum(), z)[0].shape == z.shape
    entries = ops.codebook_lookup(indices, codebook)
    assert torch.autograd.grad(entries.sum(), codebook)[0].tolist() == [[0.0] * 8] * 9


def test_float64_is_refused() -> None:
    wide = torch.randn(3, 8, device=DEVICE).double()
    with ops.use_backend("triton"):
        with pytest.raises(TypeError, match="vq_lookup: z must be float32, bfloat16 or"):
            ops.vq_lookup(wide, wide)
        with pytest.raises(TypeError, match="codebook_lookup: codebook must be float32, bfloat16 or"):
            ops.codebook_lookup(torch.zeros(2, device=DEVICE).long(), wide)


def test_opcheck() -> None:
    z, codebook = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((2, 5, 8), (33, 8)))
    indices, gradient = torch.randint(0, 33, (2, 5), device=DEVICE), torch.randn(2, 5, 8, device=DEVICE)
    for l2_norm in (True, False):
        torch.library.opcheck(torch.ops.vapi_fast.vq_lookup.default, (z, codebook, l2_norm))
        torch.library.opcheck(torch.ops.vapi_fast.codebook_lookup.default, (indices, codebook, l2_norm))
        arguments = (gradient, indices, codebook.detach(), l2_norm)
        torch.library.opcheck(torch.ops.vapi_fast.codebook_lookup_backward.default, arguments)
    torch.library.opcheck(torch.ops.vapi_fast.unit_backward.default, (gradient, z.detach()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_production_sizes(dtype: torch.dtype) -> None:
    assert_vq_accurate(channels_last(torch.randn(16, 24, 24, 8)), torch.randn(16384, 8), dtype)
    tokens = torch.randint(0, 16384, (16, 8, 576), device=DEVICE)
    assert_fused_accurate(lambda c: ops.codebook_lookup(tokens, c), [torch.randn(16384, 8)], dtype)
