"""Every kernel's launches at production shapes: for ahead-of-time compilation on "meta" tensors, and for tuning.

LlamaGen-XXL at 384²: micro-batches of 16 images × 576 tokens, V 16384, D 1536, G 8, 24 heads of 64; decoder and LPIPS
maps of 128 to 512 channels. An entry is named after its operation and variant, and calls the launch functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import losses, normalization, perceptual, quantization, residual, sampling, transformer

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


def bias_group_norm_silu(channels: int, size: int, dtype: torch.dtype) -> None:
    h, affine = image_map(channels, size, dtype), new(channels, dtype=dtype)
    residual.bias_group_norm_silu_forward(h, affine, affine, affine, 32, 1e-6)


def add_group_norm_silu(
    channels: int, size: int, dtype: torch.dtype, *, phases: bool = False, silu: bool = True
) -> None:
    """The end of a residual block, or with phases that of an upsampling, to maps of this size."""
    h = image_map(4 * channels, size // 2 + 1, dtype) if phases else image_map(channels, size, dtype)
    added, affine = None if phases else image_map(channels, size, dtype), new(channels, dtype=dtype)
    residual.add_group_norm_silu_forward(h, affine, affine, 32, 1e-6, added, affine, phases, silu)


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
    levels = (
        [group_map(channels, size, dtype)],
        [image_map(channels, size, dtype)],
        [new(channels, dtype=torch.float32)],
    )
    if needs:
        perceptual.lpips_backward(new(IMAGES, GROUP, dtype=torch.float32), *levels, *needs)
    else:
        perceptual.lpips_forward(*levels)


def mse(dtype: torch.dtype) -> None:
    a, b = group_map(3, 384, dtype), image_map(3, 384, torch.float32)
    perceptual.mse_forward(a, b)
    for needs in ((True, False), (True, True)):
        perceptual.mse_backward(new(IMAGES, GROUP, dtype=torch.float32), a, b, *needs)


def group_sample(
    dtype: torch.dtype, *, top_k: int = 0, top_p: float = 1.0, images: int = IMAGES, vocab_size: int = VOCABULARY
) -> None:
    """One step of generation if filtered: 256 rows; otherwise all positions of the images."""
    filtered = top_k > 0 or top_p < 1
    rows, group_size = ((256, 1), 1) if filtered else ((images, TOKENS), GROUP)
    seed, ids = new(dtype=torch.int64), new(rows[0], dtype=torch.int64)
    logits = new(*rows, vocab_size, dtype=dtype)
    filters, position = (1.0, top_k, top_p), new(dtype=torch.int64)
    sampling.group_sample_forward(logits, group_size, seed, ids, *filters, position, ids if filtered else None)


def linear_group_sample(dtype: torch.dtype) -> None:
    hidden, weight = new(IMAGES, TOKENS, WIDTH, dtype=dtype), new(VOCABULARY, WIDTH, dtype=dtype)
    seed, ids, position = new(dtype=torch.int64), new(IMAGES, dtype=torch.int64), new(dtype=torch.int64)
    sampling.linear_group_sample_forward(hidden, weight, GROUP, seed, ids, 1.0, 0, 1.0, position, None)


def noisy_prefix() -> None:
    tokens, ids = new(IMAGES, TOKENS, dtype=torch.int64), new(IMAGES, dtype=torch.int64)
    sampling.noisy_prefix_forward(tokens, 0.5, VOCABULARY, new(dtype=torch.int64), ids)


def vq_lookup(dtype: torch.dtype) -> None:
    z, codebook = new(IMAGES, 24, 24, 8, dtype=dtype), new(VOCABULARY, 8, dtype=torch.float32)
    quantization.vq_lookup_forward(z, codebook, True)
    quantization.unit_backward(z, z)


def codebook_lookup(dtype: torch.dtype) -> None:
    indices, codebook = new(IMAGES * GROUP, TOKENS, dtype=torch.int64), new(VOCABULARY, 8, dtype=dtype)
    entries = quantization.codebook_lookup_forward(indices, codebook, True)
    quantization.codebook_lookup_backward(entries, indices, codebook, True)


def straight_through_lookup(dtype: torch.dtype, soft: bool, *needs: bool) -> None:
    """needs: gradients to logits and to the codebook."""
    logits, codebook = new(IMAGES, TOKENS, VOCABULARY, dtype=dtype), new(VOCABULARY, 8, dtype=torch.float32)
    draw = new(dtype=torch.int64), new(IMAGES, dtype=torch.int64)
    z_q, _, *statistics = quantization.straight_through_forward(logits, codebook, *draw, 1.0, soft)
    if soft:
        quantization.straight_through_backward(z_q, logits, codebook, *draw, *statistics, 1.0, *needs)


def rotary_2d(dtype: torch.dtype, heads: int = HEADS, head_dim: int = HEAD_DIM) -> None:
    _, keys, _ = new(IMAGES, TOKENS, 3, heads, head_dim, dtype=dtype).unbind(2)
    table = new(TOKENS, head_dim // 2, 2, dtype=torch.float32)
    transformer.rotary_2d_forward(keys, table, False)
    transformer.rotary_2d_forward(new(IMAGES, TOKENS, heads, head_dim, dtype=dtype), table, True)


def swiglu(dtype: torch.dtype) -> None:
    gate, up = (new(IMAGES, TOKENS, HIDDEN, dtype=dtype) for _ in range(2))
    transformer.swiglu_forward(gate, up)
    transformer.swiglu_backward(gate, gate, up)


def append_to_cache(
    dtype: torch.dtype, *, cache_dtype: torch.dtype, heads: int = HEADS, head_dim: int = HEAD_DIM
) -> None:
    """One step of generation."""
    keys, values = new(2, 256, heads, TOKENS, head_dim, dtype=dtype).to(cache_dtype)
    table, position = new(TOKENS, head_dim // 2, 2, dtype=torch.float32), new(dtype=torch.int64, below=TOKENS)
    transformer.append_to_cache_forward(new(256, 3, heads, head_dim, dtype=dtype), table, keys, values, position)


def decode_attention(
    dtype: torch.dtype,
    *,
    cache_dtype: torch.dtype | None = None,
    sequences: int = 256,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    group_size: int = 1,
    prefix_len: int = 0,
) -> None:
    """The last step of generation; a prefix has a mask, as a caption has, if it is longer than a class's one entry."""
    cache_dtype = cache_dtype or dtype
    slots, groups = TOKENS + 1, sequences // group_size
    keys, values = new(2, sequences, heads, slots, head_dim, dtype=dtype)
    prefix_k, prefix_v = new(2, groups, heads, prefix_len, head_dim, dtype=dtype) if prefix_len else (None, None)
    mask = new(groups, prefix_len, dtype=torch.int64, below=4) > 0 if prefix_len > 1 else None
    position = new(dtype=torch.int64, below=1) + slots - 1
    q, keys, values = keys[:, :, 0], keys.to(cache_dtype), values.to(cache_dtype)
    transformer.decode_attention_forward(q, keys, values, position, prefix_k, prefix_v, mask)


