"""Every `--model`: its tokenizer and perceptual network, its files, and what the commands do with it by default.

Nothing here imports torch: the command line takes its choices and defaults from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vapi_fast import tiny
from vapi_fast.models.sizes import LLAMAGEN_CONFIGS
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.options import PRESET, check, fill_in


@dataclass(frozen=True)
class Entry:
    """One model. `align`, `generate` and `evaluate`: the commands' defaults, by field.

    recipe: the default one of align's.
    generators: by image size, where `files` has none.
    recipes: where a recipe has other values for this model than for others.
    drawn: values of draws that `generate` has for this model, also for GenEval.
    geneval_prompts: what `--prompts geneval` are for it; None: GenEval's own.
    """

    tokenizer: str  # of `sizes.VQ_CONFIGS`
    lpips: str  # of `lpips.LPIPS_CONFIGS`
    image_size: int
    files: Mapping[str, Any]
    align: Mapping[str, Any]
    generate: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    recipe: str = "va-pi"
    generators: Mapping[int, str] = field(default_factory=dict)
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    drawn: Mapping[str, Any] = field(default_factory=dict)
    geneval_prompts: Path | None = None

    def preset(self, command: str, recipe: str | None = None, image_size: int | None = None) -> dict[str, Any]:
        """What a command's fields are by default; of `align`, under a recipe; the generator's file, at a size."""
        found = {"tokenizer": self.tokenizer, "lpips": self.lpips, "image_size": self.image_size}
        found |= {"gpt_ckpt": self.generators.get(image_size or self.image_size), **self.files}
        found |= getattr(self, command)
        if command == "align":
            recipe = recipe or self.recipe
            found |= {"recipe": recipe, **RECIPES[recipe], **self.recipes.get(recipe, {})}
        return found


# Values of align's options, by `--recipe`; they win over the model's. The first has all that a model does not decide.
LEAN: dict[str, Any] = {  # one forward an image without dropout: what the rollouts come of is what is learned from
    "group_size": 8,
    "rollouts": "teacher-forced",
    "rollout_cfg_scale": 1.0,
    "rollout_mode": "train",
    "dropout": 0.0,
    "label_dropout": 0.0,
    "reward": None,
    "mse_weight": 1.0,
    "lpips_weight": 1.0,
    "method": "vapi",
    "codes": "normalised",
    "advantage_eps": 1e-8,
    "advantage_clip": 5.0,
    "prior": "ce",
    "prior_weight": 0.1,
    "weight_decay": 1e-4,
    "beta2": 0.999,
}
DROPOUT = {"dropout": 0.1, "label_dropout": 0.1}  # LlamaGen's own, in training mode
JANUS_STEPS = {"batch_size": 64, "steps": 100, "lr": 1e-7, "noise_prob": 1.0}
RECIPES: dict[str, dict[str, Any]] = {
    "lean": LEAN,
    "va-pi": LEAN | DROPOUT | {"rollout_mode": "eval"},  # train_c2i_grpo_8gpu.sh: `--sample-model-mode train`
    "ste": LEAN  # train_c2i_ste.py
    | DROPOUT
    | {"method": "ste", "codes": "raw", "lpips_weight": 0.0, "prior_weight": 0.0}
    | {"lr": 1e-5, "weight_decay": 1e-2, "beta2": 0.95},
    "ar-grpo": LEAN  # run_c2i_train.sh of Kwai-Klear/AR-GRPO, without its MANIQA and Qwen2.5-VL
    | {"rollouts": "free", "rollout_cfg_scale": 2.0, "reward": "clip:5,clip-levels,hpsv2:5,hpsv2-levels"}
    | {"advantage_eps": 1e-4, "advantage_clip": 0.0, "prior": "kl"}
    | {"batch_size": 4, "steps": 400, "lr": 1e-5, "weight_decay": 0.0, "noise_prob": 0.0},
    # run_t2i_grpo_janus_deepspeed_16g_hf.sh, with each token scored by the state that predicts it
    "janus": LEAN | JANUS_STEPS,
}

# On Hugging Face's hub; the commits are those that other public projects pin as well.
LLAMAGEN = "hub:FoundationVision/LlamaGen@81e41139272c038412e4fe8f1c52a51ebbf95b8b"
LLAMAGEN_TEXT = "hub:peizesun/llamagen_t2i@276f5c5a3d915b922899a03f1912605531574747"
JANUS_PRO = {
    "janus-pro-1b": "hub:deepseek-ai/Janus-Pro-1B@960ab33191f61342a4c60ae74d8dc356a39fafcb",
    "janus-pro-7b": "hub:deepseek-ai/Janus-Pro-7B@5c3eb3fb2a3b61094328465ba61fcd4272090d67",
}
IMAGENET = "hub:ILSVRC/imagenet-1k"
SIZES = {"b": (256, 384), "l": (256, 384), "xl": (384,), "xxl": (384,), "3b": (384,)}  # in pixels, as released

# The user's, or downloaded.
NO_FILES = dict.fromkeys(("vq_ckpt", "vgg_weights", "text_encoder", "data", "eval_data", "reference"))
# The paper's recipe: 384², 128 images × G 8 a step, 100 steps, AdamW at 1e-6.
PAPER = Entry(
    tokenizer="vq-16",
    lpips="vgg16",
    image_size=384,
    files=NO_FILES | {"vq_ckpt": f"{LLAMAGEN}/vq_ds16_c2i.pt", "data": IMAGENET},
    align={
        "batch_size": 128,
        "micro_batch": 16,
        "steps": 100,
        "lr": 1e-6,
        "noise_prob": 0.0,
        "eval_samples": 50_000,
        "eval_batch": 64,
        "cfg_scale": 1.75,
    },
    generate={"num": 50_000},
    evaluate={"image_size": 256, "batch_size": 64},  # the ADM evaluator's ImageNet reference
)
# Text to image: 256², 200 steps around images half of whose tokens are noise; measured on COCO's 30 000 captions.
TEXT = replace(
    PAPER,
    image_size=256,
    files=NO_FILES | {"vq_ckpt": f"{LLAMAGEN_TEXT}/vq_ds16_t2i.pt"},
    generators={256: f"{LLAMAGEN_TEXT}/t2i_XL_stage1_256.pt", 512: f"{LLAMAGEN_TEXT}/t2i_XL_stage2_512.pt"},
    align={**PAPER.align, "steps": 200, "noise_prob": 0.5, "eval_samples": 30_000, "cfg_scale": 7.5},
    generate={"num": 30_000},
    recipes={"ar-grpo": {"batch_size": 8, "steps": 600, "rollout_cfg_scale": 4.0, "prior_weight": 1.0}},
)
# Janus-Pro: 384², 64 images a step, all of whose context is noise; LPIPS on AlexNet, the pip package's default.
JANUS = replace(
    PAPER,
    lpips="alex",
    files=NO_FILES,
    align={**PAPER.align, **JANUS_STEPS, "eval_samples": 30_000, "cfg_scale": 5.0},
    generate={"num": 30_000},
    recipe="janus",
    recipes=TEXT.recipes,
    drawn={"top_k": 0, "cfg_scale": 5.0},
)
TINY = Entry(
    tokenizer="tiny",
    lpips="tiny",
    image_size=tiny.IMAGE_SIZE,
    files={
        "vq_ckpt": tiny.FILES.tokenizer,
        "gpt_ckpt": tiny.FILES.generator,
        "vgg_weights": tiny.FILES.perceptual,
        "text_encoder": None,
        "data": tiny.FILES.train_images,
        "eval_data": tiny.FILES.heldout_images,
        "reference": tiny.FILES.heldout_images,
    },
    align={
        "batch_size": 32,
        "micro_batch": 32,
        "steps": 30,
        "lr": 2e-5,
        "noise_prob": 0.0,
        "eval_samples": 2000,
        "eval_batch": 250,
        "cfg_scale": 1.5,
    },
    generate={"num": 1000},
    evaluate={"batch_size": 250},
    recipe="lean",  # a forward less, and nothing but the reward raises the reward: docs/ablations.md
)
# Captions of scenes, each held-out one drawn four times; around images as they are: noise only harms here
# (docs/ablations.md).
TINY_TEXT = replace(
    TINY,
    tokenizer="scenes",
    lpips="scenes",
    files={
        "vq_ckpt": tiny.TEXT_FILES.tokenizer,
        "gpt_ckpt": tiny.TEXT_FILES.generator,
        "vgg_weights": tiny.TEXT_FILES.perceptual,
        "text_encoder": str(tiny.TEXT_FILES.words),
        "data": tiny.TEXT_FILES.train_images,
        "eval_data": tiny.TEXT_FILES.heldout_images,
        "reference": tiny.TEXT_FILES.heldout_images,
    },
    align={**TINY.align, "steps": 80, "lr": 4e-5, "eval_samples": 1124, "eval_batch": 281, "cfg_scale": 2.0},
    drawn={"cfg_scale": 2.0, "top_k": 0},
    geneval_prompts=tiny.TEXT_FILES.prompts,
)
# The same scenes by prompts, as Janus-Pro takes them.
TINY_JANUS = replace(
    TINY_TEXT,
    files={**TINY_TEXT.files, "gpt_ckpt": tiny.TEXT_FILES.janus, "text_encoder": None},
    recipe="janus",
    recipes={"janus": {"batch_size": 32, "steps": 15, "lr": 4e-5, "noise_prob": 0.0}},
)

CATALOG: dict[str, Entry] = {
    name: replace(PAPER, generators={side: f"{LLAMAGEN}/c2i_{name.upper()}_{side}.pt" for side in SIZES.get(name, ())})
    for name in LLAMAGEN_CONFIGS
} | {"t2i-xl": TEXT, "tiny": TINY, "tiny-text": TINY_TEXT, "tiny-janus": TINY_JANUS}
CATALOG |= {
    name: replace(JANUS, files=NO_FILES | {"gpt_ckpt": folder, "vq_ckpt": folder}) for name, folder in JANUS_PRO.items()
}


def entry(name: str) -> Entry:
    """The entry of `--model NAME`, in any case; raises ConfigError for another."""
    if str(name).lower() not in CATALOG:
        raise ConfigError(f"--model {name}: unknown, choose one of {', '.join(CATALOG)}")
    return CATALOG[str(name).lower()]


def prepare(config: Any, command: str) -> None:
    """Fill in what a configuration leaves to its model and recipe, and check its ranges; raises ConfigError."""
    found, recipe = entry(config.model), getattr(config, "recipe", PRESET)
    if recipe is not PRESET and str(recipe) not in RECIPES:
        raise ConfigError(f"--recipe {recipe}: unknown, choose one of {', '.join(RECIPES)}")
    object.__setattr__(config, "model", config.model.lower())
    side = getattr(config, "image_size", None)
    side = side if isinstance(side, int) else None
    fill_in(config, found.preset(command, None if recipe is PRESET else recipe, side))
    check(config)


def presets(command: str) -> dict[str, dict[str, Any]]:
    """A command's defaults by model; none of a command that has no model."""
    return {name: entry.preset(command) for name, entry in CATALOG.items() if hasattr(entry, command)}
