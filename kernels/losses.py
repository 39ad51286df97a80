"""Rows of the policy loss and of cross-entropy: the objective and the gradient of its logits, in one pass.

n rows (B·T) of V logits, which cuBLAS has written in fp32; their gradient goes over them, in hidden's dtype.

| kernel         | bytes moved                                                | FLOPs per element  |
|----------------|------------------------------------------------------------|--------------------|
| head_loss      | n·V·(4 + 2), in fp32 4 + 4, without a gradient 4           | 6 + 1 exponential  |
| scale_gradient | each gradient read (hidden's dtype, fp32) and written once | 1                  |

Both are bound by memory bandwidth; the whole operation is bound by its three matrix products, those of
`vapi_fast.ops.fused.head`. Predicted for an H100 of 798 TFLOP/s and 3.0 TB/s, bf16, n = 9216, V = 16384, D = 1536:
products 1.74 ms, and 0.3 for their tails and for writing fp32 logits; head_loss 0.30 (0.9 GB); four chunks' ∇weight
read and written, 0.2 (0.7 GB); scale_gradient 0.09 (0.26 GB): 2.65 ms. Memory: logits 151 MB, ∇weight 101 MB, ∇hidden
28 MB, the bf16 copy of an fp32 weight 50 MB.
"""

import triton
import triton.language as tl


@triton.jit
def load_logits(row_ptr, start, V, BLOCK_V: tl.constexpr):
    column = start + tl.arange(0, BLOCK_V)
    return tl.load(row_ptr + column, mask=column < V, other=-float("inf"))


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


@triton.jit(do_not_specialize=["first_row", "rows", "T", "G"])
def head_loss(
    logits_ptr,
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

    logits fp32 `[rows of the chunk, V]`, gradient the same with stride_gradient from row to row: each of its rows may
    start where the row's logits do, in elements that are no wider. targets `[rows]`, tokens, old and base `[B, G, T]`,
    advantages `[B, G]`; without tokens (None), prior_weight · cross-entropy is all of the loss. terms `[6, rows]`:
    loss, policy, prior, KL, ratio, clip fraction, the means over the group; without tokens the first alone.

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
        advantage = tl.load(advantages_ptr + image * G + slot, mask=rollout, other=0.0)
        if old_ptr is not None:
            old = tl.load(old_ptr + sampled, mask=rollout, other=0.0)
        if base_ptr is not None:
            base = tl.load(base_ptr + sampled, mask=rollout, other=0.0)
    known = (token >= 0) & (token < V)
    chosen = tl.load(logits_ptr + token, mask=known, other=float("nan"))

    if WHOLE_ROW:
        x = load_logits(logits_ptr, 0, V, BLOCK_V)
        maximum = tl.max(x, axis=0)
    else:
        maximum = -float("inf")
        for start in range(0, V, BLOCK_V):
            maximum = tl.maximum(maximum, tl.max(load_logits(logits_ptr, start, V, BLOCK_V), axis=0))
    shift = tl.where(tl.abs(maximum) < float("inf"), maximum, 0.0)  # as torch.logsumexp, whose ∞ is no NaN
    total = 0.0
    tempered_total = 0.0
    if WHOLE_ROW:
        total += tl.sum(tl.exp(x - shift), axis=0)
        if TEMPERED:
            tempered_total += tl.sum(tl.exp((x - shift) * inverse_temperature), axis=0)
    else:
        for start in range(0, V, BLOCK_V):
            x = load_logits(logits_ptr, start, V, BLOCK_V)
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
                x = load_logits(logits_ptr, start, V, BLOCK_V)
                gradient = softmax_gradient(x, shift, scale, tempered_scale, inverse_temperature, TEMPERED)
                store_gradient(gradient_ptr, start, V, gradient, BLOCK_V)
        # The slots' tokens once more, with their slopes; equal tokens store the same value.
        own = tl.sum(tl.where(token[:, None] == token[None, :], slope[None, :], 0.0), axis=1)
        gradient = own + softmax_gradient(chosen, shift, scale, tempered_scale, inverse_temperature, TEMPERED)
        tl.debug_barrier()
        tl.store(gradient_ptr + token, gradient.to(gradient_ptr.dtype.element_ty), mask=known)


@triton.jit
def scale_gradient(gradient_ptr, scale_ptr, out_ptr, elements, BLOCK: tl.constexpr):
    """out = gradient · scale, in fp32 until it is stored; scale is a 0-d fp32 tensor."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(gradient_ptr + index, mask=index < elements, other=0.0).to(tl.float32)
    scaled = gradient * tl.load(scale_ptr)
    tl.store(out_ptr + index, scaled.to(out_ptr.dtype.element_ty), mask=index < elements)
