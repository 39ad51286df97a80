"""Every kernel's launches at production shapes, for ahead-of-time compilation: no data, "meta" tensors only.

LlamaGen-XXL at 384²: micro-batches of 16 images × 576 tokens, V 16384, D 1536, G 8, 24 heads of 64; decoder and LPIPS
maps of 128 to 512 channels. An entry is named after its operation and variant, and calls the launch functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import normalization

IMAGES, GROUP, TOKENS, VOCABULARY, WIDTH, HEADS, HEAD_DIM, HIDDEN = 16, 8, 576, 16384, 1536, 24, 64, 4096


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


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


PRODUCTION: dict[str, Callable[[], None]] = {
    "rms_norm": lambda: rms_norm(torch.bfloat16),
    "rms_norm fp32": lambda: rms_norm(torch.float32),
    "group_norm_silu 128": lambda: group_norm_silu(128, 384, torch.bfloat16),
    "group_norm_silu 512": lambda: group_norm_silu(512, 48, torch.bfloat16),
    "group_norm_silu 128 fp32": lambda: group_norm_silu(128, 384, torch.float32),
}
