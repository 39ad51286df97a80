"""How Triton kernels are tested: values and gradients against the reference in float64, on a GPU or interpreted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accuracy import RELATIVE_L2, relative_l2
from torch import Tensor

from vapi_fast import ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = (torch.float32, torch.bfloat16)


def assert_fused_accurate(
    operation: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype, *, gradients: bool = True
) -> Tensor:
    """Value and gradients on Triton, of inputs rounded to `dtype`, must be near the reference's in float64.

    operation: of the inputs, in their order, to one floating tensor; calls `vapi_fast.ops`. The inputs keep their
    strides and storage offsets. Returns the value on Triton.
    """
    low = [cast(x.detach(), dtype).requires_grad_(gradients) for x in inputs]
    exact = [x.detach().double().requires_grad_(gradients) for x in low]
    with ops.use_backend("reference"):
        expected = operation(*exact)
    with ops.use_backend("triton"):
        actual = operation(*low)
    assert expected.dtype == torch.float64
    assert actual.shape == expected.shape
    assert actual.device == low[0].device
    assert relative_l2(actual.detach(), expected.detach()) < RELATIVE_L2[dtype]
    if gradients:
        direction = torch.randn(expected.shape, device=expected.device).to(actual.dtype)
        expected_gradients = torch.autograd.grad(expected, exact, direction.double())
        with ops.use_backend("triton"):
            found = torch.autograd.grad(actual, low, direction)
        for x, gradient, expected_gradient in zip(low, found, expected_gradients, strict=True):
            assert gradient.dtype == x.dtype
            assert gradient.shape == x.shape
            assert relative_l2(gradient, expected_gradient) < RELATIVE_L2[dtype]
    return actual.detach()


def assert_eight_bits(found: Tensor, exact: Tensor, scale: float) -> None:
    """`found`, float8_e4m3fn in units of `scale`, is the nearest to `exact`, but for what fp32 or the sum was off."""
    nearest = (exact.abs() / 16).clamp_min(scale * 2**-10) * 1.01 + 1e-3 * scale  # half a unit in the last place
    inside = exact.clamp(-448 * scale, 448 * scale)
    assert found.dtype == torch.float8_e4m3fn
    assert ((found.double() * scale - inside).abs() <= nearest).all()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of `x` in another dtype and on the tests' device, with the strides and the storage offset of `x`."""
    storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=dtype, device=DEVICE)
    copy = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    return copy.copy_(x)


def misaligned(x: Tensor) -> Tensor:
    """The same values, one element past a 16-byte boundary."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def strided(x: Tensor) -> Tensor:
    """The same values with gaps between the elements of the last dimension."""
    return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
