"""The images of a run, with what its generator is conditioned on: classes, or captions' features."""

from __future__ import annotations

from pathlib import Path

import torch

from vapi_fast.alignment.config import AlignConfig
from vapi_fast.data.caption_data import CaptionedData
from vapi_fast.data.dataset import ImageData
from vapi_fast.data.features import CachedFeatures, FeatureSource, FolderFeatures
from vapi_fast.data.hub import is_here, local_source
from vapi_fast.data.prompt_tokens import PromptTokens
from vapi_fast.data.text import encoder_to_fetch
from vapi_fast.evaluation.inception import INCEPTION_URL
from vapi_fast.models.families import generator_config
from vapi_fast.models.lpips import PUBLISHED
from vapi_fast.models.sizes import Captions, Classes, Prompts
from vapi_fast.runtime.distributed import world_size
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.hub import local_path, look_up
from vapi_fast.runtime.options import flag

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
    check_flags(config, condition)
    if isinstance(condition, Classes):
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


def fetch_inputs(config: AlignConfig) -> None:
    """Fetch the images and checkpoints that the run reads of Hugging Face's hub, images first: their terms come late.

    Raises ConfigError where a flag does not go with the model, before anything is fetched; DataError and
    CheckpointError, in one line, for what cannot be had.
    """
    if not config.synthetic_data:
        check_flags(config, generator_config(config.model).condition)
    parts = () if config.synthetic_data else (False, True) if config.evaluate else (False,)
    data = [split_of(config, held_out) for held_out in parts]
    sources = {flag(name): path for name, path in config.hub_checkpoints.items()}
    otherwise = "; or, to time the model alone, leave files and images to --random-init --synthetic-data"
    if not all(is_here(*each) for each in data):
        otherwise = f", and images in class folders, or as docs/captions.md says, with --data FOLDER{otherwise}"
    look_up(sources, missing_downloads(config) if sources else {}, otherwise)
    for each in data:
        local_source(*each)
    for path in sources.values():
        local_path(path)


def missing_downloads(config: AlignConfig) -> dict[str, str]:
    """What else the run would have to download: addresses by flag."""
    wanted = {}
    if config.lpips in PUBLISHED and config.vgg_weights is None and not config.random_init:
        wanted["--vgg-weights FILE"] = PUBLISHED[config.lpips].url
    if config.lpips in PUBLISHED and config.inception_weights is None and config.evaluate:
        wanted["--inception-weights FILE"] = INCEPTION_URL
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = {name: url for name, url in wanted.items() if not (folder / url.rpartition("/")[2]).exists()}
    encodes = isinstance(generator_config(config.model).condition, Captions) and config.caption_features is None
    return found | (encoder_to_fetch(config.text_encoder) if encodes and not config.synthetic_data else {})


def source_of(config: AlignConfig, held_out: bool) -> tuple[Path, str | None]:
    return local_source(*split_of(config, held_out))


def split_of(config: AlignConfig, held_out: bool) -> tuple[Path, str | None, bool, int]:
    """Where the images are, which split of them, and how many rows of a data set on the hub."""
    source, split = (config.eval_data or config.data, None) if held_out else (config.data, config.split)
    return source, split, held_out, config.rows(held_out)


def check_flags(config: AlignConfig, condition: Classes | Captions | Prompts) -> None:
    """Raise ConfigError for a flag that does not go with what the generator is conditioned on."""
    if isinstance(condition, Classes):
        if given := config.given(*OF_CAPTIONS):
            raise ConfigError(f"{given[0]}: this model is conditioned on classes, leave it out")
        return
    if config.class_index is not None:
        raise ConfigError("--class-index: this model is conditioned on captions, leave it out")
    given = config.given(*OF_FEATURES)
    if isinstance(condition, Prompts):
        if given:
            raise ConfigError(f"{given[0]}: this model reads captions by its own tokenizer, leave it out")
        return
    given = [name for name in given if name in ("--text-encoder", "--caption-cache")]
    if config.caption_features is not None and given:
        raise ConfigError(f"--caption-features and {given[0]}: features come of one of them, leave the other out")
    if config.caption_features is None and config.short_caption_features is not None:
        raise ConfigError("--short-caption-features needs --caption-features, which they take the place of")


def feature_source(config: AlignConfig, condition: Captions | Prompts, device: torch.device) -> FeatureSource:
    """The files that `config` names, or else the text encoder and its cache; of prompts the checkpoint's tokenizer."""
    if isinstance(condition, Prompts):
        if config.gpt_ckpt is None:
            raise ConfigError("--gpt-ckpt is required with --data: the tokenizer of its prompts lies beside it")
        tokens, _, bos, begin_image = condition
        return PromptTokens(config.gpt_ckpt, tokens, bos=bos, begin_image=begin_image)
    if config.caption_features is not None:
        return FolderFeatures(
            config.caption_features, *condition, config.short_caption_features, config.short_caption_share
        )
    return CachedFeatures(config.text_encoder, device, *condition, config.caption_cache)
