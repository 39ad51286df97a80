"""Janus-Pro: a language model that draws images after a prompt, through an image aligner and a head of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast.models import janus_files
from vapi_fast.models.sizes import JANUS_CONFIGS, JanusConfig, named_size
from vapi_fast.runtime.checkpoint import load_into, save_generator

from .transformer import Block, Condition, Generator, Head, RMSNorm


class ImageAligner(nn.Module):
    """A code's embedding → a state of the language model."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        width = config.width
        self.layers = nn.Sequential(nn.Linear(config.code_width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(codes)


class ImageHead(nn.Module):
    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.output_mlp_projector = nn.Linear(config.width, config.width)
        self.vision_head = nn.Linear(config.width, config.vocab_size)


class Janus(Generator):
    """The parts of Janus-Pro that draw an image. Of its prompt's positions the last, `<begin_of_image>`, is position 0.

    Rotary positions are relative, so that a prompt gives the same behind any padding; queries and keys have their pairs
    side by side, as `ops.rotary_2d` takes them, where the files have halves (`janus_files`).
    """

    sizes = JANUS_CONFIGS
    config: JanusConfig

    def __init__(self, config: JanusConfig) -> None:
        super().__init__(config)
        self.text_embeddings = nn.Embedding(config.text_vocab, config.width)
        self.gen_embed = nn.Embedding(config.vocab_size, config.code_width)
        self.gen_aligner = ImageAligner(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.gen_head = ImageHead(config)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, name: str, *, grid_size: int | None = None, averaged: bool = False
    ) -> Janus:
        """The model `name` with the weights at `path`, a file or folder as `janus_files.load_weights` reads it.

        Args:
            grid_size: tokens a side (image size / 16), default the named size's; not stored in checkpoints.
            averaged: as of `load_state_dict`.

        Raises:
            CheckpointError: missing, damaged, of another kind or size than `name` (the message says which it is).
        """
        config = named_size(JANUS_CONFIGS, name)
        state, changes = janus_files.load_weights(path, name, averaged=averaged)
        if grid_size is not None:
            changes["grid_size"] = grid_size
        with torch.device("meta"):
            model = cls(replace(config, **changes))
        load_into(model, state, path, hint=f"pass a whole checkpoint of {name}")
        model.rotary = model.rotary_table()
        return model

    def rotary_table(self) -> Tensor:
        config = self.config
        half, before = config.head_width // 2, config.prefix_len - 1
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        positions = torch.arange(-before, config.grid_size**2 + 1)
        angles = positions[:, None] * frequencies
        return torch.stack([angles.cos(), angles.sin()], dim=-1).float()

    def language_head(self, source: Path) -> Tensor | None:
        return janus_files.language_head(source)

    def text_states(self, ids: Tensor) -> Tensor:
        return self.norm(*self.blocks(self.text_embeddings(ids), self.rotary[: ids.shape[1]]))

    def save(self, folder: Path, weights: dict[str, Tensor], source: Path | None) -> None:
        """A folder `aligned` with all files of `source`, in its layout; of random weights the generator's alone."""
        if source is not None:
            changed = {name: weights[name] for name in self.trained_names()}
            janus_files.save_weights(folder / "aligned", source, changed, self.config)
        else:
            found = janus_files.to_file(weights, janus_files.ORIGINAL, self.config)
            save_generator(folder / "aligned" / "pytorch_model.bin", found)

    def fit_prefix(self, tokens: int) -> None:
        self.config = self.config.fitted(tokens)
        self.rotary = self.rotary_table().to(self.rotary.device)

    def embed_condition(self, rows: Tensor) -> Tensor:
        return self.text_embeddings(rows)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return self.gen_aligner(self.gen_embed(tokens))

    @property
    def entry(self) -> nn.Module:
        return self.gen_aligner

    @property
    def readout(self) -> nn.Module:
        return nn.Sequential(self.gen_head.output_mlp_projector, nn.GELU())

    @property
    def head(self) -> Head:
        return Head(self.gen_head.vision_head.weight, self.gen_head.vision_head.bias)

    def unconditional(self, rows: Tensor) -> Tensor:
        """All between a prompt's BOS and its `<begin_of_image>` becomes padding that is seen, as in Janus."""
        begins = rows == self.config.bos
        begins[:, :-1] &= ~begins[:, 1:]  # what lies before a prompt may look like BOS, too
        keep = begins & (begins.cumsum(1) == 1)
        keep[:, -1] = True
        return rows.where(keep, self.config.pad)

    def checked_condition(self, rows: Tensor, mask: Tensor | None) -> Condition:
        tokens, vocabulary, *_ = self.config.condition
        if not isinstance(rows, Tensor) or not isinstance(mask, Tensor | None):
            raise TypeError(f"a condition and its mask must be tensors, got {type(rows)} and {type(mask)}")
        counts = range(1, tokens + 1) if mask is not None else (tokens,)
        if rows.dtype != torch.int64 or rows.ndim != 2 or rows.shape[1] not in counts:
            raise ValueError(f"prompts must be int64 [B, {tokens}] for this model, got {rows.dtype} {list(rows.shape)}")
        if ((rows < 0) | (rows >= vocabulary)).any():
            raise ValueError(f"a prompt's tokens must lie in 0…{vocabulary - 1}, got {rows.flatten().tolist()[:8]}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != rows.shape):
            raise ValueError(f"condition_mask must be bool {list(rows.shape)}, got {mask.dtype} {list(mask.shape)}")
        if before := tokens - rows.shape[1]:  # left out where all prompts are shorter
            rows, mask = F.pad(rows, (before, 0)), F.pad(mask, (before, 0))
        device = self.head.weight.device
        return Condition(rows.to(device), None if mask is None else mask.to(device))
