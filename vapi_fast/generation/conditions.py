"""What samples are drawn from: class ids, caption features of a text encoder, or prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vapi_fast.data.captions import Caption
from vapi_fast.data.features import CachedFeatures, FeatureSource
from vapi_fast.data.prompt_tokens import PromptTokens
from vapi_fast.data.text import padded
from vapi_fast.generation.config import GenerateConfig
from vapi_fast.models import Condition, Generator
from vapi_fast.models.sizes import Classes, Prompts
from vapi_fast.runtime.checkpoint import load_file_checked
from vapi_fast.runtime.errors import ConfigError

OF_ENCODER = ("text_encoder", "caption_cache")


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
    """Conditions of texts, image i of text i mod M: what `source` has of them, read when it is drawn from."""

    source: FeatureSource
    texts: Sequence[Caption]
    kind = "caption"
    masked = True

    def of(self, ids: Tensor, device: torch.device) -> Condition:
        picked = [self.source.states(self.texts[i]) for i in (ids % len(self.texts)).tolist()]
        rows, mask = padded(picked, self.source.tokens)
        return Condition(rows.to(device), mask.to(device))

    def numbers(self, count: int) -> Tensor:
        return torch.arange(count) % len(self.texts)


def read_conditions(config: GenerateConfig, generator: Generator, device: torch.device) -> Conditions | Texts:
    """What `config` names: class ids (default: all), caption features, or prompts, of which `device` encodes those
    that the cache lacks; all ranks call it.

    Of prompts the generator is fitted to the longest. Raises ConfigError where it takes another kind, and what reading
    them raises.
    """
    taken = generator.config.condition
    if isinstance(taken, Classes):
        return class_ids(config, taken.count)
    if isinstance(taken, Prompts):
        if given := config.given(*OF_ENCODER):
            raise ConfigError(f"{given[0]}: this model reads prompts by its own tokenizer, leave it out")
        if not config.texts:
            raise ConfigError("--prompt or --prompts is required: this model draws from prompts alone")
        tokens = PromptTokens(config.gpt_ckpt, taken.tokens, bos=taken.bos, begin_image=taken.begin_image)
        found = prepared(tokens, config)
        generator.fit_prefix(tokens.tokens)
        return found
    if config.texts:
        return prepared(CachedFeatures(config.text_encoder, device, *taken, config.caption_cache), config)
    if config.caption_features is None:
        raise ConfigError(
            "--prompt, --prompts or --caption-features is required: this checkpoint is conditioned on captions, "
            "not on classes"
        )
    if given := config.given(*OF_ENCODER):
        raise ConfigError(f"--caption-features and {given[0]}: features come of one of them, leave the other out")
    return read_captions(config.caption_features, *taken)


def prepared(source: FeatureSource, config: GenerateConfig) -> Texts:
    """The texts, once `source` has what it makes of them; raises ConfigError for one without words."""
    name = "--prompt" if config.prompts is None else f"--prompts {config.prompts}"
    for number, text in enumerate(config.texts, 1):
        if not source.takes(text):
            raise ConfigError(f"{name}: prompt {number}, {text[:80]!r}, has no words that can be drawn")
    found = Texts(source, [Caption(text, "", line) for line, text in enumerate(config.texts)])
    source.prepare(found.texts)
    if not source.width:  # token ids, which are not kept
        for text in found.texts:
            source.states(text)
    return found


def class_ids(config: GenerateConfig, count: int) -> Conditions:
    """Of a checkpoint of `count` classes."""
    if given := config.given("prompt", "prompts", "caption_features", *OF_ENCODER):
        raise ConfigError(f"{given[0]}: this checkpoint is conditioned on classes, pass --class-ids")
    unknown = [i for i in config.class_ids or () if not 0 <= i < count]
    if unknown:
        raise ConfigError(
            f"--class-ids: unknown class {', '.join(map(str, unknown[:5]))}, this checkpoint has 0-{count - 1}"
        )
    return Conditions(torch.tensor(config.class_ids or range(count)))


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
