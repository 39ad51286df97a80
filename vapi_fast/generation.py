"""Free-running generation with a KV cache and classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from vapi_fast import ops
from vapi_fast.models import LlamaGen


class KVCache:
    """Keys and values of all layers, `[layers, B, heads, max_length, head_dim]`, filled up to `length`."""

    def __init__(self, model: LlamaGen, batch: int, max_length: int) -> None:
        config = model.config
        shape = (config.layers, batch, config.heads, max_length, config.width // config.heads)
        weight = model.layers[0].attention.wqkv.weight
        dtype = (
            torch.get_autocast_dtype(weight.device.type)
            if torch.is_autocast_enabled(weight.device.type)
            else weight.dtype
        )
        self.keys = torch.empty(shape, dtype=dtype, device=weight.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # the model moves it on once all layers have written

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values `[B,heads,new,head_dim]`; return all it has so far."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@torch.no_grad()
def generate(
    model: LlamaGen,
    condition: Tensor,
    *,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    cfg_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    condition_mask: Tensor | None = None,
) -> Tensor:
    """Draw one token sequence per condition; `VQTokenizer.decode` turns it into an image.

    Args:
        condition: class ids int64 `[B]` in 0…num_classes, or caption features `[B,prefix_len,caption_width]`.
        seed, sample_ids: a sample depends on the seed, its id (default 0…B−1) and its condition alone.
        cfg_scale: classifier-free guidance, uncond + scale · (cond − uncond); 1 skips the unconditional half.
        temperature, top_k, top_p: applied to the guided logits; 0 and 1 switch the filters off.
        condition_mask: bool `[B,prefix_len]`, False at caption padding.

    Returns:
        int64 tokens `[B,T]`, T = grid_size².

    Raises:
        ValueError: a class id out of range, or cfg_scale below 1.
    """
    config = model.config
    if cfg_scale < 1:
        raise ValueError(f"cfg_scale must be at least 1 (no guidance), got {cfg_scale}")
    if not config.caption_tokens and ((condition < 0) | (condition > config.num_classes)).any():
        raise ValueError(f"class ids must lie in 0…{config.num_classes - 1}, got {condition.tolist()[:8]}")
    batch, length = len(condition), config.grid_size**2
    guided = cfg_scale > 1
    if guided:
        condition = torch.cat([condition, model.unconditional(condition)])
        condition_mask = None if condition_mask is None else condition_mask.repeat(2, 1)
    tokens = torch.empty(batch, length, dtype=torch.int64, device=condition.device)
    cache = KVCache(model, len(condition), config.prefix_len + length)
    training = model.training
    model.eval()
    logits = model(None, condition, condition_mask=condition_mask, cache=cache)[:, -1]
    for position in range(length):
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + cfg_scale * (conditional - unconditional)
        drawn, _ = ops.group_sample(
            logits[:, None],
            1,
            seed=seed,
            sample_ids=sample_ids,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            first_position=position,
        )
        tokens[:, position] = drawn[:, 0, 0]
        if position + 1 < length:
            step = tokens[:, position : position + 1].repeat(2 if guided else 1, 1)
            logits = model(step, None, condition_mask=condition_mask, cache=cache)[:, -1]
    model.train(training)
    return tokens
