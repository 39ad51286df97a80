"""Parts of a transformer block with gradients of their own, which compute again what is cheap and keep the rest.

A plain RMSNorm → linear keeps the norm's input for the norm and its output for the linear; SwiGLU → linear likewise.
Here the kernel of the norm's or of SwiGLU's gradient writes the output once more: one pass over memory instead of 2·D
bytes a token for each norm and 2·hidden for SwiGLU in bf16, for LlamaGen-XXL 14 KB a token and layer beside the 34 KB
that are kept. The residual stream is a pair, a state and the branch that is still to be added to it: the sum is taken
where it is normed, and its gradient where the norm's is computed.

Forward and backward call the launches of `implementation` themselves, without operators and graphs inside of graphs,
so that the host keeps ahead of the device.

Everything is computed in the dtype of the activations: matrices of another dtype (fp32 master weights) are cast to it
once a forward, as by autocast, and their gradients cast back; inside of `cast_once` they are cast once for all
forwards, and their gradients added up in fp32 by the products that make them. Norms take their weights as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vapi_fast.ops.backends import implementation
from vapi_fast.reference.precision import full_precision, product


class Draw(NamedTuple):
    """One of a model's dropouts, as `ops.dropout` takes it."""

    p: float
    site: int
    seed: Tensor
    sample_ids: Tensor | None


def add_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(x + branch) · weight; keeps the sum.

    x and branch floating `[..., D]`, weight `[D]` → `[..., D]` in x's dtype, gradients to all.
    """
    return AddedNorm.apply(x, branch, weight, eps)


def norm_heads(
    x: Tensor, branch: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, heads: int, table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum x + branch, and queries, keys and values of its norm, the former two with `ops.rotary_2d` applied.

    x and branch floating `[B, T, D]`, norm_weight `[D]`, weight `[3·D, D]`, table `[T, head_dim / 2, 2]` → the sum
    `[B, T, D]` and three `[B, T, heads, head_dim]`, side by side in one memory, in x's dtype; gradients to all but the
    table. Keeps the sum.
    """
    return NormedHeads.apply(x, branch, norm_weight, eps, weight, heads, table)


