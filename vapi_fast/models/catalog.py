"""Every `--model`: its tokenizer and perceptual network, its files, and what the commands do with it by default.

Nothing here imports torch: the command line takes its choices and defaults from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vapi_fast import tiny
from vapi_fast.models.sizes import LLAMAGEN_CONFIGS
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.options import check, fill_in


@dataclass(frozen=True)
class Entry:
    """One model. `align`, `generate` and `evaluate`: the commands' defaults, by field."""

    tokenizer: str  # of `sizes.VQ_CONFIGS`
    lpips: str  # of `lpips.LPIPS_CONFIGS`
    image_size: int
    files: Mapping[str, Any]
    align: Mapping[str, Any]
    generate: Mapping[str, Any]
    evaluate: Mapping[str, Any]

    def preset(self, command: str) -> dict[str, Any]:
        """What a command's fields are by default."""
        common = {"tokenizer": self.tokenizer, "lpips": self.lpips, "image_size": self.image_size, **self.files}
        return common | getattr(self, command)


NO_FILES = dict.fromkeys(("vq_ckpt", "gpt_ckpt", "vgg_weights", "data", "eval_data", "reference"))  # the user's
# The paper's recipe: 384², 128 images × G 8 a step, 100 steps, AdamW at 1e-6.
PAPER = Entry(
    tokenizer="vq-16",
    lpips="vgg16",
    image_size=384,
    files=NO_FILES,
    align={
        "batch_size": 128,
        "micro_batch": 16,
        "steps": 100,
        "lr": 1e-6,
        "eval_samples": 50_000,
        "eval_batch": 64,
        "cfg_scale": 1.75,
    },
    generate={"num": 50_000},
    evaluate={"image_size": 256, "batch_size": 64},  # the ADM evaluator's ImageNet reference
)
TINY = Entry(
    tokenizer="tiny",
    lpips="tiny",
    image_size=tiny.IMAGE_SIZE,
    files={
        "vq_ckpt": tiny.FILES.tokenizer,
        "gpt_ckpt": tiny.FILES.generator,
        "vgg_weights": tiny.FILES.perceptual,
        "data": tiny.FILES.train_images,
        "eval_data": tiny.FILES.heldout_images,
        "reference": tiny.FILES.heldout_images,
    },
    align={
        "batch_size": 32,
        "micro_batch": 32,
        "steps": 30,
        "lr": 2e-5,
        "eval_samples": 2000,
        "eval_batch": 250,
        "cfg_scale": 1.5,
    },
    generate={"num": 1000},
    evaluate={"batch_size": 250},
)

CATALOG: dict[str, Entry] = {name: TINY if name == "tiny" else PAPER for name in LLAMAGEN_CONFIGS}


def entry(name: str) -> Entry:
    """The entry of `--model NAME`, in any case; raises ConfigError for another."""
    if str(name).lower() not in CATALOG:
        raise ConfigError(f"--model {name}: unknown, choose one of {', '.join(CATALOG)}")
    return CATALOG[str(name).lower()]


def prepare(config: Any, command: str) -> None:
    """Fill in what a command's configuration leaves to its model, and check its ranges; raises ConfigError."""
    found = entry(config.model)
    object.__setattr__(config, "model", config.model.lower())
    fill_in(config, found.preset(command))
    check(config)


def presets(command: str) -> dict[str, dict[str, Any]]:
    """A command's defaults by model."""
    return {name: entry.preset(command) for name, entry in CATALOG.items()}
