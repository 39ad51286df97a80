"""What samples are drawn from: class ids, caption features of a text encoder, or prompts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vapi_fast.data.features import checked_encoder
from vapi_fast.data.prompt_tokens import PromptTokens
from vapi_fast.data.text import cleaned, padded
from vapi_fast.generation.config import GenerateConfig
from vapi_fast.models import Condition, Generator
from vapi_fast.models.sizes import Captions, Prompts
from vapi_fast.runtime.checkpoint import load_file_checked
from vapi_fast.runtime.errors import ConfigError


@dataclass(frozen=True)
class Conditions:
    """What each image is drawn from: image i has row i mod M of `rows`, as `Condition` says."""

    rows: Tensor
    mask: Tensor | None = None

    def of(self, ids: Tensor, device: torch.device) -> Condition:
        picked = ids % len(self.rows)
        return Condition(self.rows[picked].to(device), None if self.mask is None else self.mask[picked].to(device))

    @property
    def kind(self) -> str:
        return "caption" if self.rows.ndim > 1 else "class"

    @property
    def masked(self) -> bool:
        return self.mask is not None

    def numbers(self, count: int) -> Tensor:
        """Class id, or row of the caption, of images 0 … count − 1: int64 `[count]`."""
        numbers = torch.arange(len(self.rows)) if self.kind == "caption" else self.rows
        return numbers[torch.arange(count) % len(numbers)]


@dataclass(frozen=True)
class Texts:
    """Conditions of encoded texts, or of prompts, kept without padding: thirty thousand fit into memory."""

    states: list[Tensor]  # [n,width], or token ids [n], n ≤ tokens
    tokens: int
    kind = "caption"
    masked = True

    def of(self, ids: Tensor, device: torch.device) -> Condition:
        picked = [self.states[i] for i in (ids % len(self.states)).tolist()]
        rows, mask = padded(picked, self.tokens)
        return Condition(rows.to(device), mask.to(device))

    def numbers(self, count: int) -> Tensor:
        return torch.arange(count) % len(self.states)


def read_conditions(config: GenerateConfig, generator: Generator, device: torch.device) -> Conditions | Texts:
    """What `config` names: class ids (default: all), caption features, or prompts, which `device` encodes.

    Of prompts the generator is fitted to the longest. Raises ConfigError where it takes another kind, and what reading
    them raises.
    """
    taken = generator.config.condition
    if isinstance(taken, Prompts):
        found = read_prompt_tokens(config, taken)
        generator.fit_prefix(found.tokens)
        return found
    if isinstance(taken, Captions):
        if config.texts:
            return encoded(config.texts, config.text_encoder, device, *taken)
        if config.caption_features is None:
            raise ConfigError(
                "--prompt, --prompts or --caption-features is required: this checkpoint is conditioned on captions, "
                "not on classes"
            )
        return read_captions(config.caption_features, *taken)
    if config.texts or config.caption_features is not None:
        kind = "--caption-features" if config.caption_features else "--prompt" if config.prompt else "--prompts"
        raise ConfigError(f"{kind}: this checkpoint is conditioned on classes, pass --class-ids")
    unknown = [i for i in config.class_ids or () if not 0 <= i < taken.count]
    if unknown:
        raise ConfigError(
            f"--class-ids: unknown class {', '.join(map(str, unknown[:5]))}, this checkpoint has 0-{taken.count - 1}"
        )
    return Conditions(torch.tensor(config.class_ids or range(taken.count)))


@lru_cache(maxsize=1)  # two generators that are compared have the same texts
def encoded(texts: tuple[str, ...], source: str | None, device: torch.device, tokens: int, width: int) -> Texts:
    """Features of texts by the encoder `source`, which leaves the device's memory again."""
    states = checked_encoder(source, device, width).states([cleaned(text) for text in texts], tokens)
    return Texts([each.clone() for each in states], tokens)  # a view would keep its batch's padding


def read_prompt_tokens(config: GenerateConfig, taken: Prompts) -> Texts:
    """Token ids of the prompts, by the tokenizer beside the checkpoint."""
    if config.text_encoder is not None:
        raise ConfigError("--text-encoder: this model reads prompts by its own tokenizer, leave it out")
    if not config.texts:
        raise ConfigError("--prompt or --prompts is required: this model draws from prompts alone")
    tokens = PromptTokens(config.gpt_ckpt, taken.tokens, bos=taken.bos, begin_image=taken.begin_image)
    ids = [tokens.ids(text) for text in config.texts]
    return Texts(ids, max(map(len, ids)))


def read_captions(path: Path, tokens: int, width: int) -> Conditions:
    """Text-encoder features `[M,tokens,width]`: a `.npy` file, or a `.safetensors` file with `features` and, for
    captions with padding, `mask` `[M,tokens]` (0 at padding)."""
    if path.suffix == ".safetensors":
        state = load_file_checked(path)
        features, mask = state.get("features"), state.get("mask")
        if features is None:
            raise ConfigError(f"--caption-features {path}: has no tensor `features`, only {', '.join(state) or 'none'}")
    else:
        try:
            features, mask = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)), None
        except Exception as error:  # NumPy has no one kind for what is damaged
            raise ConfigError(f"--caption-features {path}: cannot be read as a .npy array ({error})") from error
    if features.ndim != 3 or features.shape[1:] != (tokens, width) or not len(features):
        raise ConfigError(
            f"--caption-features {path}: is {list(features.shape)}, this checkpoint takes [N, {tokens}, {width}]"
        )
    # After the cast: float64 has numbers that float32 has not.
    if not features.is_floating_point() or not (features := features.float()).isfinite().all():
        raise ConfigError(f"--caption-features {path}: expected finite floating-point numbers")
    if mask is not None and mask.shape != features.shape[:2]:
        raise ConfigError(f"--caption-features {path}: mask is {list(mask.shape)}, expected {list(features.shape[:2])}")
    return Conditions(features, None if mask is None else mask.bool())
