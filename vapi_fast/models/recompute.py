"""Parts of a transformer block that keep their inputs for the backward and compute what lies between again.

A plain RMSNorm → linear keeps the norm's input for the norm and its output for the linear; SwiGLU → linear likewise.
Here the output is recomputed: one more pass over memory instead of 2·D bytes a token for each norm and 2·hidden for
SwiGLU in bf16, for LlamaGen-XXL 14 KB a token and layer beside the 34 KB that are kept.

Everything is computed in the dtype of the activations: parameters of another dtype (fp32 master weights) are cast to
it once a forward, as by autocast, and their gradients are cast back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vapi_fast import ops
from vapi_fast.ops.backends import backend_name
from vapi_fast.reference.precision import full_precision


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
    """RMSNorm(x) times each of `weights`; keeps x, not its norm.

    x floating `[..., D]`, norm_weight `[D]`, weights `[N_i, D]` → each `[..., N_i]` in x's dtype, gradients to all.
    """
    operation = functools.partial(ops.rms_norm, eps=eps)
    return RecomputedLinear.apply(operation, 2, x, norm_weight.to(x.dtype), *(weight.to(x.dtype) for weight in weights))


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """SiLU(gate) · up times `weight`; keeps gate and up, not their product.

    gate and up floating `[..., hidden]`, weight `[D, hidden]` → `[..., D]` in gate's dtype, gradients to all.
    """
    return RecomputedLinear.apply(ops.swiglu, 2, gate, up, weight.to(gate.dtype))[0]


def rotated_heads(qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of a fused projection with `ops.rotary_2d` applied, and its values; keeps none of its memory.

    qkv floating `[B, T, 3, heads, head_dim]`, table `[T, head_dim / 2, 2]` → three `[B, T, heads, head_dim]`, with a
    gradient to qkv.
    """
    return RotatedHeads.apply(qkv, table)


class RecomputedLinear(torch.autograd.Function):
    """operation(*inputs) times each of `weights`; keeps the inputs, not what the operation makes of them."""

    @staticmethod
    def forward(ctx: Any, operation: Callable[..., Tensor], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, weights = tensors[:count], tensors[count:]
        ctx.save_for_backward(*tensors)
        ctx.operation, ctx.count, ctx.backend = operation, count, backend_name(inputs[0])
        with full_precision(inputs[0]):
            product = operation(*inputs)
            return tuple(F.linear(product, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weights = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        with full_precision(inputs[0]):
            # The forward's backend: a CUDA backward runs in a thread where no `use_backend` is in force.
            with torch.enable_grad(), ops.use_backend(ctx.backend):
                product = ctx.operation(*leaves)
            needed = zip(gradients, ctx.needs_input_grad[2 + ctx.count :], strict=True)
            dweights = [weight_gradient(gradient, product) if needs else None for gradient, needs in needed]
            dinputs = torch.autograd.grad(product, leaves, input_gradient(gradients, weights))
        return None, None, *dinputs, *dweights


class RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(table)
        ctx.backend = backend_name(qkv)
        heads = qkv.shape[3]
        q, k = ops.rotary_2d(qkv[:, :, :2].flatten(2, 3), table).unflatten(2, (2, heads)).unbind(2)
        return q, k, qkv[:, :, 2].clone()  # a view would keep the projection's queries and keys in memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        back = table.clone()  # a rotation's transpose turns by the opposite angle
        back[..., 1].neg_()
        batch, length, heads, head_dim = dv.shape
        dqkv = dv.new_empty(batch, length, 3, heads, head_dim)
        with ops.use_backend(ctx.backend):
            dqkv[:, :, 0] = ops.rotary_2d(dq, back)
            dqkv[:, :, 1] = ops.rotary_2d(dk, back)
        dqkv[:, :, 2] = dv
        return dqkv, None


def weight_gradient(gradient: Tensor, inputs: Tensor) -> Tensor:
    """Of a bias-free linear: gradientᵀ · inputs over all rows."""
    return gradient.flatten(0, -2).T @ inputs.detach().flatten(0, -2)


def input_gradient(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Of bias-free linears with one input: Σ gradient · weight."""
    first, *others = gradients
    total = first.flatten(0, -2) @ weights[0]
    for gradient, weight in zip(others, weights[1:], strict=True):
        total.addmm_(gradient.flatten(0, -2), weight)
    return total.unflatten(0, first.shape[:-1])
