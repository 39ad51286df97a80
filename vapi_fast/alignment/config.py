"""What an alignment run does: one frozen dataclass, validated once, and the presets that its defaults come from."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapi_fast import tiny
from vapi_fast.models.sizes import LLAMAGEN_CONFIGS, VQ_CONFIGS
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.flags import flag

METHODS = ("vapi", "ste", "ntp")
PRIORS = ("ce", "kl")
PATHS = ("fast", "reference", "both")
ROLLOUTS = ("teacher-forced", "free")

# The paper's recipe (PAPER: 384², 128 images × G 8 a step, 100 steps, AdamW lr 1e-6); every model but tiny.
PAPER: dict[str, Any] = {
    "tokenizer": "vq-16",
    "lpips": "vgg16",
    "vq_ckpt": None,
    "gpt_ckpt": None,
    "vgg_weights": None,
    "data": None,
    "eval_data": None,
    "image_size": 384,
    "batch_size": 128,
    "micro_batch": 16,
    "lr": 1e-6,
    "noise_prob": 0.0,
    "eval_samples": 50_000,
    "eval_batch": 64,
    "cfg_scale": 1.75,
}

TINY: dict[str, Any] = {
    "tokenizer": "tiny",
    "lpips": "tiny",
    "vq_ckpt": tiny.FILES.tokenizer,
    "gpt_ckpt": tiny.FILES.generator,
    "vgg_weights": tiny.FILES.perceptual,
    "data": tiny.FILES.train_images,
    "eval_data": tiny.FILES.heldout_images,
    "image_size": tiny.IMAGE_SIZE,
    "batch_size": 32,
    "micro_batch": 32,
    "lr": 2e-5,
    "noise_prob": 0.0,
    "eval_samples": 2000,
    "eval_batch": 250,
    "cfg_scale": 1.5,
}


PRESET: Any = ...  # default of a field whose value the model's preset decides


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """One alignment run. Fields left out take the paper's value, or the tiny preset's for `model="tiny"`.

    Raises:
        ConfigError: a field out of range, a missing file, or fields that contradict each other.
    """

    model: str = "xxl"
    tokenizer: str = PRESET
    lpips: str = PRESET
    vq_ckpt: Path | None = PRESET
    gpt_ckpt: Path | None = PRESET
    vgg_weights: Path | None = PRESET  # None: download
    data: Path | None = PRESET
    eval_data: Path | None = PRESET  # None: `data`
    inception_weights: Path | None = None  # None: download
    image_size: int = PRESET
    batch_size: int = PRESET  # images a step, over all ranks
    group_size: int = 8
    steps: int = 100
    micro_batch: int = PRESET  # images in one forward on one rank
    lr: float = PRESET
    weight_decay: float = 1e-4
    clip_grad_norm: float = 1.0
    method: str = "vapi"
    rollouts: str = "teacher-forced"
    reward: str | None = None  # module:function; None: the pixels' distance from the image
    prior: str = "ce"
    prior_weight: float = 0.1
    mse_weight: float = 1.0
    lpips_weight: float = 1.0
    clip_range: float = 0.2
    noise_prob: float = PRESET
    dropout: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    output_dir: Path = dataclasses.field(default=Path(""))  # "": runs/<model>-<method>-<time>
    checkpoint_every: int = 50
    eval_samples: int = PRESET
    eval_batch: int = PRESET  # images drawn at once
    cfg_scale: float = PRESET  # of the evaluation with classifier-free guidance
    evaluate: bool = True
    path: str = "fast"
    random_init: bool = False
    synthetic_data: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", self.model.lower())
        if self.model not in LLAMAGEN_CONFIGS:
            raise ConfigError(f"--model {self.model}: unknown, choose one of {', '.join(LLAMAGEN_CONFIGS)}")
        preset = TINY if self.model == "tiny" else PAPER
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is PRESET:
                value = preset[field.name]
            if isinstance(value, str) and "Path" in str(field.type):
                value = Path(value)
            object.__setattr__(self, field.name, value)
        if self.random_init or self.synthetic_data:  # samples of an untrained generator, or no images to hold them to
            object.__setattr__(self, "evaluate", False)
        if self.output_dir == Path(""):
            name = f"{self.model}-{self.method}-{time.strftime('%Y%m%d-%H%M%S')}"
            object.__setattr__(self, "output_dir", Path("runs") / name)
        self.check_ranges()
        self.check_combinations()
        self.check_files()

    def check_ranges(self) -> None:
        positive = ("image_size", "batch_size", "group_size", "steps", "micro_batch", "checkpoint_every", "eval_batch")
        bounds = {name: (1, float("inf")) for name in positive}
        bounds |= {name: (0, float("inf")) for name in ("prior_weight", "mse_weight", "lpips_weight", "weight_decay")}
        bounds |= {"top_k": (0, float("inf")), "noise_prob": (0, 1), "cfg_scale": (1, float("inf"))}
        bounds |= {"lr": (0, float("inf")), "eval_samples": (2, float("inf")), "seed": (0, 2**63 - 1)}
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                limits = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
                raise ConfigError(f"{flag(name)} must be {limits}, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ConfigError(f"--temperature must be greater than 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p must be greater than 0 and at most 1, got {self.top_p}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout must be at least 0 and less than 1, got {self.dropout}")
        for name, choices in (("method", METHODS), ("prior", PRIORS), ("path", PATHS), ("rollouts", ROLLOUTS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: choose one of {', '.join(choices)}")

    def check_combinations(self) -> None:
        downsample = VQ_CONFIGS[self.tokenizer].downsample
        if self.image_size % downsample:
            raise ConfigError(f"--image-size must be a multiple of {downsample}, got {self.image_size}")
        if self.method == "vapi" and self.group_size < 2:
            raise ConfigError("--group-size must be at least 2: advantages compare the rollouts of one image")
        if self.method == "vapi" and self.mse_weight == self.lpips_weight == 0 and self.prior_weight == 0:
            raise ConfigError("nothing to optimise: --mse-weight, --lpips-weight and --prior-weight are all 0")
        if self.prior == "kl" and self.method != "vapi":
            raise ConfigError(f"--prior kl needs --method vapi: --method {self.method} has no sampled tokens")
        if self.method != "vapi" and (self.rollouts == "free" or self.reward):
            raise ConfigError(
                f"--rollouts free and --reward need --method vapi: --method {self.method} has no rollouts"
            )
        if self.rollouts == "free" and self.noise_prob:
            raise ConfigError("--rollouts free needs --noise-prob 0: its context is its own tokens")
        if self.path != "fast" and (self.rollouts == "free" or self.reward):
            raise ConfigError(f"--path {self.path} needs the published recipe's own --rollouts and --reward")
        if self.reward is not None:
            reward_function(self.reward)
        if self.path != "fast" and self.method != "vapi":
            raise ConfigError(f"--path {self.path} needs --method vapi: the published recipe is VA-π")
        if self.path == "both" and self.steps < 2:
            raise ConfigError("--path both needs --steps 2 or more: it does not compare the first, which warms up")
        if self.path != "fast" and self.dropout:
            raise ConfigError(f"--path {self.path} needs --dropout 0: the two paths would draw different masks")
        if self.path != "fast" and (self.top_k or self.top_p < 1):
            raise ConfigError(f"--path {self.path} needs --top-k 0 and --top-p 1: the published recipe has no filters")

    def check_files(self) -> None:
        needed = () if self.random_init else ("vq_ckpt", "gpt_ckpt")
        for name in needed + (() if self.synthetic_data else ("data",)):
            if getattr(self, name) is None:
                raise ConfigError(f"{flag(name)} is required for --model {self.model}")
        for name in ("vq_ckpt", "gpt_ckpt", "data", "vgg_weights", "eval_data", "inception_weights"):
            path = getattr(self, name)
            if path is not None and not path.exists():
                raise ConfigError(f"{flag(name)} {path}: no such file or folder")
        if (self.output_dir / "run.json").exists():
            raise ConfigError(f"--output-dir {self.output_dir} holds a finished run: choose another folder")
        unfinished = any(self.snapshots.glob("step-*"))
        if self.resume and not unfinished:
            raise ConfigError(f"--resume: {self.output_dir} holds no snapshots to go on from; pass its --output-dir")
        if not self.resume and unfinished:
            raise ConfigError(
                f"--output-dir {self.output_dir} holds an unfinished run: pass --resume to go on with it, or choose "
                "another folder"
            )

    @property
    def snapshots(self) -> Path:
        """Folder of the states that `--resume` goes on from."""
        return self.output_dir / "snapshots"

    @property
    def grid_size(self) -> int:
        """Tokens along one side of the image."""
        return self.image_size // VQ_CONFIGS[self.tokenizer].downsample


def reward_function(name: str) -> Callable[..., Any]:
    """The function that `--reward module:function` names; its module is looked for in the working directory too."""
    module, _, function = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--reward {name}: {error}; pass module:function, importable from here") from error
    if not callable(found):
        raise ConfigError(f"--reward {name}: not a function")
    return found
