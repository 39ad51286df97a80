"""The models of a run: read from their files, or with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.image_text import ImageTextReward
from vapi_fast.alignment.recordings import Recordings
from vapi_fast.alignment.reward import PixelReward
from vapi_fast.models import LPIPS, Generator, VQTokenizer
from vapi_fast.models.families import (
    check_vocabulary,
    generator_config,
    load_generator,
    random_generator,
    require_unconditional,
)
from vapi_fast.models.frozen import PixelCodec
from vapi_fast.models.lora import train_only
from vapi_fast.models.lpips import LPIPS_CONFIGS
from vapi_fast.models.sizes import Captions
from vapi_fast.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Models:
    """What a step works with. `generator` is trained, the rest is frozen; `base` is a copy of its start, if needed."""

    generator: Generator
    tokenizer: VQTokenizer
    reward: PixelReward
    base: Generator | None = None
    networks: Mapping[str, ImageTextReward] = field(default_factory=dict)  # that `--reward` needs, by name
    caption_of: Callable[[int], str] | None = None  # of an image's label, where that is none of a class
    recordings: Recordings = field(default_factory=Recordings)  # of the generator's micro-batches

    @property
    def codec(self) -> PixelCodec:
        """Images → tokens → images, as the rewards are computed with."""
        return self.reward.codec


def load_models(
    config: AlignConfig, device: torch.device, reward_chunk: int | None = None, prefix: int | None = None
) -> Models:
    """Load the checkpoints that `config` names; raises CheckpointError when one does not fit.

    reward_chunk: rollouts to decode at once; None: by the image size. prefix: positions of the longest condition,
    where it is known.
    """
    generator, tokenizer, lpips = random_models(config, device) if config.random_init else read_models(config)
    for module in (tokenizer, lpips):
        module.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    taken, expected = generator.config.condition, generator_config(config.model).condition
    if type(taken) is not type(expected):
        raise CheckpointError(
            f"{config.gpt_ckpt} is conditioned on captions, --model {config.model} on classes: pass --model t2i-xl and "
            "captioned images, or a class-conditional checkpoint"
        )
    if isinstance(taken, Captions) and taken != expected:
        raise CheckpointError(
            f"{config.gpt_ckpt} takes captions of {taken.tokens} × {taken.width} numbers, and --model {config.model} "
            f"those of {expected.tokens} × {expected.width}: pass a checkpoint of LlamaGen's text model"
        )
    if prefix is not None:
        generator.fit_prefix(prefix)
    generator.to(device)
    base = frozen_copy(generator) if config.prior == "kl" else None
    train_only(generator, config.train, config.lora_rank, config.seed)
    dtype = getattr(torch, {"fp8": "float8_e4m3fn"}.get(name, name)) if (name := config.reward_dtype) else None
    reward = PixelReward(tokenizer, lpips, config.mse_weight, config.lpips_weight, reward_chunk, dtype)
    return Models(generator.train(), tokenizer, reward, base)


def frozen_copy(generator: Generator) -> Generator:
    """The generator as it is now, on a GPU in bf16, which it computes in; the released script casts it too."""
    base = copy.deepcopy(generator).eval().requires_grad_(False)
    if next(base.parameters()).is_cuda:
        base.to(torch.bfloat16)
        base.rotary = generator.rotary
    return base


def read_models(config: AlignConfig) -> tuple[Generator, VQTokenizer, LPIPS]:
    """The files that may be wrong come first: what LPIPS needs may have to be downloaded."""
    tokenizer = VQTokenizer.from_checkpoint(config.vq_ckpt, config.tokenizer)
    generator = load_generator(config.gpt_ckpt, config.model, grid_size=config.grid_size, averaged=config.ema)
    check_vocabulary(generator, config.gpt_ckpt, tokenizer, config.vq_ckpt)
    if config.rollout_cfg_scale > 1:
        require_unconditional(generator, config.gpt_ckpt, "--rollout-cfg-scale", "pass --rollout-cfg-scale 1")
    if config.label_dropout:
        require_unconditional(generator, config.gpt_ckpt, "--label-dropout", "pass --label-dropout 0")
    if config.evaluate and config.cfg_scale > 1:
        advice = "pass --cfg-scale 1, and there is no second evaluation"
        require_unconditional(generator, config.gpt_ckpt, "the second evaluation's guidance (--cfg-scale)", advice)
    if config.vgg_weights is None:
        lpips = LPIPS.from_name(config.lpips)
    else:
        lpips = LPIPS.from_checkpoint(config.vgg_weights, config.lpips)
    return generator, tokenizer, lpips


def random_models(config: AlignConfig, device: torch.device) -> tuple[Generator, VQTokenizer, LPIPS]:
    """Untrained models of the right sizes, the same on every rank."""
    torch.manual_seed(config.seed)
    with device:  # a GPU draws 1.4 billion weights at once
        generator = random_generator(replace(generator_config(config.model), grid_size=config.grid_size))
        return generator, VQTokenizer.from_name(config.tokenizer), LPIPS(LPIPS_CONFIGS[config.lpips])
