"""The sum of a convolution's result, its bias and a residual: against its formula, and Triton against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import RELATIVE_L2, relative_l2
from fused import DEVICE, assert_fused_accurate, misaligned
from torch import Tensor

from vapi_fast import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def maps(*shape: int) -> Tensor:
    return (3 + 2 * torch.randn(shape)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_bias_add_is_its_formula(pad: int) -> None:
    h, residual = torch.randn(2, 2, 6, 5, 7, dtype=torch.float64)
    channel_bias = torch.randn(6, dtype=torch.float64)
    for given in (None, residual):
        total = ops.bias_add(h, channel_bias, given, pad=pad)
        assert total.shape == (2, 6, 5 + pad, 7 + pad)
        assert total.is_contiguous(memory_format=torch.channels_last)
        for c in range(6):
            expected = h[:, c] + channel_bias[c] + (0 if given is None else residual[:, c])
            torch.testing.assert_close(total[:, c, :5, :7], expected)
        assert not total[:, :, 5:].any()
        assert not total[..., 7:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    h, residual = (maps(2, 8, 5, 6).to(dtype) for _ in range(2))
    channel_bias = torch.randn(8)
    found = ops.bias_add(h, channel_bias, residual, pad=1)
    assert found.dtype == dtype
    assert torch.equal(found[..., :5, :6], (h.float() + channel_bias[:, None, None] + residual.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("shape", [(2, 24, 9, 11), (1, 6, 5, 7), (3, 5, 1, 3), (1, 512, 2, 33)])
def test_bias_add(shape: tuple[int, int, int, int], pad: int, dtype: torch.dtype) -> None:
    inputs = [maps(*shape), torch.randn(shape[1]), maps(*shape) - 6]
    for given in (inputs, inputs[:2]):
        out = assert_fused_accurate(lambda *t: ops.bias_add(*t, pad=pad), given, dtype, gradients=False)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "change",
    [misaligned, Tensor.contiguous, lambda x: x.transpose(2, 3), lambda x: x.repeat(1, 1, 2, 2)[..., ::2, ::2]],
)
def test_any_strides(change: Callable[[Tensor], Tensor]) -> None:
    inputs = [change(maps(2, 16, 5, 5)), torch.randn(32)[::2], change(maps(2, 16, 5, 5))]
    assert_fused_accurate(lambda *t: ops.bias_add(*t, pad=1), inputs, torch.float32, gradients=False)


def test_other_dtypes_of_bias_and_residual(backend: str) -> None:
    h, residual = maps(2, 8, 5, 6).to(DEVICE, torch.bfloat16), maps(2, 8, 5, 6).to(DEVICE)
    channel_bias = torch.randn(8, device=DEVICE)
    found = ops.bias_add(h, channel_bias, residual)
    assert found.dtype == torch.bfloat16
    expected = h.double() + channel_bias.double()[:, None, None] + residual.double()
    assert relative_l2(found, expected) < RELATIVE_L2[torch.bfloat16]


def test_inputs_keep_their_values_and_a_batch_may_be_empty(backend: str) -> None:
    h, channel_bias = maps(2, 8, 5, 6).to(DEVICE), torch.randn(8, device=DEVICE)
    before = h.clone()
    ops.bias_add(h, channel_bias, h)
    assert torch.equal(h, before)
    assert ops.bias_add(h[:0], channel_bias, pad=1).shape == (0, 8, 6, 7)


def test_no_gradient_is_refused_or_not_wanted() -> None:
    h, one = torch.randn(1, 4, 3, 3), torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"bias_add: has no gradient, and channel_bias requires one: .* add them"):
        ops.bias_add(h, one)
    with torch.no_grad():
        assert not ops.bias_add(h, one).requires_grad


def test_bad_arguments() -> None:
    h, bias = torch.zeros(2, 6, 4, 4), torch.zeros(6)
    with pytest.raises(ValueError, match=r"bias_add: channel_bias must be floating \[C\] with C=6, got float32 \[5\]"):
        ops.bias_add(h, bias[:5])
    with pytest.raises(ValueError, match=r"bias_add: residual must be floating \[B, C, H, W\] .*, got float32"):
        ops.bias_add(h, bias, h[..., 1:])
    with pytest.raises(ValueError, match="bias_add: pad must be an int >= 0, got -1"):
        ops.bias_add(h, bias, pad=-1)
