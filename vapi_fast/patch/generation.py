"""LlamaGen's `generate` on our engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vapi_fast.generation.sequences import guidance_scales, sample_groups

from .views import as_llamagen

LEAST_TEMPERATURE = 1e-5  # LlamaGen's
LEAST_TOP_P = 1e-9  # keeps the most likely token alone


@torch.no_grad()
def generate(
    model: nn.Module,
    cond: Tensor,
    max_new_tokens: int,
    emb_masks: Tensor | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sample_logits: bool = True,
    cfg_type: str = "constant",
    cfg_power: float = 1.0,
    seed: int | None = None,
) -> Tensor:
    """LlamaGen's `generate` with its own arguments: the same distributions, and the same tokens where they are greedy.

    Draws come from a counter-based generator instead of `torch.multinomial`. The model itself is not touched: it gets
    no caches. A call keeps nothing afterwards, so that on a GPU each captures its CUDA graphs anew: draw many images by
    few calls, or by `vapi-fast generate`.

    Args:
        model: a LlamaGen `Transformer`, patched or not; DDP and torch.compile around it are looked through.
        cond: class ids `[B]`, or caption features `[B,cls_token_num,caption_dim]`.
        max_new_tokens: at most the model's block_size.
        emb_masks: `[B,cls_token_num]`, 0 at caption padding.
        cfg_scale, cfg_interval: classifier-free guidance, none for cfg_scale ≤ 1.
        temperature, top_k, top_p: of the draws, as LlamaGen's.
        sample_logits: False takes the most likely token each time.
        cfg_type, cfg_power: as VA-π's fork has them: "constant", or "power-cosine", see `guidance_scales`.
        seed: of the draws; None takes one from PyTorch's generator, so that `torch.manual_seed` decides it.

    Returns:
        int32 tokens `[B,max_new_tokens]`.

    Raises:
        TypeError, ValueError: as of `as_llamagen` and of `vapi_fast.generation.sequences.sample_groups`.
    """
    view = as_llamagen(model)
    captions, length = view.config.caption_tokens > 0, view.config.grid_size**2
    if not 1 <= max_new_tokens <= length:
        raise ValueError(
            f"generate: max_new_tokens must be in 1…{length}, this model's block_size, got {max_new_tokens}"
        )
    if cfg_type not in ("constant", "power-cosine"):
        raise ValueError(f"generate: cfg_type must be 'constant' or 'power-cosine', got {cfg_type!r}")
    if cfg_scale > 1:
        view.require_unconditional("generate: guidance")
    if not sample_logits:
        temperature, top_k, top_p = 1.0, 1, 1.0
    if seed is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    scales = guidance_scales(max_new_tokens, max(cfg_scale, 1.0), cfg_interval, cfg_type, cfg_power)
    tokens = sample_groups(
        view,
        cond if captions else cond.long(),
        group_size=1,
        seed=seed,
        cfg_scale=scales + [1.0] * (length - max_new_tokens),  # of those that are drawn for nothing
        temperature=max(temperature, LEAST_TEMPERATURE),
        top_k=top_k,
        top_p=min(max(top_p, LEAST_TOP_P), 1.0),
        condition_mask=None if emb_masks is None else emb_masks.bool(),
    ).tokens
    return tokens[:, 0, :max_new_tokens].int()
