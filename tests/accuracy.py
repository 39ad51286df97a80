"""The accuracy contract of every operation: values and gradients against the same computation in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RELATIVE_L2 = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """|actual − expected| / |expected|; NaN where anything is NaN, so that no comparison with it holds."""
    return float((actual.double() - expected).norm() / expected.norm())


def assert_accurate(operation: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Operation and gradients on inputs rounded to `dtype` must be near those on the same numbers in float64."""
    low = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in low]
    expected, actual = operation(*exact), operation(*low)
    direction = torch.randn(expected.shape).to(actual.dtype)
    expected_gradients = torch.autograd.grad(expected, exact, direction.double())
    gradients = torch.autograd.grad(actual, low, direction)
    assert expected.dtype == torch.float64
    assert relative_l2(actual.detach(), expected.detach()) < RELATIVE_L2[dtype]
    for x, gradient, expected_gradient in zip(low, gradients, expected_gradients, strict=True):
        assert gradient.dtype == x.dtype
        assert relative_l2(gradient, expected_gradient) < RELATIVE_L2[dtype]
