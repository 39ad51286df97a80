"""LlamaGen: a generator over 2-D rotary positions, conditioned on a class or a caption; its files' names and layout."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.models.sizes import LLAMAGEN_CONFIGS, LlamaGenConfig, named_size
from vapi_fast.runtime.checkpoint import load_into, load_state_dict
from vapi_fast.runtime.errors import CheckpointError

from .transformer import Block, Condition, Generator, Head, RMSNorm


class ClassEmbedding(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        rows = config.num_classes + config.has_unconditional  # the last one is "none"
        self.embedding_table = nn.Embedding(rows, config.width)

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


LAYER = re.compile(r"layers\.(\d{1,4})\.")


class LlamaGen(Generator):
    """LlamaGen's transformer, with its parameters' names."""

    sizes = LLAMAGEN_CONFIGS
    config: LlamaGenConfig

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.cls_embedding = CaptionEmbedding(config) if config.caption_tokens else ClassEmbedding(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def from_name(cls, name: str, **changes: int) -> LlamaGen:
        """A randomly initialised model of a named size; `changes` override fields of its LlamaGenConfig."""
        return cls(replace(named_size(LLAMAGEN_CONFIGS, name), **changes))

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, name: str, *, grid_size: int | None = None, averaged: bool = False
    ) -> LlamaGen:
        """The model `name` with the weights at `path`; vocabulary, classes and kind of condition are the file's.

        The last row of its class embeddings stands for "none", except where they have a row for each of the named
        size's classes and no more (1000, ImageNet's): such a model was trained with `class_dropout_prob` 0.

        Args:
            grid_size: tokens a side (image size / 16), default the named size's; not stored in checkpoints.
            averaged: as of `load_state_dict`.

        Raises:
            CheckpointError: missing, damaged, or another size than `name` (the message says which size it looks like).
        """
        config = named_size(LLAMAGEN_CONFIGS, name)
        state = load_state_dict(path, averaged=averaged)
        for key in ("tok_embeddings.weight", "output.weight"):
            if key not in state or state[key].ndim != 2:
                raise CheckpointError(f"{path}: no weight named {key}: not a LlamaGen generator's checkpoint")
        layers = 1 + max((int(found[1]) for found in map(LAYER.match, state) if found), default=-1)
        width = state["tok_embeddings.weight"].shape[1]
        captions = "cls_embedding.uncond_embedding" in state
        fitting = [
            size
            for size, c in LLAMAGEN_CONFIGS.items()
            if (c.layers, c.width) == (layers, width) and captions == (c.caption_tokens > 0)
        ]
        advice = f"pass --model {fitting[0]}" if fitting else "no known size fits it"
        if (layers, width) != (config.layers, config.width):
            raise CheckpointError(
                f"{path}: holds {layers} layers of width {width}, but --model {name} has {config.layers} of width "
                f"{config.width}: {advice}"
            )
        if config.caption_tokens and not captions:
            raise CheckpointError(f"{path}: is conditioned on classes, --model {name} on captions: {advice}")
        changes = {"vocab_size": state["tok_embeddings.weight"].shape[0]}
        if grid_size is not None:
            changes["grid_size"] = grid_size
        for key in ("cls_embedding.uncond_embedding", "cls_embedding.embedding_table.weight"):
            if key in state and state[key].ndim != 2:
                raise CheckpointError(f"{path}: {key} is {list(state[key].shape)}, expected a table")
        if captions:
            changes["caption_tokens"], changes["caption_width"] = state["cls_embedding.uncond_embedding"].shape
        elif "cls_embedding.embedding_table.weight" in state:
            rows = state["cls_embedding.embedding_table.weight"].shape[0]
            changes["has_unconditional"] = rows != config.num_classes
            changes["num_classes"] = rows - changes["has_unconditional"]
        with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
            model = cls(replace(config, **changes))
        load_into(model, state, path, hint=f"pass a whole checkpoint of a LlamaGen of size {name}")
        model.rotary = model.rotary_table()
        return model

    def rotary_table(self) -> Tensor:
        config = self.config
        return ops.rotary_2d_table(config.grid_size, config.head_width, config.prefix_len)

    def embed_condition(self, rows: Tensor) -> Tensor:
        return self.cls_embedding(rows)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return self.tok_embeddings(tokens)

    def token_table(self) -> Tensor:
        return self.tok_embeddings.weight

    @property
    def head(self) -> Head:
        return Head(self.output.weight)

    def unconditional(self, rows: Tensor) -> Tensor:
        """Class id num_classes, or the empty caption of the file; ValueError where there is no such class."""
        self.require_unconditional("this")
        if self.config.caption_tokens:
            return self.cls_embedding.uncond_embedding[-rows.shape[1] :].to(rows.dtype).expand_as(rows)
        return torch.full_like(rows, self.config.num_classes)

    def checked_condition(self, rows: Tensor, mask: Tensor | None) -> Condition:
        config, device = self.config, self.output.weight.device
        if not isinstance(rows, Tensor) or not isinstance(mask, Tensor | None):
            raise TypeError(f"a condition and its mask must be tensors, got {type(rows)} and {type(mask)}")
        if not config.caption_tokens:
            if rows.dtype != torch.int64 or rows.ndim != 1:
                raise ValueError(f"class ids must be an int64 tensor [B], got {rows.dtype} {list(rows.shape)}")
            if ((rows < 0) | (rows >= config.num_classes + config.has_unconditional)).any():
                raise ValueError(f"class ids must lie in 0…{config.num_classes - 1}, got {rows.tolist()[:8]}")
            if mask is not None:
                raise ValueError("condition_mask is for text-conditioned models, this one takes class ids")
            return Condition(rows.to(device))
        tokens, width = config.condition
        counts = range(1, tokens + 1) if mask is not None else (tokens,)
        if rows.ndim != 3 or rows.shape[1] not in counts or rows.shape[2] != width or not rows.is_floating_point():
            raise ValueError(
                f"caption features must be floating [B, {tokens}, {width}] for this model, got {rows.dtype} "
                f"{list(rows.shape)}"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != rows.shape[:2]):
            raise ValueError(f"condition_mask must be bool {list(rows.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
        if before := tokens - rows.shape[1]:  # left out where all captions are shorter
            rows, mask = F.pad(rows, (0, 0, before, 0)), F.pad(mask, (before, 0))
        return Condition(rows.to(device), None if mask is None else mask.to(device))
