"""LlamaGen: a Llama-style transformer over image tokens, conditioned on a class or a caption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.models.sizes import LLAMAGEN_CONFIGS, LlamaGenConfig
from vapi_fast.runtime.accelerators import causal_attention
from vapi_fast.runtime.checkpoint import load_into, load_state_dict
from vapi_fast.runtime.errors import CheckpointError

from .recompute import norm_linear, rotated_heads, swiglu_linear

NORM_EPS = 1e-5


class Cache(Protocol):
    """Keys and values of earlier positions (see `vapi_fast.generation.sequences.KVCache`)."""

    length: int

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight.to(x.dtype), NORM_EPS)


class Attention(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x: Tensor, norm: RMSNorm, rotary: Tensor, mask: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        """Attention over norm(x)."""
        (qkv,) = norm_linear(x, norm.weight, NORM_EPS, self.wqkv.weight)
        q, k, v = rotated_heads(qkv.unflatten(-1, (3, self.heads, -1)), rotary)
        if mask is None and cache is None:
            return self.wo(causal_attention(q, k, v).flatten(2))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        causal = mask is None and x.shape[1] > 1  # a single query sees everything in the cache
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.hidden_width, bias=False)
        self.w3 = nn.Linear(config.width, config.hidden_width, bias=False)
        self.w2 = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """SwiGLU of norm(x)."""
        gate, up = norm_linear(x, norm.weight, NORM_EPS, self.w1.weight, self.w3.weight)
        return swiglu_linear(gate, up, self.w2.weight)


class Block(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)

    def forward(
        self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: Cache | None, layer: int, dropout: float
    ) -> Tensor:
        x = x + F.dropout(self.attention(x, self.attention_norm, rotary, mask, cache, layer), dropout)
        return x + F.dropout(self.feed_forward(x, self.ffn_norm), dropout)


class ClassEmbedding(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.width)  # last row: unconditional

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels).unsqueeze(1)


class CaptionEmbedding(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.cap_proj = nn.Sequential()
        self.cap_proj.add_module("fc1", nn.Linear(config.caption_width, config.width, bias=False))
        self.cap_proj.add_module("act", nn.GELU(approximate="tanh"))
        self.cap_proj.add_module("fc2", nn.Linear(config.width, config.width, bias=False))
        unconditional = torch.randn(config.caption_tokens, config.caption_width) / config.caption_width**0.5
        self.register_buffer("uncond_embedding", unconditional)

    def forward(self, features: Tensor) -> Tensor:
        return self.cap_proj(features.to(self.cap_proj.fc1.weight.dtype))


class LlamaGen(nn.Module):
    """Autoregressive transformer π_θ(x_t | x_{<t}, condition) over T = grid_size² image tokens.

    `dropout` (default 0) acts in training mode on the embeddings, both residual branches and, as dropping of the
    condition, on whole images: LlamaGen's own training uses 0.1 for all four.
    """

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = 0.0
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.cls_embedding = CaptionEmbedding(config) if config.caption_tokens else ClassEmbedding(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def from_name(cls, name: str, **changes: int) -> LlamaGen:
        """A randomly initialised model of a named size; `changes` override fields of its LlamaGenConfig."""
        return cls(replace(llamagen_config(name), **changes))

    @classmethod
    def from_checkpoint(cls, path: str | Path, name: str, *, grid_size: int | None = None) -> LlamaGen:
        """The model `name` with the weights at `path`; vocabulary, classes and kind of condition are the file's.

        Args:
            grid_size: tokens a side (image size / 16), default the named size's; not stored in checkpoints.

        Raises:
            CheckpointError: missing, damaged, or another size than `name` (the message says which size it looks like).
        """
        config = llamagen_config(name)
        state = load_state_dict(path)
        state.pop("freqs_cis", None)  # the rotary table, a buffer in LlamaGen's serving code
        for key in ("tok_embeddings.weight", "output.weight"):
            if key not in state or state[key].ndim != 2:
                raise CheckpointError(f"{path}: no weight named {key}: not a LlamaGen generator's checkpoint")
        layers = 1 + max((int(k.split(".")[1]) for k in state if k.startswith("layers.")), default=-1)
        width = state["tok_embeddings.weight"].shape[1]
        if (layers, width) != (config.layers, config.width):
            fitting = [n for n, c in LLAMAGEN_CONFIGS.items() if (c.layers, c.width) == (layers, width)]
            advice = f"pass --model {fitting[0]}" if fitting else "no known size fits it"
            raise CheckpointError(
                f"{path}: holds {layers} layers of width {width}, but --model {name} has {config.layers} of width "
                f"{config.width}: {advice}"
            )
        changes = {"vocab_size": state["tok_embeddings.weight"].shape[0]}
        if grid_size is not None:
            changes["grid_size"] = grid_size
        if "cls_embedding.uncond_embedding" in state:
            changes["caption_tokens"], changes["caption_width"] = state["cls_embedding.uncond_embedding"].shape
        elif "cls_embedding.embedding_table.weight" in state:
            changes["num_classes"] = state["cls_embedding.embedding_table.weight"].shape[0] - 1
        with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
            model = cls(replace(config, **changes))
        load_into(model, state, path, hint=f"pass a whole checkpoint of a LlamaGen of size {name}")
        model.rotary = rotary_table(model.config)
        return model

    def unconditional(self, condition: Tensor) -> Tensor:
        """The condition that stands for "none", shaped like `condition`: class id num_classes, or empty caption."""
        if self.config.caption_tokens:
            return self.cls_embedding.uncond_embedding.to(condition.dtype).expand_as(condition)
        return torch.full_like(condition, self.config.num_classes)

    def forward(
        self,
        tokens: Tensor | None,
        condition: Tensor | None,
        *,
        condition_mask: Tensor | None = None,
        cache: Cache | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Predict the token after each input position, from the last condition position on.

        Args:
            tokens: int64 `[B,S]`, S ≥ 0; None for the prefill of a cache.
            condition: class ids int64 `[B]` or caption features `[B,prefix_len,caption_width]`; None when the cache
                holds it already.
            condition_mask: bool `[B,prefix_len]`, False at caption padding.
            cache: keys and values of earlier positions; the inputs continue where it ends.
            return_hidden: skip the LM head.

        Returns:
            float32 logits `[B,S+1,V]` (`[B,S,V]` without condition), or the normalised hidden states `[B,·,D]`.
        """
        parts = []
        if condition is not None:
            parts.append(self.cls_embedding(self.drop_condition(condition)))
        if tokens is not None:
            parts.append(self.tok_embeddings(tokens))
        h = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if torch.is_autocast_enabled(h.device.type):  # all blocks then keep this dtype, in sums and norms too
            h = h.to(torch.get_autocast_dtype(h.device.type))
        start = cache.length if cache is not None else 0
        end = start + h.shape[1]
        if end > self.rotary.shape[0]:
            raise ValueError(
                f"{end - self.config.prefix_len} image tokens do not fit a {self.config.grid_size}×"
                f"{self.config.grid_size} grid"
            )
        if condition_mask is None and 0 < start < end - 1:  # SDPA's own causal mask would start at the first key
            condition_mask = torch.ones(1, self.config.prefix_len, dtype=torch.bool, device=h.device)
        mask = None if condition_mask is None else attention_mask(condition_mask, start, end)
        dropout = self.dropout if self.training else 0.0
        h = F.dropout(h, dropout)
        for i, layer in enumerate(self.layers):
            h = layer(h, self.rotary[start:end], mask, cache, i, dropout)
        if cache is not None:
            cache.length = end
        if condition is not None:
            h = h[:, self.config.prefix_len - 1 :]
        h = self.norm(h)
        return h if return_hidden else self.output(h).float()

    def drop_condition(self, condition: Tensor) -> Tensor:
        """In training mode with dropout, replace whole conditions by "none" with probability `dropout`."""
        if not (self.training and self.dropout):
            return condition
        dropped = torch.rand(len(condition), device=condition.device) < self.dropout
        return torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), self.unconditional(condition), condition)


def rotary_table(config: LlamaGenConfig) -> Tensor:
    """Cosines and sines `[prefix_len + grid_size², head_dim / 2, 2]` of all positions."""
    return ops.rotary_2d_table(config.grid_size, config.width // config.heads, config.prefix_len)


def attention_mask(condition_mask: Tensor, start: int, end: int) -> Tensor:
    """Causal mask for queries start…end−1 that hides caption padding; bool `[B,1,end−start,end]`.

    A position always sees itself, so that rows of padding stay finite.
    """
    prefix = condition_mask.shape[1]
    positions = torch.arange(end, device=condition_mask.device)
    queries = positions[start:, None]
    visible = F.pad(condition_mask.bool(), (0, max(end - prefix, 0)), value=True)[:, :end]
    return ((positions <= queries) & visible[:, None] | (positions == queries))[:, None]


def llamagen_config(name: str) -> LlamaGenConfig:
    if name.lower() not in LLAMAGEN_CONFIGS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(LLAMAGEN_CONFIGS)}")
    return LLAMAGEN_CONFIGS[name.lower()]
