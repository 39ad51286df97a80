"""Optional packages, used where they are installed: flash-attn, xformers, apex, nvidia-ml-py.

Nothing else looks for them. A package built for another PyTorch or CUDA raises ImportError or OSError and counts as
absent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vapi_fast.runtime.forms import form


class Attention(NamedTuple):
    """`function` of q, k and v `[B, T, heads, head_dim]`, causal."""

    name: str
    function: Callable[[Tensor, Tensor, Tensor], Tensor]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ / sqrt(head_dim)) · v, each position over itself and those before it.

    q, k and v floating `[B, T, heads, head_dim]` → the same, with gradients to all three.
    """
    return attention_for(q.device, q.dtype, q.shape[-1]).function(q, k, v)


def attention_backend(device: torch.device) -> str:
    """What `causal_attention` runs on in bf16 on this device: "flash-attn", "xformers" or "sdpa" (PyTorch's own)."""
    return attention_for(device, torch.bfloat16, head_dim=64).name


def attention_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention:
    """The optional packages compute in 16 bits on CUDA, with heads of a multiple of 8 numbers (16 bytes)."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0:
        return optional_attention(form("attention", device))
    return SDPA


@functools.cache
def optional_attention(kind: str = "installed") -> Attention:
    """Of the optional packages the first that can be imported, once a process; before them a form of `forms.FORMS`."""
    if kind == "cudnn":
        return CUDNN
    for load in (*[flash_attn_3_attention] * (kind == "flash-attn-3"), flash_attn_attention, xformers_attention):
        try:
            return load()
        except (ImportError, OSError):
            continue
    return SDPA


def flash_attn_3_attention() -> Attention:
    """FlashAttention-3, for Hopper, a package of its own."""
    from flash_attn_interface import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = flash_attn_func(q, k, v, causal=True)
        return found[0] if isinstance(found, tuple) else found  # some releases give the log-sums of the scores too

    return Attention("flash-attn-3", attend)


def flash_attn_attention() -> Attention:
    from flash_attn import flash_attn_func

    return Attention("flash-attn", functools.partial(flash_attn_func, causal=True))


def xformers_attention() -> Attention:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    return Attention("xformers", lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask()))


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    by_head = (x.transpose(1, 2) for x in (q, k, v))  # views; the output's memory is [B, T, heads, head_dim] again
    return F.scaled_dot_product_attention(*by_head, is_causal=True).transpose(1, 2)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's by cuDNN, or where that has no kernel by another."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        return sdpa_attention(q, k, v)


SDPA, CUDNN = Attention("sdpa", sdpa_attention), Attention("cudnn", cudnn_attention)


@functools.cache
def apex_fused_adam() -> type[torch.optim.Optimizer] | None:
    """NVIDIA apex's FusedAdam, if built with its CUDA extensions; the `apex` of PyPI is another project."""
    try:
        from apex.multi_tensor_apply import multi_tensor_applier
        from apex.optimizers import FusedAdam
    except (ImportError, OSError):
        return None
    return FusedAdam if multi_tensor_applier.available else None


@functools.cache
def nvml() -> ModuleType | None:
    """The module `pynvml` of nvidia-ml-py, initialised; None without it or without an NVIDIA driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
