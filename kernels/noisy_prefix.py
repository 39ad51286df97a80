"""The corruption of a prefix: 16·(T − 1) bytes a sequence, and 100 instructions a token (Philox); no gradients."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from .launch import contiguous, launch, seed_tensor
from .losses import linear_cross_entropy
from .philox import NOISY_PREFIX, random_words

SETTINGS = {"BLOCK": 512, "num_warps": 4, "num_stages": 1}


@triton.jit(do_not_specialize=["threshold", "vocab_size", "length", "size"])
def noisy_prefix_kernel(
    tokens_ptr,
    seed_ptr,
    sample_ids_ptr,
    prefix_ptr,
    threshold,
    vocab_size,
    length,
    size,
    stride_b,
    stride_t,
    BLOCK: tl.constexpr,
):
    """prefix, contiguous `[B, length]`: each token replaced where the 24-bit uniform is below `threshold`."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    image, t = offset // length, offset % length
    sample_id = image
    if sample_ids_ptr is not None:
        sample_id = tl.load(sample_ids_ptr + image, mask=inside, other=0)
    choice, replacement, _, _ = random_words(tl.load(seed_ptr), t, 0, sample_id, NOISY_PREFIX)
    token = tl.load(tokens_ptr + image * stride_b + t * stride_t, mask=inside, other=0)
    random_token = tl.umulhi(replacement, tl.cast(vocab_size, tl.uint32)).to(tl.int64)
    tl.store(prefix_ptr + offset, tl.where((choice >> 8) < threshold, random_token, token), mask=inside)


@torch.library.custom_op("vapi_fast::noisy_prefix", mutates_args=())
def noisy_prefix_op(
    tokens: Tensor, noise_prob: float, vocab_size: int, seed: Tensor, sample_ids: Tensor | None
) -> Tensor:
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    prefix = tokens.new_empty(batch, length)
    grid = (triton.cdiv(prefix.numel(), SETTINGS["BLOCK"]),)
    sizes = (math.ceil(noise_prob * 2**24), vocab_size, length, prefix.numel(), *tokens.stride())
    launch(noisy_prefix_kernel, grid, tokens, seed, contiguous(sample_ids), prefix, *sizes, **SETTINGS)
    return prefix


noisy_prefix_op.register_fake(lambda tokens, *_: tokens.new_empty(tokens.shape[0], tokens.shape[1] - 1))


def noisy_prefix(
    tokens: Tensor, noise_prob: float, vocab_size: int, *, seed: int | Tensor, sample_ids: Tensor | None = None
) -> Tensor:
    """Corruption of a prefix in one pass; see `vapi_fast.ops.noisy_prefix`."""
    return noisy_prefix_op(tokens, noise_prob, vocab_size, seed_tensor(seed, tokens.device), sample_ids)


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
    weight, bias = model.output.weight, getattr(model.output, "bias", None)
    prefix = noisy_prefix(tokens, noise_prob, weight.shape[0], seed=seed, sample_ids=sample_ids)
    return linear_cross_entropy(model(prefix, condition, return_hidden=True), weight, tokens, bias=bias)
