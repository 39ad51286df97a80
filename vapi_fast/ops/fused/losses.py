"""The policy loss and cross-entropy of a head's logits on Triton: launches, registration with PyTorch, gradients.

The forward computes the gradients too, chunk by chunk, while the logits are there: three matrix products instead of
four, and the backward only multiplies by the incoming gradient. Until then gradients are those of the sum over the
rows: the mean's would vanish in fp16, before the loss scaling that the incoming gradient brings.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, nn

from vapi_fast.kernels import losses as kernels
from vapi_fast.reference import PolicyLoss

from .head import head_operands, logits_chunks, product
from .launch import check_dtypes, launch, next_power_of_2, settings
from .sampling import noisy_prefix

# Slots of a row, one a rollout and one for the target, are compared with one another.
MAX_GROUP = 127


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tokens: Tensor | None,
    advantages: Tensor | None,
    old_logprobs: Tensor | None,
    base_logprobs: Tensor | None,
    clip_range: float,
    prior_weight: float,
    kl_weight: float,
    temperature: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Terms of the loss at each row `[6, B·T]`, and the gradients of their sum to hidden and weight, or empty ones.

    The weight's gradient is fp32, hidden's in hidden's dtype. Without tokens: terms `[1, B·T]`, cross-entropy alone.
    """
    states, head = head_operands(hidden, weight)
    rows, vocab_size = states.shape[0], head.shape[0]
    group_size = 0 if tokens is None else tokens.shape[1]
    terms = torch.empty(1 if tokens is None else 6, rows, dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty(states.shape if needs_hidden else (0,), dtype=states.dtype, device=hidden.device)
    grad_weight = torch.empty(head.shape if needs_weight else (0,), dtype=torch.float32, device=hidden.device)
    targets = targets.contiguous()
    tokens, advantages, old_logprobs, base_logprobs = (
        None if side is None else side.contiguous() for side in (tokens, advantages, old_logprobs, base_logprobs)
    )

    block = dict(settings("head_loss", hidden))
    whole_row = vocab_size <= block["BLOCK_V"]  # in registers; otherwise in blocks, several times over
    block_v = next_power_of_2(vocab_size) if whole_row else block["BLOCK_V"] // 2
    block_g = next_power_of_2(group_size + 1)
    warps = max(block_v, block_g**2) // block.pop("ELEMENTS_PER_WARP")
    block |= {"BLOCK_V": block_v, "BLOCK_G": block_g, "num_warps": max(warps, 1)}
    for first, logits in logits_chunks(states, head):
        # The gradient of a row starts where the row's logits do: over half of them if it is of 16 bits.
        gradient = logits.view(states.dtype)
        launch(
            kernels.head_loss,
            (len(logits),),
            logits,
            gradient,
            targets,
            tokens,
            advantages,
            old_logprobs,
            base_logprobs,
            terms,
            first,
            rows,
            targets.shape[1],
            vocab_size,
            group_size,
            gradient.stride(0),
            clip_range,
            1 - clip_range,
            1 + clip_range,
            prior_weight,
            kl_weight,
            1 / temperature,
            TEMPERED=temperature != 1,
            GRADIENT=needs_hidden or needs_weight,
            WHOLE_ROW=whole_row,
            **block,
        )
        gradient = gradient[:, :vocab_size]
        chunk = slice(first, first + len(logits))
        if needs_hidden:
            product(gradient, head, grad_hidden[chunk])
        if needs_weight:
            product(gradient.t(), states[chunk], grad_weight, accumulate=first > 0)
    return terms, grad_hidden.view(hidden.shape) if needs_hidden else grad_hidden, grad_weight


def scale_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · scale (0-d fp32) in another dtype, rounded once."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    block = settings("scale_gradient", gradient)
    grid = (triton.cdiv(gradient.numel(), block["BLOCK"]),)
    launch(kernels.scale_gradient, grid, gradient.contiguous(), scale, out, gradient.numel(), **block)
    return out


def policy_loss_forward(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    base_logprobs: Tensor | None,
    clip_range: float,
    prior_weight: float,
    kl_weight: float,
    temperature: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss; policy, prior, KL, ratio and clip fraction; gradients of B·T times the loss to hidden and weight.

    advantages, old_logprobs and base_logprobs are fp32. `needs_…` must be true where a backward will want a gradient.
    """
    terms, grad_hidden, grad_weight = head_loss(
        hidden,
        weight,
        targets,
        tokens,
        advantages,
        old_logprobs,
        base_logprobs,
        clip_range,
        prior_weight,
        kl_weight,
        temperature,
        needs_hidden,
        needs_weight,
    )
    return terms[0].mean(), terms[1:].mean(1), grad_hidden, grad_weight


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy; gradients of B·T times it to hidden and weight where needed."""
    terms, grad_hidden, grad_weight = head_loss(
        hidden, weight, targets, None, None, None, None, 0.0, 1.0, 0.0, 1.0, needs_hidden, needs_weight
    )
    return terms[0].mean(), grad_hidden, grad_weight


policy_loss_op = torch.library.custom_op("vapi_fast::policy_loss", policy_loss_forward, mutates_args=())
linear_cross_entropy_op = torch.library.custom_op(
    "vapi_fast::linear_cross_entropy", linear_cross_entropy_forward, mutates_args=()
)
scale_gradient_op = torch.library.custom_op("vapi_fast::scale_gradient", scale_gradient, mutates_args=())


def empty_gradients(hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    grad_weight = weight.new_empty(weight.shape if needs_weight else (0,), dtype=torch.float32)
    return hidden.new_empty(hidden.shape if needs_hidden else (0,)), grad_weight


@policy_loss_op.register_fake
def _(hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, report = (hidden.new_empty(shape, dtype=torch.float32) for shape in ((), (5,)))
    return loss, report, *empty_gradients(hidden, weight, *options[-2:])


@linear_cross_entropy_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, *empty_gradients(hidden, weight, needs_hidden, needs_weight)


@scale_gradient_op.register_fake
def _(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight = inputs[:2]
    ctx.inputs, ctx.rows, ctx.weight_dtype = len(inputs), hidden.shape[0] * hidden.shape[1], weight.dtype
    ctx.save_for_backward(*output[-2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros the size of the weight for its gradient, which has none itself


def _loss_gradient(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight = ctx.saved_tensors
    scale = grad_loss / ctx.rows
    return (
        scale_gradient_op(grad_hidden, scale, grad_hidden.dtype) if ctx.needs_input_grad[0] else None,
        scale_gradient_op(grad_weight, scale, ctx.weight_dtype) if ctx.needs_input_grad[1] else None,
        *[None] * (ctx.inputs - 2),
    )


policy_loss_op.register_autograd(_loss_gradient, setup_context=_loss_context)
linear_cross_entropy_op.register_autograd(_loss_gradient, setup_context=_loss_context)


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    targets: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    base_logprobs: Tensor | None = None,
    clip_range: float = 0.2,
    prior_weight: float = 0.1,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
) -> PolicyLoss:
    """Objective of the whole group, with its gradients, from chunks of logits; see `vapi_fast.ops.policy_loss`."""
    check_dtypes("policy_loss", hidden=hidden, weight=weight)
    if tokens.shape[1] > MAX_GROUP:
        raise ValueError(
            f"policy_loss: tokens must have G <= {MAX_GROUP} on the 'triton' backend, got G={tokens.shape[1]}"
        )
    advantages, old_logprobs, base_logprobs = (
        None if side is None else side.detach().float() for side in (advantages, old_logprobs, base_logprobs)
    )
    loss, report, _, _ = policy_loss_op(
        hidden,
        weight,
        tokens,
        advantages,
        targets,
        old_logprobs,
        base_logprobs,
        clip_range,
        prior_weight,
        kl_weight,
        temperature,
        *gradients_needed(hidden, weight),
    )
    return PolicyLoss(loss, *report.unbind())


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, with its gradients, from chunks of logits; see `vapi_fast.ops.linear_cross_entropy`."""
    check_dtypes("linear_cross_entropy", hidden=hidden, weight=weight)
    return linear_cross_entropy_op(hidden, weight, targets, *gradients_needed(hidden, weight))[0]


def noisy_prefix_cross_entropy(
    model: nn.Module,
    tokens: Tensor,
    condition: Tensor,
    *,
    noise_prob: float,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the clean tokens after a corrupted prefix; see `vapi_fast.ops.noisy_prefix_cross_entropy`."""
    weight = model.output.weight
    prefix = noisy_prefix(tokens, noise_prob, weight.shape[0], seed=seed, sample_ids=sample_ids)
    return linear_cross_entropy(model(prefix, condition, return_hidden=True), weight, tokens)


def gradients_needed(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Whether a backward may ask for the gradient to hidden, and to weight."""
    recording = torch.is_grad_enabled()
    return recording and hidden.requires_grad, recording and weight.requires_grad
