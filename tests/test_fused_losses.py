"""The policy loss and cross-entropy on Triton against the reference in float64: terms, gradients, chunks, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from accuracy import RELATIVE_L2, relative_l2
from fused import DEVICE, DTYPES, assert_fused_accurate, cast, misaligned, strided
from torch import Tensor

from vapi_fast import ops
from vapi_fast.ops.fused import head, losses


def policy_inputs(
    batch: int = 2, group: int = 3, length: int = 5, vocab: int = 37, width: int = 24
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """hidden and weight, and the other tensors. Tokens repeat within a row, in the group and as its target."""
    inputs = [torch.randn(batch, length, width), torch.randn(vocab, width) / width**0.5]
    tokens = torch.randint(0, vocab, (batch, group, length))
    tokens[:, -1, ::2] = tokens[:, 0, ::2]
    targets = torch.randint(0, vocab, (batch, length))
    targets[:, ::3] = tokens[:, 0, ::3]
    options = {"tokens": tokens, "advantages": torch.randn(batch, group), "targets": targets}
    return inputs, {name: x.to(DEVICE) for name, x in options.items()}


def anchors(inputs: list[Tensor], tokens: Tensor, temperature: float, spread: float) -> dict[str, Tensor]:
    """Log-probs of an older and of a base policy, about `spread` from this one's."""
    hidden, weight = (x.double().to(DEVICE) for x in inputs)
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    own = logprobs.gather(-1, tokens.transpose(1, 2)).transpose(1, 2)
    noise = torch.randn(2, *own.shape, device=DEVICE)
    return {"old_logprobs": own + spread * noise[0], "base_logprobs": own + spread * noise[1]}


def assert_policy_loss_accurate(
    inputs: list[Tensor], options: dict[str, object], dtype: torch.dtype = torch.float32
) -> ops.PolicyLoss:
    """Loss and gradients as any operation's; the terms near those of the reference."""
    assert_fused_accurate(lambda *t: ops.policy_loss(*t, **options).loss, inputs, dtype)
    low = [cast(x, dtype) for x in inputs]
    with ops.use_backend("reference"):
        expected = ops.policy_loss(*(x.double() for x in low), **options)
    with ops.use_backend("triton"):
        terms = ops.policy_loss(*low, **options)
    tolerance = {"rtol": RELATIVE_L2[dtype], "atol": RELATIVE_L2[dtype] / 10}
    torch.testing.assert_close(terms, ops.PolicyLoss(*(x.float() for x in expected)), **tolerance)
    return terms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"group": 1},
        {"group": 16, "width": 100},
        {"batch": 1, "length": 1, "vocab": 1},
        {"batch": 1, "length": 63, "width": 7},
        {"length": 65, "vocab": 128},
        {"batch": 1, "length": 3, "vocab": 1000},
        {"batch": 1, "length": 2, "vocab": 16384, "width": 8},
        {"batch": 1, "length": 2, "vocab": 20001, "width": 8},
    ],
)
def test_policy_loss(sizes: dict[str, int], dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and sizes.get("vocab") == 1:
        pytest.skip("a softmax of one class has no gradient, and its rounding error no scale")
    inputs, options = policy_inputs(**sizes)
    assert_policy_loss_accurate(inputs, options, dtype)
    assert_policy_loss_accurate(inputs, options | anchors(inputs, options["tokens"], 1.0, 0.05), dtype)