# fp8 needs a GPU of compute capability 8.9 or more.
WITHOUT_FP8 = ("sm_80",)

PRODUCTION: dict[str, Callable[[], None]] = {
    "rms_norm": lambda: rms_norm(torch.bfloat16),
    "rms_norm fp32": lambda: rms_norm(torch.float32),
    "group_norm_silu 128": lambda: group_norm_silu(128, 384, torch.bfloat16),
    "group_norm_silu 512": lambda: group_norm_silu(512, 48, torch.bfloat16),
    "group_norm_silu 128 fp32": lambda: group_norm_silu(128, 384, torch.float32),
    "bias_group_norm_silu 128": lambda: bias_group_norm_silu(128, 384, torch.bfloat16),
    "bias_group_norm_silu 512": lambda: bias_group_norm_silu(512, 24, torch.bfloat16),
    "bias_group_norm_silu 128 fp32": lambda: bias_group_norm_silu(128, 384, torch.float32),
    "add_group_norm_silu 128": lambda: add_group_norm_silu(128, 384, torch.bfloat16),
    "add_group_norm_silu 256": lambda: add_group_norm_silu(256, 96, torch.bfloat16),
    "add_group_norm_silu 512 without SiLU": lambda: add_group_norm_silu(512, 24, torch.bfloat16, silu=False),
    "add_group_norm_silu 128 fp32": lambda: add_group_norm_silu(128, 384, torch.float32),
    "add_group_norm_silu 128 of phases": lambda: add_group_norm_silu(128, 384, torch.bfloat16, phases=True),
    "add_group_norm_silu 512 of phases": lambda: add_group_norm_silu(512, 48, torch.bfloat16, phases=True),
    "add_group_norm_silu 128 of phases fp32": lambda: add_group_norm_silu(128, 384, torch.float32, phases=True),
    "policy_loss": lambda: policy_loss(torch.bfloat16),
    "policy_loss without gradient": lambda: policy_loss(torch.bfloat16, gradient=False),
    "policy_loss anchored": lambda: policy_loss(torch.bfloat16, anchored=True),
    "policy_loss anchored fp32": lambda: policy_loss(torch.float32, anchored=True),
    "policy_loss anchored V 65536": lambda: policy_loss(torch.bfloat16, anchored=True, vocab_size=65536),
    "policy_loss fp32 V 65536": lambda: policy_loss(torch.float32, vocab_size=65536),
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
    "group_sample": lambda: group_sample(torch.bfloat16),
    "group_sample fp32": lambda: group_sample(torch.float32),
    "group_sample V 65536": lambda: group_sample(torch.bfloat16, images=1, vocab_size=65536),
    "group_sample fp32 V 65536": lambda: group_sample(torch.float32, images=1, vocab_size=65536),
    "group_sample top-k": lambda: group_sample(torch.bfloat16, top_k=2000),
    "group_sample top-p": lambda: group_sample(torch.bfloat16, top_p=0.9),
    "group_sample top-k top-p": lambda: group_sample(torch.bfloat16, top_k=2000, top_p=0.9),
    "group_sample top-k fp32": lambda: group_sample(torch.float32, top_k=2000),
    "group_sample top-k top-p fp32": lambda: group_sample(torch.float32, top_k=2000, top_p=0.9),
    "group_sample top-k top-p fp32 V 65536": lambda: group_sample(
        torch.float32, top_k=2000, top_p=0.9, vocab_size=65536
    ),
    "linear_group_sample": lambda: linear_group_sample(torch.bfloat16),
    "noisy_prefix": noisy_prefix,
    "vq_lookup": lambda: vq_lookup(torch.bfloat16),
    "vq_lookup fp32": lambda: vq_lookup(torch.float32),
    "codebook_lookup": lambda: codebook_lookup(torch.bfloat16),
    "codebook_lookup fp32": lambda: codebook_lookup(torch.float32),
    "straight_through_lookup": lambda: straight_through_lookup(torch.bfloat16, True, True, False),
    "straight_through_lookup fp32": lambda: straight_through_lookup(torch.float32, True, True, False),
    "straight_through_lookup, both gradients": lambda: straight_through_lookup(torch.bfloat16, True, True, True),
    "straight_through_lookup fp32, both": lambda: straight_through_lookup(torch.float32, True, True, True),
    "straight_through_lookup, no gradient": lambda: straight_through_lookup(torch.bfloat16, False),
    "rotary_2d": lambda: rotary_2d(torch.bfloat16),
    "rotary_2d fp32": lambda: rotary_2d(torch.float32),
    "rotary_2d 3B": lambda: rotary_2d(torch.bfloat16, 32, 100),
    "swiglu": lambda: swiglu(torch.bfloat16),
    "swiglu fp32": lambda: swiglu(torch.float32),
    "append_to_cache": lambda: append_to_cache(torch.bfloat16, cache_dtype=torch.bfloat16),
    "append_to_cache fp32": lambda: append_to_cache(torch.float32, cache_dtype=torch.float32),
    "append_to_cache fp8": lambda: append_to_cache(torch.bfloat16, cache_dtype=torch.float8_e4m3fn),
    "append_to_cache 3B": lambda: append_to_cache(torch.bfloat16, cache_dtype=torch.bfloat16, heads=32, head_dim=100),
    "decode_attention": lambda: decode_attention(torch.bfloat16),
    "decode_attention fp8": lambda: decode_attention(torch.bfloat16, cache_dtype=torch.float8_e4m3fn),
    "decode_attention caption fp8": lambda: decode_attention(
        torch.bfloat16, cache_dtype=torch.float8_e4m3fn, group_size=16, prefix_len=120
    ),
    "decode_attention fp32": lambda: decode_attention(torch.float32),
    "decode_attention of one": lambda: decode_attention(torch.bfloat16, sequences=1),
    "decode_attention class": lambda: decode_attention(torch.bfloat16, group_size=8, prefix_len=1),
    "decode_attention caption": lambda: decode_attention(torch.bfloat16, group_size=16, prefix_len=120),
    "decode_attention caption G 64": lambda: decode_attention(torch.bfloat16, group_size=64, prefix_len=120),
    "decode_attention caption fp32": lambda: decode_attention(torch.float32, group_size=16, prefix_len=120),
    "decode_attention caption G 64 fp32": lambda: decode_attention(torch.float32, group_size=64, prefix_len=120),
    "decode_attention 3B": lambda: decode_attention(
        torch.bfloat16, heads=32, head_dim=100, group_size=64, prefix_len=120
    ),
    "decode_attention 3B fp32": lambda: decode_attention(
        torch.float32, sequences=64, heads=32, head_dim=100, group_size=64, prefix_len=120
    ),
}
