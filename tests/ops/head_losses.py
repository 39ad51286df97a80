"""Inputs of the losses from a head, and how they are held to float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accuracy import RELATIVE_L2
from fused import DEVICE, assert_fused_accurate
from torch import Tensor
from torch.nn.functional import linear

from vapi_fast import ops

PRODUCTION = {"batch": 16, "group": 8, "length": 576, "vocab": 16384, "width": 1536}


def policy_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> ops.PolicyLoss:
    return ops.policy_loss(hidden, weight, bias=bias, **options)


def policy_inputs(
    batch: int = 2,
    group: int = 3,
    length: int = 5,
    vocab: int = 37,
    width: int = 24,
    *,
    biased: bool = False,
    by_token: bool = False,
) -> tuple[list[Tensor], dict[str, Any]]:
    """hidden, weight and perhaps a bias; the other tensors. Tokens repeat in a row: in the group, and as its target.

    by_token: advantages are `[B, G, T]`, else `[B, G]`.
    """
    inputs = [torch.randn(batch, length, width), torch.randn(vocab, width) / width**0.5]
    tokens = torch.randint(0, vocab, (batch, group, length))
    tokens[:, -1, ::2] = tokens[:, 0, ::2]
    targets = torch.randint(0, vocab, (batch, length))
    targets[:, ::3] = tokens[:, 0, ::3]
    options = {
        "tokens": tokens,
        "advantages": torch.randn(batch, group, *[length][: int(by_token)]),
        "targets": targets,
    }
    if biased:
        inputs.append(torch.randn(vocab))
    return inputs, {name: x.to(DEVICE) for name, x in options.items()}


def anchors(
    inputs: list[Tensor], tokens: Tensor, *, spread: float = 0.3, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Log-probs of an older policy, at ratios away from all clip bounds here, and of a base policy `spread` away."""
    logprobs = (linear(*(x.double().to(DEVICE) for x in inputs)) / temperature).log_softmax(-1)
    own = logprobs.gather(-1, tokens.transpose(1, 2)).transpose(1, 2)
    ratios = own.new_tensor([0.5, 0.85, 0.95, 1.05, 1.15, 1.5])[torch.randint_like(tokens, 6)]
    return {"old_logprobs": own - ratios.log(), "base_logprobs": own + spread * torch.randn_like(own)}


def assert_policy_loss_accurate(
    inputs: list[Tensor], options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> ops.PolicyLoss:
    """Loss and gradients near the reference's in float64, and every term of the report too."""
    found: list[ops.PolicyLoss] = []

    def loss(*head: Tensor) -> Tensor:
        found.append(policy_loss(*head, **options))
        return found[-1].loss

    assert_fused_accurate(loss, inputs, dtype)
    expected, terms = (torch.stack(each).detach() for each in found)
    tolerance = RELATIVE_L2[dtype]
    torch.testing.assert_close(terms, expected.float(), rtol=tolerance, atol=tolerance / 10)
    assert [term.requires_grad for term in found[-1]] == [True] + 5 * [False]
    return ops.PolicyLoss(*terms)


def gradients(backend: str, loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in inputs]
    with ops.use_backend(backend):
        return [*torch.autograd.grad(loss(*leaves), leaves)]
