"""Generation as LlamaGen does it, in plain PyTorch: a static cache, full-length masks, one kernel launched at a time.

Facts from `autoregressive/models/{generate,gpt}.py` of FoundationVision/LlamaGen: conditional and unconditional rows
side by side in one batch up to the last token, attention over all slots of the cache behind a mask, its plain ("math")
form while decoding, softmax and multinomial. The truth in tests of `vapi_fast.generation`, and its rival in benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .filters import filter_logits

Draw = Callable[[Tensor, int], Tensor]


class StaticCache:
    """One layer's keys and values for all positions, `[rows, heads, slots, head_dim]`."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)

    def update(self, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[:, :, positions] = keys
        self.values[:, :, positions] = values
        return self.keys, self.values


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)).type_as(x) * weight


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x `[rows, positions, heads, head_dim]`; table `[positions, head_dim / 2, 2]`, cosine and sine."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cosine, sine = table.float()[None, :, None].unbind(-1)
    turned = [pairs[..., 0] * cosine - pairs[..., 1] * sine, pairs[..., 1] * cosine + pairs[..., 0] * sine]
    return torch.stack(turned, dim=-1).flatten(-2).type_as(x)


def forward(model: nn.Module, h: Tensor, positions: Tensor, caches: list[StaticCache], mask: Tensor) -> Tensor:
    """Logits `[rows, V]` after the last of these positions; h `[rows, positions, D]`, mask `[rows, slots, slots]`."""
    mask, table = mask[:, None, positions], model.rotary[positions]
    for layer, cache in zip(model.layers, caches, strict=True):
        attention, mlp = layer.attention, layer.feed_forward
        qkv = F.linear(rms_norm(h, layer.attention_norm.weight), attention.wqkv.weight)
        q, k, v = (x.unflatten(-1, (attention.heads, -1)) for x in qkv.chunk(3, dim=-1))
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, table), rotate(k, table), v))
        out = F.scaled_dot_product_attention(q, *cache.update(positions, k, v), attn_mask=mask)
        h = h + F.linear(out.transpose(1, 2).flatten(2), attention.wo.weight)
        x = rms_norm(h, layer.ffn_norm.weight)
        h = h + F.linear(F.silu(F.linear(x, mlp.w1.weight)) * F.linear(x, mlp.w3.weight), mlp.w2.weight)
    return F.linear(rms_norm(h, model.norm.weight), model.output.weight)[:, -1].float()


def attention_masks(rows: int, slots: int, condition_mask: Tensor | None, device: torch.device) -> Tensor:
    """Bool `[rows, slots, slots]`: causal, without caption padding, each position at least on itself."""
    mask = torch.ones(slots, slots, dtype=torch.bool, device=device).tril().repeat(rows, 1, 1)
    if condition_mask is not None:
        prefix = condition_mask.shape[1]
        mask[:, :, :prefix] &= condition_mask.repeat(rows // len(condition_mask), 1)[:, None]
    return mask | torch.eye(slots, dtype=torch.bool, device=device)


@torch.no_grad()
def generate(
    model: nn.Module,
    condition: Tensor,
    *,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    cfg_schedule: str = "constant",
    cfg_power: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    condition_mask: Tensor | None = None,
    draw: Draw | None = None,
) -> Tensor:
    """Draw one token sequence for each condition with a `LlamaGen`, in the dtype of its weights.

    condition, temperature, top_k, top_p, condition_mask and what begins with cfg are those of
    `vapi_fast.generation.sample_groups`. draw: from the guided logits `[B,V]` and t to tokens `[B]`, instead of softmax
    and multinomial. Returns int64 tokens `[B,T]`.
    """
    config, guided = model.config, cfg_scale > 1

    def multinomial(logits: Tensor, t: int) -> Tensor:
        return torch.multinomial(filter_logits(logits / temperature, top_k, top_p).softmax(-1), 1)[:, 0]

    def scale_at(t: int) -> float:
        if cfg_schedule == "constant" or (cfg_schedule == "power-cosine" and t == 0):
            return cfg_scale
        share = t / length if cfg_schedule == "rar" else (t - 1) / (length - 1)
        return 1 + (cfg_scale - 1) * (0.5 - 0.5 * math.cos(math.pi * share**cfg_power))

    def token(logits: Tensor, t: int) -> Tensor:
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = conditional
            if cfg_interval < 0 or t <= cfg_interval + 1:
                logits = unconditional + (conditional - unconditional) * scale_at(t)
        return (draw or multinomial)(logits, t)

    if guided:
        condition = torch.cat([condition, model.unconditional(condition)])
    prefix, length = config.prefix_len, config.grid_size**2
    rows, slots, weight = len(condition), prefix + length, model.output.weight
    caches = [StaticCache((rows, config.heads, slots, config.width // config.heads), weight) for _ in model.layers]
    mask = attention_masks(rows, slots, condition_mask, weight.device)
    tokens = torch.empty(rows // (2 if guided else 1), length, dtype=torch.int64, device=weight.device)
    positions = torch.arange(slots, device=weight.device)
    logits = forward(model, model.cls_embedding(condition), positions[:prefix], caches, mask)
    tokens[:, 0] = token(logits, 0)
    for t in range(1, length):
        h = model.tok_embeddings(tokens[:, t - 1 : t].repeat(2 if guided else 1, 1))
        with sdpa_kernel(SDPBackend.MATH):
            logits = forward(model, h, positions[prefix + t - 1 : prefix + t], caches, mask)
        tokens[:, t] = token(logits, t)
    return tokens
