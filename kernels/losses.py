"""The policy loss and cross-entropy of a head's logits: objective, and gradient of the logits, in one pass over a row.

n rows (B·T) of V logits, which cuBLAS has written in fp32; their gradient goes over them, in hidden's dtype.

| kernel         | bytes moved                                                | FLOPs per element  |
|----------------|------------------------------------------------------------|--------------------|
| head_loss      | n·V·(4 + 2), in fp32 4 + 4, without a gradient 4           | 6 + 1 exponential  |
| scale_gradient | each gradient read (hidden's dtype, fp32) and written once | 1                  |

Both are bound by memory bandwidth; the whole operation is bound by its three matrix products, those of `head`. Of
its rollouts a row reads up to 20·G bytes more: tokens, log-probs, and advantages of its own or of all the image's rows.
Predicted for an H100 of 798 TFLOP/s and 3.0 TB/s, bf16, n = 9216, V = 16384, D = 1536: products 1.74 ms, and 0.3 for
their tails and for writing fp32 logits; head_loss 0.30 (0.9 GB); four chunks' ∇weight read and written, 0.2 (0.7 GB);
scale_gradient 0.09 (0.26 GB): 2.65 ms. Memory: logits 151 MB, ∇weight 101 MB, ∇hidden 28 MB, the bf16 copy of an fp32
weight 50 MB. A bias takes two launches a chunk more where its gradient is needed (the sum of the logits' gradients,
n·V·2 bytes read, added up), and one in the backward.

The forward computes the gradients too, chunk by chunk, while the logits are there: three matrix products instead of
four, and the backward only multiplies by the incoming gradient. Until then gradients are those of the sum over the
rows: the mean's would vanish in fp16, before the loss scaling that the incoming gradient brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vapi_fast.reference import PolicyLoss

from .head import head_operands, load_logits, logits_chunks, product
from .launch import check_dtypes, contiguous, launch, next_power_of_2

HEAD_LOSS = {"BLOCK_V": 16384, "ELEMENTS_PER_WARP": 1024, "num_stages": 1}
SCALE_GRADIENT = {"BLOCK": 4096, "num_warps": 8, "num_stages": 1}
# Slots of a row, one a rollout and one for the target, are compared with one another.
MAX_GROUP = 127


@triton.jit
def softmax_gradient(x, shift, scale, tempered_scale, inverse_temperature, TEMPERED: tl.constexpr):
    """scale · e^(x − shift) + tempered_scale · e^((x − shift) / temperature)."""
    gradient = scale * tl.exp(x - shift)
    if TEMPERED:
        gradient += tempered_scale * tl.exp((x - shift) * inverse_temperature)
    return gradient


@triton.jit
def store_gradient(row_ptr, start, V, gradient, BLOCK_V: tl.constexpr):
    """Store over logits of the row which other threads of the program may just have read."""
    column = start + tl.arange(0, BLOCK_V)
    tl.debug_barrier()
    tl.store(row_ptr + column, gradient.to(row_ptr.dtype.element_ty), mask=column < V)


@triton.jit
def exponential_remainder(d):
    """e^d − 1 − d, from its series where the difference would cancel."""
    series = 1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7 * (1 + d / 8 * (1 + d / 9))))))
    return tl.where(tl.abs(d) < 0.5, d * d / 2 * series, tl.exp(d) - 1 - d)


@triton.jit(do_not_specialize=["first_row", "rows", "T", "G", "A"])
def head_loss_kernel(
    logits_ptr,
    bias_ptr,
    gradient_ptr,
    targets_ptr,
    tokens_ptr,
    advantages_ptr,
    old_ptr,
    base_ptr,
    terms_ptr,
    first_row,
    rows,
    T,
    V,
    G,
    A,
    stride_gradient,
    clip_range,
    clip_low,
    clip_high,
    prior_weight,
    kl_weight,
    inverse_temperature,
    TEMPERED: tl.constexpr,
    GRADIENT: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Terms of the loss at one row (an image's position), and the gradient of their sum over the rows.

    logits fp32 `[rows of the chunk, V]`, without their bias `[V]`, if they have one; gradient the same, stride_gradient
    from row to row: each of its rows may start where the row's logits do, in elements that are no wider. targets
    `[rows]`, tokens, old and base `[B, G, T]`, advantages `[B, G, A]` with A = T, or 1 for all of a rollout's tokens;
    without tokens (None), prior_weight · cross-entropy is all of the loss. terms `[6, rows]`: loss, policy, prior, KL,
    ratio, clip fraction, the means over the group; without tokens the first alone.

    A token outside 0…V−1 is looked up nowhere and has a NaN log-prob: so have the loss and the gradients.
    """
    row = first_row + tl.program_id(0)
    logits_ptr += tl.program_id(0).to(tl.int64) * V
    gradient_ptr += tl.program_id(0).to(tl.int64) * stride_gradient

    # A slot for each rollout's token, and slot G for the target.
    slot = tl.arange(0, BLOCK_G)
    rollout = slot < G
    token = tl.where(slot == G, tl.load(targets_ptr + row), -1)
    if tokens_ptr is not None:
        image = (row // T).to(tl.int64)
        sampled = (image * G + slot) * T + row % T
        token = tl.where(rollout, tl.load(tokens_ptr + sampled, mask=rollout, other=-1), token)
        advantage = tl.load(advantages_ptr + (image * G + slot) * A + row % A, mask=rollout, other=0.0)
        if old_ptr is not None:
            old = tl.load(old_ptr + sampled, mask=rollout, other=0.0)
        if base_ptr is not None:
            base = tl.load(base_ptr + sampled, mask=rollout, other=0.0)
    known = (token >= 0) & (token < V)
    chosen = tl.load(logits_ptr + token, mask=known, other=float("nan"))
    if bias_ptr is not None:
        chosen += tl.load(bias_ptr + token, mask=known, other=0.0).to(tl.float32)

    if WHOLE_ROW:
        x = load_logits(logits_ptr, bias_ptr, tl.arange(0, BLOCK_V), V)
        maximum = tl.max(x, axis=0)
    else:
        maximum = -float("inf")
        for start in range(0, V, BLOCK_V):
            x = load_logits(logits_ptr, bias_ptr, start + tl.arange(0, BLOCK_V), V)
            maximum = tl.maximum(maximum, tl.max(x, axis=0))
    shift = tl.where(tl.abs(maximum) < float("inf"), maximum, 0.0)  # as torch.logsumexp, whose ∞ is no NaN
    total = 0.0
    tempered_total = 0.0
    if WHOLE_ROW:
        total += tl.sum(tl.exp(x - shift), axis=0)
        if TEMPERED:
            tempered_total += tl.sum(tl.exp((x - shift) * inverse_temperature), axis=0)
    else:
        for start in range(0, V, BLOCK_V):
            x = load_logits(logits_ptr, bias_ptr, start + tl.arange(0, BLOCK_V), V)
            total += tl.sum(tl.exp(x - shift), axis=0)
            if TEMPERED:
                tempered_total += tl.sum(tl.exp((x - shift) * inverse_temperature), axis=0)
    if not TEMPERED:
        tempered_total = total

    logit = chosen - shift
    prior = tl.log(total) - tl.sum(tl.where(slot == G, logit, 0.0), axis=0)
    loss = tl.where(prior_weight != 0, prior_weight * prior, 0.0)
    slope = tl.where(slot == G, -prior_weight, 0.0)  # of the loss over the slot's own logit, the normaliser held fixed
    slopes = 0.0  # their sum over the rollouts
    if tokens_ptr is not None:
        new = logit * inverse_temperature - tl.log(tempered_total)
        ratio = tl.exp(new - (new if old_ptr is None else old))
        clipped = tl.where(ratio < clip_low, clip_low, tl.where(ratio > clip_high, clip_high, ratio))
        plain = -advantage * ratio
        bound = -advantage * clipped
        objective = tl.maximum(plain, bound, propagate_nan=tl.PropagateNan.ALL)
        # torch.maximum halves the gradient between equals; clamp passes its share on inside, bounds included.
        share = tl.where(plain > bound, 1.0, tl.where(plain == bound, 0.5, 0.0))
        share = tl.where((ratio >= clip_low) & (ratio <= clip_high), 1.0, share)
        over_logprob = -advantage * share * ratio
        policy = tl.sum(tl.where(rollout, objective, 0.0), axis=0) / G
        loss += policy
        kl = 0.0
        if base_ptr is not None:
            difference = base - new
            remainder = exponential_remainder(difference)
            kl += tl.sum(tl.where(rollout, remainder, 0.0), axis=0) / G
            loss += tl.where(kl_weight != 0, kl_weight * kl, 0.0)
            over_logprob -= tl.where(kl_weight != 0, kl_weight * (remainder + difference), 0.0)  # κ (e^d − 1)
        slope += tl.where(rollout, over_logprob * inverse_temperature / G, 0.0)
        slopes += tl.sum(tl.where(rollout, slope, 0.0), axis=0)
        outside = rollout & (tl.abs(ratio - 1) > clip_range)
        tl.store(terms_ptr + rows + row, policy)
        tl.store(terms_ptr + 2 * rows + row, prior)
        tl.store(terms_ptr + 3 * rows + row, kl)
        tl.store(terms_ptr + 4 * rows + row, tl.sum(tl.where(rollout, ratio, 0.0), axis=0) / G)
        tl.store(terms_ptr + 5 * rows + row, tl.sum(outside.to(tl.float32), axis=0) / G)
    tl.store(terms_ptr + row, loss)

    if GRADIENT:
        tempered_scale = -slopes / tempered_total
        scale = prior_weight / total
        if not TEMPERED:
            scale += tempered_scale
        if WHOLE_ROW:
            gradient = softmax_gradient(x, shift, scale, tempered_scale, inverse_temperature, TEMPERED)
            store_gradient(gradient_ptr, 0, V, gradient, BLOCK_V)
        else:
            for start in range(0, V, BLOCK_V):  # forwards: no block's gradient reaches logits that are still to be read
                x = load_logits(logits_ptr, bias_ptr, start + tl.arange(0, BLOCK_V), V)
                gradient = softmax_gradient(x, shift, scale, tempered_scale, inverse_temperature, TEMPERED)
                store_gradient(gradient_ptr, start, V, gradient, BLOCK_V)
        # The slots' tokens once more, with their slopes; equal tokens store the same value.
        own = tl.sum(tl.where(token[:, None] == token[None, :], slope[None, :], 0.0), axis=1)
        gradient = own + softmax_gradient(chosen, shift, scale, tempered_scale, inverse_temperature, TEMPERED)
        tl.debug_barrier()
        tl.store(gradient_ptr + token, gradient.to(gradient_ptr.dtype.element_ty), mask=known)


@triton.jit
def scale_gradient_kernel(gradient_ptr, scale_ptr, out_ptr, elements, BLOCK: tl.constexpr):
    """out = gradient · scale, in fp32 until it is stored; scale is a 0-d fp32 tensor."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(gradient_ptr + index, mask=index < elements, other=0.0).to(tl.float32)
    scaled = gradient * tl.load(scale_ptr)
    tl.store(out_ptr + index, scaled.to(out_ptr.dtype.element_ty), mask=index < elements)


class Head(NamedTuple):
    """hidden `[B, T, D]`, weight `[V, D]`, bias `[V]` or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Rollouts(NamedTuple):
    """What policy_loss has beside the targets: tokens, advantages (or `[B, G]`), old and base log-probs `[B, G, T]`."""

    tokens: Tensor | None = None
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    base_logprobs: Tensor | None = None


class Objective(NamedTuple):
    """Cross-entropy alone, unless told otherwise."""

    clip_range: float = 0.0
    prior_weight: float = 1.0
    kl_weight: float = 0.0
    temperature: float = 1.0


def head_loss(
    head: Head, targets: Tensor, rollouts: Rollouts, objective: Objective, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Terms of the loss at each row `[6, B·T]`; the gradients of their sum to hidden, weight and bias, as `needs` says.

    Those of weight and bias are fp32, hidden's in its dtype. Without tokens: terms `[1, B·T]`, cross-entropy alone.
    """
    states, weight = head_operands(head.hidden, head.weight)
    bias = contiguous(head.bias)
    rows, vocab_size = states.shape[0], weight.shape[0]
    gradients = empty_gradients(head, needs)
    to_hidden, to_weight, to_bias = gradients
    group_size = 0 if rollouts.tokens is None else rollouts.tokens.shape[1]
    advantages = 1 if rollouts.advantages is None else rollouts.advantages.shape[2:].numel()  # of a rollout
    terms = states.new_empty(1 if rollouts.tokens is None else 6, rows, dtype=torch.float32)
    sides = [targets.contiguous(), *map(contiguous, rollouts)]

    whole_row = vocab_size <= HEAD_LOSS["BLOCK_V"]  # in registers; otherwise in blocks, several times over
    block_v = next_power_of_2(vocab_size) if whole_row else HEAD_LOSS["BLOCK_V"] // 2
    block_g = next_power_of_2(group_size + 1)
    constants = {
        "TEMPERED": objective.temperature != 1,
        "GRADIENT": any(needs),
        "WHOLE_ROW": whole_row,
        "BLOCK_V": block_v,
        "BLOCK_G": block_g,
        "num_warps": max(max(block_v, block_g**2) // HEAD_LOSS["ELEMENTS_PER_WARP"], 1),
        "num_stages": HEAD_LOSS["num_stages"],
    }
    clip_range, prior_weight, kl_weight, temperature = objective
    numbers = (clip_range, 1 - clip_range, 1 + clip_range, prior_weight, kl_weight, 1 / temperature)
    for first, logits in logits_chunks(states, weight):
        # The gradient of a row starts where the row's logits do: over half of them if it is of 16 bits.
        gradient = logits.view(states.dtype)
        sizes = (first, rows, targets.shape[1], vocab_size, group_size, advantages, gradient.stride(0))
        grid = (len(logits),)
        launch(head_loss_kernel, grid, logits, bias, gradient, *sides, terms, *sizes, *numbers, **constants)
        gradient = gradient[:, :vocab_size]
        chunk = slice(first, first + len(logits))
        if needs[0]:
            product(gradient, weight, to_hidden.view(states.shape)[chunk])
        if needs[1]:
            product(gradient.t(), states[chunk], to_weight, accumulate=first > 0)
        if needs[2]:
            total = gradient.sum(0, dtype=torch.float32)
            to_bias.add_(total) if first > 0 else to_bias.copy_(total)
    return terms, *gradients


def empty_gradients(head: Head, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Those to hidden, weight and bias, before they are known; without elements where they are not needed."""
    shapes = (head.hidden.shape, head.weight.shape, head.weight.shape[:1])
    dtypes = (head.hidden.dtype, torch.float32, torch.float32)
    return tuple(
        head.hidden.new_empty(shape if need else (0,), dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


@torch.library.custom_op("vapi_fast::policy_loss", mutates_args=())
def policy_loss_op(
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
    bias: Tensor | None = None,
    needs_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss; policy, prior, KL, ratio and clip fraction; gradients of B·T times the loss to hidden, weight and bias.

    advantages, old_logprobs and base_logprobs are fp32. `needs_…` must be true where a backward will want a gradient.
    """
    rollouts = Rollouts(tokens, advantages, old_logprobs, base_logprobs)
    objective = Objective(clip_range, prior_weight, kl_weight, temperature)
    needs = [needs_hidden, needs_weight, needs_bias]
    terms, *gradients = head_loss(Head(hidden, weight, bias), targets, rollouts, objective, needs)
    return terms[0].mean(), terms[1:].mean(1), *gradients


@torch.library.custom_op("vapi_fast::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    bias: Tensor | None = None,
    needs_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy; gradients of B·T times it to hidden, weight and bias where needed."""
    needs = [needs_hidden, needs_weight, needs_bias]
    terms, *gradients = head_loss(Head(hidden, weight, bias), targets, Rollouts(), Objective(), needs)
    return terms[0].mean(), *gradients


@torch.library.custom_op("vapi_fast::scale_gradient", mutates_args=())
def scale_gradient_op(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · scale (0-d fp32) in another dtype, rounded once."""
    out = gradient.new_empty(gradient.shape, dtype=dtype)
    grid = (triton.cdiv(gradient.numel(), SCALE_GRADIENT["BLOCK"]),)
    launch(scale_gradient_kernel, grid, gradient.contiguous(), scale, out, gradient.numel(), **SCALE_GRADIENT)
    return out


scale_gradient_op.register_fake(lambda gradient, scale, dtype: gradient.new_empty(gradient.shape, dtype=dtype))


@policy_loss_op.register_fake
def _(hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, ...]:
    terms = (hidden.new_empty(shape, dtype=torch.float32) for shape in ((), (5,)))
    return *terms, *_empty_gradients(hidden, weight, options)


@linear_cross_entropy_op.register_fake
def _(hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return hidden.new_empty((), dtype=torch.float32), *_empty_gradients(hidden, weight, options)


def without_bias(arguments: int) -> int:
    """How many of an operator's arguments come before its bias; PyTorch leaves out the last that are as by default."""
    return 13 if arguments >= 13 else 5


def _empty_gradients(hidden: Tensor, weight: Tensor, options: Sequence[Any]) -> tuple[Tensor, ...]:
    known = without_bias(2 + len(options)) - 2
    bias, needs_bias = (*options[known:], *(None, False)[len(options) - known :])
    return empty_gradients(Head(hidden, weight, bias), [*options[known - 2 : known], needs_bias])


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.known = without_bias(len(inputs))
    hidden, weight, bias = (*inputs[:2], *inputs[ctx.known : ctx.known + 1], None)[:3]
    ctx.inputs, ctx.rows = len(inputs), hidden.shape[0] * hidden.shape[1]
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
    ctx.save_for_backward(*output[-3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros the size of the weight for its gradient, which has none itself


def _gradient(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    scale = grad_loss / ctx.rows
    needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[ctx.known : ctx.known + 1], False)
    wanted = zip(ctx.saved_tensors, ctx.dtypes, needs, strict=False)
    to_hidden, to_weight, to_bias = (
        scale_gradient_op(gradient, scale, dtype) if need else None for gradient, dtype, need in wanted
    )
    return to_hidden, to_weight, *[None] * (ctx.known - 2), *(to_bias, None)[: ctx.inputs - ctx.known]


policy_loss_op.register_autograd(_gradient, setup_context=_context)
linear_cross_entropy_op.register_autograd(_gradient, setup_context=_context)


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    base_logprobs: Tensor | None = None,
    clip_range: float = 0.2,
    prior_weight: float = 0.1,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
) -> PolicyLoss:
    """Objective of the whole group, with its gradients, from chunks of logits; see `vapi_fast.ops.policy_loss`."""
    check_dtypes("policy_loss", hidden=hidden, weight=weight, bias=bias)
    if tokens.shape[1] > MAX_GROUP:
        raise ValueError(
            f"policy_loss: tokens must have G <= {MAX_GROUP} on the 'triton' backend, got G={tokens.shape[1]}"
        )
    advantages, old_logprobs, base_logprobs = (
        None if side is None else side.detach().float() for side in (advantages, old_logprobs, base_logprobs)
    )
    sides = (tokens, advantages, targets, old_logprobs, base_logprobs)
    objective = (clip_range, prior_weight, kl_weight, temperature)
    needs_hidden, needs_weight, needs_bias = gradients_needed(hidden, weight, bias)
    loss, report, *_ = policy_loss_op(hidden, weight, *sides, *objective, needs_hidden, needs_weight, bias, needs_bias)
    return PolicyLoss(loss, *report.unbind())


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, with its gradients, from chunks of logits; see `vapi_fast.ops.linear_cross_entropy`."""
    check_dtypes("linear_cross_entropy", hidden=hidden, weight=weight, bias=bias)
    needs_hidden, needs_weight, needs_bias = gradients_needed(hidden, weight, bias)
    return linear_cross_entropy_op(hidden, weight, targets, needs_hidden, needs_weight, bias, needs_bias)[0]


def gradients_needed(*inputs: Tensor | None) -> list[bool]:
    """Whether a backward may ask for the gradient to each of these."""
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
