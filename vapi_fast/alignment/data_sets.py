"""The images of a run, with what its generator is conditioned on: classes, or captions' features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vapi_fast.alignment.config import AlignConfig
from vapi_fast.data.caption_data import CaptionedData
from vapi_fast.data.dataset import ImageData
from vapi_fast.data.features import CachedFeatures, FeatureSource, FolderFeatures
from vapi_fast.data.hub import local_source
from vapi_fast.data.prompt_tokens import PromptTokens
from vapi_fast.models.sizes import Captions, Classes, Prompts
from vapi_fast.runtime.distributed import world_size
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.options import flag

if TYPE_CHECKING:
    from pathlib import Path

OF_FEATURES = ("text_encoder", "caption_cache", "caption_features", "short_caption_features")
OF_CAPTIONS = ("caption_column", *OF_FEATURES)


def open_data(
    config: AlignConfig,
    condition: Classes | Captions | Prompts,
    device: torch.device,
    *,
    held_out: bool = False,
    features: FeatureSource | None = None,
) -> ImageData | CaptionedData:
    """The images that are trained on, or the held-out ones of a measurement; all ranks call it.

    With captions the features of all that the run will read are made ready, those of the held-out images included: so
    the first call belongs before the generator comes to `device`; another one can go on with its `features`.
    Raises ConfigError for flags that do not go with the condition or with each other, DataError as the sets do.
    """
    if isinstance(condition, Classes):
        if given := [flag(name) for name in OF_CAPTIONS if getattr(config, name) is not None]:
            raise ConfigError(f"{given[0]}: this model is conditioned on classes, leave it out")
        source, split = source_of(config, held_out)
        options = {"num_classes": condition.count, "class_index": config.class_index, "held_out": held_out}
        return ImageData(source, config.image_size, split=split, **options)
    features = features or feature_source(config, condition, device)

    def opened(held_out: bool) -> CaptionedData:
        source, split = source_of(config, held_out)
        options = {"split": split, "held_out": held_out, "caption_column": config.caption_column}
        return CaptionedData(source, config.image_size, features=features, **options)

    data = opened(held_out)
    # A measurement's last step may reach past its images.
    measured = config.eval_samples + max(config.eval_batch, config.micro_batch) * world_size()
    foreseen = data.foreseen(measured, 0) if held_out else data.foreseen(config.batch_size * config.steps, config.seed)
    if config.evaluate and not held_out:
        foreseen += opened(held_out=True).foreseen(measured, 0)
    features.prepare(foreseen)
    return data


def source_of(config: AlignConfig, held_out: bool) -> tuple[Path, str | None]:
    source, split = (config.eval_data or config.data, None) if held_out else (config.data, config.split)
    return local_source(source, split, held_out, config.hub_rows)


def feature_source(config: AlignConfig, condition: Captions | Prompts, device: torch.device) -> FeatureSource:
    """The files that `config` names, or else the text encoder and its cache; of prompts the checkpoint's tokenizer."""
    if config.class_index is not None:
        raise ConfigError("--class-index: this model is conditioned on captions, leave it out")
    if isinstance(condition, Prompts):
        if given := [flag(name) for name in OF_FEATURES if getattr(config, name) is not None]:
            raise ConfigError(f"{given[0]}: this model reads captions by its own tokenizer, leave it out")
        if config.gpt_ckpt is None:
            raise ConfigError("--gpt-ckpt is required with --data: the tokenizer of its prompts lies beside it")
        tokens, _, bos, begin_image = condition
        return PromptTokens(config.gpt_ckpt, tokens, bos=bos, begin_image=begin_image)
    if config.caption_features is not None:
        if given := [flag(name) for name in ("text_encoder", "caption_cache") if getattr(config, name) is not None]:
            raise ConfigError(f"--caption-features and {given[0]}: features come of one of them, leave the other out")
        return FolderFeatures(
            config.caption_features, *condition, config.short_caption_features, config.short_caption_share
        )
    if config.short_caption_features is not None:
        raise ConfigError("--short-caption-features needs --caption-features, which they take the place of")
    return CachedFeatures(config.text_encoder, device, *condition, config.caption_cache)
