"""Every kernel's launches at production shapes: for ahead-of-time compilation on "meta" tensors, and for tuning.

LlamaGen-XXL at 384²: micro-batches of 16 images × 576 tokens, V 16384, D 1536, G 8, 24 heads of 64; decoder and LPIPS
maps of 128 to 512 channels. An entry is named after its operation and variant, and calls the launch functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import losses, normalization, perceptual

IMAGES, GROUP, TOKENS, VOCABULARY, WIDTH, HEADS, HEAD_DIM, HIDDEN = 16, 8, 576, 16384, 1536, 24, 64, 4096


_device = torch.device("meta")


@contextmanager
def inputs_on(device: torch.device) -> Iterator[None]:
    """Inside the `with` block the entries' inputs are random data on `device`, not "meta" tensors without any."""
    global _device
    _device = device
    try:
        yield
    finally:
        _device = torch.device("meta")


def new(*shape: int, dtype: torch.dtype = torch.bfloat16, below: int = VOCABULARY) -> Tensor:
    """An input: normal numbers, or integers in [0, below)."""
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype, device=_device)
    return torch.randint(below, shape, dtype=dtype, device=_device)


def image_map(channels: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return new(IMAGES, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)


def rms_norm(dtype: torch.dtype) -> None:
    x, weight = new(IMAGES, TOKENS, WIDTH, dtype=dtype), new(WIDTH, dtype=dtype)
    normalization.rms_norm_forward(x, weight, 1e-5)
    normalization.rms_norm_backward(x, x, weight, 1e-5)


def group_norm_silu(channels: int, size: int, dtype: torch.dtype) -> None:
    x, affine = image_map(channels, size, dtype), new(channels, dtype=dtype)
    _, statistics = normalization.group_norm_silu_forward(x, affine, affine, 32, 1e-6)
    normalization.group_norm_silu_backward(x, x, affine, affine, statistics)


def policy_loss(
    dtype: torch.dtype, *, vocab_size: int = VOCABULARY, anchored: bool = False, gradient: bool = True
) -> None:
    """anchored: with the log-probs of an older and of the base policy, at a temperature."""
    hidden, weight = new(IMAGES, TOKENS, WIDTH, dtype=dtype), new(vocab_size, WIDTH, dtype=torch.float32)
    tokens, targets = new(IMAGES, GROUP, TOKENS, dtype=torch.int64), new(IMAGES, TOKENS, dtype=torch.int64)
    logprobs = new(IMAGES, GROUP, TOKENS, dtype=torch.float32) if anchored else None
    advantages, temperature = new(IMAGES, GROUP, dtype=torch.float32), 0.9 if anchored else 1.0
    options = (0.2, 0.1, 0.1 if anchored else 0.0, temperature, gradient, gradient)
    _, _, *gradients = losses.policy_loss_forward(
        hidden, weight, tokens, advantages, targets, logprobs, logprobs, *options
    )
    if gradient:
        for each in gradients:
            losses.scale_gradient(each, new(dtype=torch.float32), each.dtype)


def linear_cross_entropy(dtype: torch.dtype) -> None:
    hidden, weight = new(IMAGES, TOKENS, WIDTH, dtype=dtype), new(VOCABULARY, WIDTH, dtype=dtype)
    losses.linear_cross_entropy_forward(hidden, weight, new(IMAGES, TOKENS, dtype=torch.int64), True, True)


def group_map(channels: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    maps = new(IMAGES * GROUP, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    return maps.unflatten(0, (IMAGES, GROUP))


def lpips_distance(channels: int, size: int, dtype: torch.dtype, *needs: bool) -> None:
    """needs: gradients to a, b and weights; none of them for the forward."""
    levels = [group_map(channels, size, dtype)], [image_map(channels, size, dtype)], [new(channels, dtype=torch.float32)]
    if needs:
        perceptual.lpips_backward(new(IMAGES, GROUP, dtype=torch.float32), *levels, *needs)
    else:
        perceptual.lpips_forward(*levels)


def mse(dtype: torch.dtype) -> None:
    a, b = group_map(3, 384, dtype), image_map(3, 384, torch.float32)
    perceptual.mse_forward(a, b)
    for needs in ((True, False), (True, True)):
        perceptual.mse_backward(new(IMAGES, GROUP, dtype=torch.float32), a, b, *needs)


PRODUCTION: dict[str, Callable[[], None]] = {
    "rms_norm": lambda: rms_norm(torch.bfloat16),
    "rms_norm fp32": lambda: rms_norm(torch.float32),
    "group_norm_silu 128": lambda: group_norm_silu(128, 384, torch.bfloat16),
    "group_norm_silu 512": lambda: group_norm_silu(512, 48, torch.bfloat16),
    "group_norm_silu 128 fp32": lambda: group_norm_silu(128, 384, torch.float32),
    "policy_loss": lambda: policy_loss(torch.bfloat16),
    "policy_loss without gradient": lambda: policy_loss(torch.bfloat16, gradient=False),
    "policy_loss anchored": lambda: policy_loss(torch.bfloat16, anchored=True),
    "policy_loss anchored fp32": lambda: policy_loss(torch.float32, anchored=True),
    "policy_loss anchored V 65536": lambda: policy_loss(torch.bfloat16, anchored=True, vocab_size=65536),
    "linear_cross_entropy": lambda: linear_cross_entropy(torch.bfloat16),
    "linear_cross_entropy fp32": lambda: linear_cross_entropy(torch.float32),
    "lpips_distance 64": lambda: lpips_distance(64, 384, torch.bfloat16),
    "lpips_distance 256": lambda: lpips_distance(256, 96, torch.bfloat16),
    "lpips_distance 512": lambda: lpips_distance(512, 24, torch.bfloat16),
    "lpips_distance 64 fp32": lambda: lpips_distance(64, 384, torch.float32),
    "lpips_distance 512 fp32": lambda: lpips_distance(512, 24, torch.float32),
    "lpips_distance 64, gradient to a": lambda: lpips_distance(64, 384, torch.bfloat16, True, False, False),
    "lpips_distance 512, gradient to a": lambda: lpips_distance(512, 24, torch.bfloat16, True, False, False),
    "lpips_distance 512, all gradients": lambda: lpips_distance(512, 24, torch.bfloat16, True, True, True),
    "lpips_distance 64 fp32, all gradients": lambda: lpips_distance(64, 384, torch.float32, True, True, True),
    "mse": lambda: mse(torch.bfloat16),
    "mse fp32": lambda: mse(torch.float32),
}