def norm_swiglu(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    gate_weight: Tensor,
    up_weight: Tensor,
    weight: Tensor,
    draw: Draw | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum x + branch, and SwiGLU of its norm with dropout: (SiLU(n·W_gateᵀ) · n·W_upᵀ) · Wᵀ, n the norm.

    x and branch floating `[B, T, D]`, norm_weight `[D]`, gate_weight and up_weight `[hidden, D]`, weight `[D, hidden]`
    → two `[B, T, D]` in x's dtype, gradients to all. Keeps the sum, gate and up.
    """
    return NormedSwiglu.apply(x, branch, norm_weight, eps, gate_weight, up_weight, weight, draw)


def linear(x: Tensor, weight: Tensor, draw: Draw | None = None) -> Tensor:
    """x `[..., D]` times weight `[N, D]`, with dropout → `[..., N]` in x's dtype."""
    return Linear.apply(x, weight, draw)


class AddedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        ctx.kernels, ctx.eps, ctx.branches = implementation(x), eps, branch is not None
        total, normed = ctx.kernels.add_norm(x, branch, weight, eps)
        ctx.save_for_backward(total, weight)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, _ = norm_gradients(ctx, dnormed, *ctx.saved_tensors, None)
        return dx, dx if ctx.branches else None, dweight, None


class NormedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
        heads: int,
        table: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.kernels, ctx.eps, ctx.branches = implementation(x), eps, branch is not None
        (cast,) = keep_weights(ctx, x.dtype, weight)
        total, normed = ctx.kernels.add_norm(x, branch, norm_weight, eps)
        with full_precision(x):
            qkv = F.linear(normed, cast).unflatten(-1, (3, heads, -1))
        ctx.kernels.rotate_heads(qkv, table)
        ctx.save_for_backward(total, norm_weight, table, cast)
        return total, *qkv.unbind(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        total, norm_weight, table, weight = ctx.saved_tensors
        with full_precision(total):
            dqkv = ctx.kernels.rotate_heads_backward(dq, dk, dv, table).flatten(2)
            dx, dnorm, normed = norm_gradients(ctx, torch.matmul(dqkv, weight), total, norm_weight, dtotal)
            dweight = weight_gradient(ctx, 0, dqkv, normed)
        return dx, dx if ctx.branches else None, dnorm, None, dweight, None, None


class NormedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        gate_weight: Tensor,
        up_weight: Tensor,
        weight: Tensor,
        draw: Draw | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels, ctx.eps, ctx.branches, ctx.draw = implementation(x), eps, branch is not None, draw
        to_gate, to_up, down = keep_weights(ctx, x.dtype, gate_weight, up_weight, weight)
        total, normed = ctx.kernels.add_norm(x, branch, norm_weight, eps)
        with full_precision(x):
            gate, up = F.linear(normed, to_gate), F.linear(normed, to_up)
            fed = F.linear(ctx.kernels.swiglu_forward(gate, up), down)
        ctx.save_for_backward(total, norm_weight, gate, up, to_gate, to_up, down)
        return total, fed if draw is None else ctx.kernels.dropout_forward(fed, *draw)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dfed: Tensor) -> tuple[Tensor | None, ...]:
        total, norm_weight, gate, up, to_gate, to_up, down = ctx.saved_tensors
        if ctx.draw is not None:
            dfed = ctx.kernels.dropout_forward(dfed, *ctx.draw)
        with full_precision(total):
            dgate, dup, fed = ctx.kernels.swiglu_backward(torch.matmul(dfed, down), gate, up)
            ddown = weight_gradient(ctx, 2, dfed, fed)
            del fed
            dnormed = torch.matmul(dgate, to_gate)
            dnormed.flatten(0, -2).addmm_(dup.flatten(0, -2), to_up)
            dx, dnorm, normed = norm_gradients(ctx, dnormed, total, norm_weight, dtotal)
            dgates = weight_gradient(ctx, 0, dgate, normed), weight_gradient(ctx, 1, dup, normed)
        return dx, dx if ctx.branches else None, dnorm, None, *dgates, ddown, None


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, draw: Draw | None) -> Tensor:
        ctx.kernels, ctx.draw = implementation(x), draw
        (cast,) = keep_weights(ctx, x.dtype, weight)
        ctx.save_for_backward(x, cast)
        with full_precision(x):
            y = F.linear(x, cast)
        return y if draw is None else ctx.kernels.dropout_forward(y, *draw)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.draw is not None:
            dy = ctx.kernels.dropout_forward(dy, *ctx.draw)
        with full_precision(x):
            return torch.matmul(dy, weight), weight_gradient(ctx, 0, dy, x), None


# ---- master weights

# Only inside of `cast_once`: copies of master weights, and of the gradients of norms' weights the shares so far; by the
# weights' ids.
_copies: dict[int, Tensor] = {}
_shares: dict[int, Tensor] = {}


@contextmanager
def cast_once(
    blocks: nn.Module, dtype: torch.dtype, *more: Tensor, kept: dict[int, Tensor] | None = None
) -> Iterator[None]:
    """Inside the `with` block all matrices of `blocks` are taken in `dtype`, as they are now: nobody may change them.

    more: other weights, matrices that are taken so by `taken`, and norms'. kept: what an earlier call made, by the ids
    of matrices and blocks: it is written again, where a recorded graph has it. What is missing there is added.

    Gradients to those that are trained are added to `.grad`, in their own dtype, by the backward itself, whichever way
    it is called: `torch.autograd.grad` does not give them. Those of norms' weights are added up in shares, and to
    `.grad` at the end of the `with` block. Not for sharded weights; parametrised ones are cast as ever.
    """
    more = [weight for weight in more if isinstance(weight, nn.Parameter)]
    matrices = [module.weight for module in blocks.modules() if type(module) is nn.Linear]
    matrices += [weight for weight in more if weight.ndim == 2]
    norms = [weight for name, weight in blocks.named_parameters() if "norm" in name]
    norms = [weight for weight in (*norms, *more) if weight.ndim == 1 and weight.requires_grad]
    kept = {} if kept is None else kept
    with torch.no_grad():
        if norms and id(blocks) not in kept:
            shape = len(norms), implementation(norms[0]).norm_shares(norms[0].device), len(norms[0])
            kept[id(blocks)] = norms[0].new_empty(shape, dtype=torch.float32)
        shares = kept[id(blocks)].zero_() if norms else ()
        kept |= {id(each): torch.empty_like(each, dtype=dtype) for each in matrices if id(each) not in kept}
        copies = [kept[id(matrix)] for matrix in matrices]
        if matrices:
            torch._foreach_copy_(copies, matrices)
    _shares.update(zip(map(id, norms), shares, strict=True))
    _copies.update(zip(map(id, matrices), copies, strict=True))
    del copies, kept
    try:
        yield
        if norms:
            add_gradients(norms, shares.sum(1))
    finally:
        _copies.clear()
        _shares.clear()


@torch.no_grad()
def add_gradients(weights: list[Tensor], gradients: Tensor) -> None:
    """To what there is of each weight's, a row each."""
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.to(weight.dtype) if weight.grad is None else weight.grad.add_(gradient)


def norm_gradients(
    ctx: Any, dnormed: Tensor, total: Tensor, weight: Tensor, dtotal: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of `add_norm`, to the sum and, where it has no shares, to the weight; and the norm again."""
    shares = _shares.get(id(weight))
    dx, dweight, normed = ctx.kernels.add_norm_backward(dnormed, total, weight, ctx.eps, dtotal, shares)
    return dx, None if dweight is None else dweight.to(weight.dtype), normed


def taken(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in `dtype`, for operations of autograd; inside of `cast_once` the copy that it has."""
    copy = _copies.get(id(weight))
    return weight.to(dtype) if copy is None or copy.dtype != dtype else Copied.apply(weight, copy)


class Copied(torch.autograd.Function):
    """The copy in place of its weight; the gradient is added to the weight's own, in its dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.weight = weight
        return copy.view_as(copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        total = ctx.weight.grad
        ctx.weight.grad = gradient.to(ctx.weight.dtype, copy=True) if total is None else total.add_(gradient)
        return None, None


class Master(NamedTuple):
    """A weight whose gradient is wanted: what adds up its gradient, and its dtype."""

    parameter: Tensor | None  # None: autograd
    dtype: torch.dtype


def keep_weights(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> list[Tensor]:
    """The weights in `dtype`, for the products; on ctx what `weight_gradient` needs to know of each."""
    found, ctx.masters = [], []
    for weight in weights:
        copy = _copies.get(id(weight))
        known = copy is not None and copy.dtype == dtype
        found.append(copy if known else weight.to(dtype))
        ctx.masters.append(Master(weight if known else None, weight.dtype) if weight.requires_grad else None)
    return found


def weight_gradient(ctx: Any, index: int, gradient: Tensor, inputs: Tensor) -> Tensor | None:
    """Of a bias-free linear: gradientᵀ · inputs over all rows, for autograd, or added to what there is of it."""
    if (master := ctx.masters[index]) is None:
        return None
    a, b = gradient.flatten(0, -2).T, inputs.flatten(0, -2)
    if a.dtype == master.dtype:
        return a @ b
    total = None if master.parameter is None else master.parameter.grad
    accumulate = total is not None
    if total is None:
        total = a.new_empty(len(a), b.shape[1], dtype=master.dtype)
    product(a, b, total, accumulate=accumulate)
    if master.parameter is None:
        return total
    master.parameter.grad = total
    return None
