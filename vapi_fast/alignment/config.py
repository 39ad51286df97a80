"""What an alignment run does: frozen dataclasses, one for each part of the loop, that make up one, validated once."""

from __future__ import annotations

import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from vapi_fast.alignment.user_reward import reward_function
from vapi_fast.generation.config import DrawOptions, ModelOptions
from vapi_fast.models.sizes import VQ_CONFIGS
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.options import MOST, PRESET, check_output, option

METHODS = ("vapi", "ste", "ntp")
PRIORS = ("ce", "kl")
ROLLOUTS = ("teacher-forced", "free")
CONTROLS = ("random", "shuffled")
VGG_STRIDE = 16  # pixels of the image to one of the last map of features
PROGRESS = "progress.jsonl"  # in the run's folder, a line a step, and one for a measurement between two
ADDED_TO = {PROGRESS: stat.S_ISREG, "tensorboard": stat.S_ISDIR, "snapshots": stat.S_ISDIR}  # what they have to be
# Besides run.json; the others are added to.
RESULTS = ("aligned.pt", "samples.png", "originals.png", "reward.png", "stages.png", "fid.png")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The images that are trained on."""

    data: Path | None = option(
        PRESET,
        "images: folder of class folders, `save_to_disk` folder, parquet, or WebDataset tars",
        shown="required (shipped)",
        file="file or folder",
    )
    split: str | None = option(
        None,
        "which split of `--data`, in any case; a measurement takes the held-out one",
        shown="train, or the only one",
    )
    class_index: Path | None = option(
        None,
        "JSON or text list: class names and their ids, where the order of the names is not the ids'",
        shown="in the order of the names",
        file="file",
    )
    synthetic_data: bool = option(False, "made-up images instead of `--data`, to time a model; nothing is measured")


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(DrawOptions):
    """The G token sequences that are drawn for each image."""

    group_size: int = option(8, "rollouts per image, G", at_least=1, at_most=MOST)
    rollouts: str = option(
        "teacher-forced",
        "around the image's own tokens; `free`: sampled from the class alone, as AR-GRPO does",
        choices=ROLLOUTS,
    )
    noise_prob: float = option(0.0, "share ξ of context tokens replaced by random ones", at_least=0, at_most=1)
    dropout: float = option(0.0, "dropout in the generator, one mask for all rollouts of an image", at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """What a rollout's image is worth."""

    lpips: str = option(PRESET, choices=("vgg16", "tiny"))
    vgg_weights: Path | None = option(
        PRESET,
        "torchvision's VGG16 file for LPIPS, for machines that are offline",
        shown="download (shipped)",
        file="file or folder",
    )
    reward: str | None = option(
        None,
        "`module:function` of images `[N,3,H,W]` in [−1, 1] and class ids `[N]`, to rewards `[N]`",
        shown="the pixels'",
    )
    mse_weight: float = option(1.0, "w_mse: the reward is −(w_mse · MSE + w_lpips · LPIPS)", at_least=0)
    lpips_weight: float = option(1.0, "w_lpips", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What the rewards are made into."""

    method: str = option(
        "vapi",
        "`vapi`, `ste` (straight-through baseline) or `ntp` (next-token prediction alone)",
        choices=METHODS,
    )
    control: str | None = option(
        None,
        "what the rewards are worth: advantages drawn at `random`, or `shuffled` between the images of a step; "
        "everything else stays",
        choices=CONTROLS,
        shown="none",
    )
    credit_window: int | None = option(
        None,
        "judge each token by its own neighbourhood, so many tokens wide (odd), and not all of them by the whole image",
        at_least=1,
        shown="the whole image",
    )
    prior: str = option(
        "ce", "`ce`: cross-entropy to the image's tokens; `kl`: divergence from the base model", choices=PRIORS
    )
    prior_weight: float = option(0.1, "weight β of the prior", at_least=0)
    clip_range: float = option(0.2, at_least=0)


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The steps of the optimizer."""

    batch_size: int = option(PRESET, "images per step, over all processes", at_least=1, at_most=MOST)
    micro_batch: int = option(
        PRESET,
        "images in one forward on one GPU; lower it when memory runs out, results stay",
        at_least=1,
    )
    steps: int = option(PRESET, "optimizer steps", at_least=1)
    lr: float = option(PRESET, "AdamW's learning rate", at_least=0)
    weight_decay: float = option(1e-4, at_least=0)
    clip_grad_norm: float = option(1.0, above=0)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The measurements before and after."""

    evaluate: bool = option(True, "align, and measure nothing before and after", flags=("--no-eval",))
    eval_every: int | None = option(
        None, "measure after every so many steps too; `fid.png` shows FID over the steps", at_least=1, shown="never"
    )
    eval_data: Path | None = option(
        PRESET, "images that samples are measured against", shown="`--data` (held-out)", file="file or folder"
    )
    inception_weights: Path | None = option(
        None,
        "the network of FID and IS, for machines that are offline",
        shown="download (none)",
        file="file or folder",
    )
    eval_samples: int = option(PRESET, "images drawn for each evaluation", at_least=4, at_most=MOST)
    eval_batch: int = option(
        PRESET, "images drawn at once; lower it when memory runs out during an evaluation", at_least=1
    )
    cfg_scale: float = option(PRESET, "guidance of the second evaluation; 1: there is none", at_least=1)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run writes, and how it starts."""

    output_dir: Path = option(
        Path(""),
        "where the results go; results are never overwritten",
        shown="`runs/<model>-<method>-<time>-<process>`",
    )
    checkpoint_every: int = option(50, "steps between saved states", at_least=1)
    resume: bool = option(False, "go on with the unfinished run in `--output-dir`")
    random_init: bool = option(False, "random weights instead of checkpoints, to time a model; nothing is measured")

    @property
    def snapshots(self) -> Path:
        """Folder of the states that `--resume` goes on from."""
        return self.output_dir / "snapshots"


@dataclass(frozen=True, kw_only=True)
class AlignConfig(
    RunOptions,
    EvaluationOptions,
    OptimizerOptions,
    ObjectiveOptions,
    RewardOptions,
    RolloutOptions,
    DataOptions,
    ModelOptions,
):
    """One alignment run. Fields left out take the paper's value, or the tiny preset's for `model="tiny"`.

    Raises:
        ConfigError: a field out of range, a missing file, or fields that contradict each other.
    """

    tokenizer: str = option(PRESET, choices=tuple(VQ_CONFIGS))

    def __post_init__(self) -> None:
        self.prepare("align")
        if self.random_init or self.synthetic_data:  # samples of an untrained generator, or no images to hold them to
            object.__setattr__(self, "evaluate", False)
        if self.output_dir == Path(""):
            name = f"{self.model}-{self.method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            object.__setattr__(self, "output_dir", Path("runs") / name)
        self.check_combinations()
        self.check_required(
            *(() if self.random_init else ("vq_ckpt", "gpt_ckpt")), *(() if self.synthetic_data else ("data",))
        )
        self.check_folder()

    def check_combinations(self) -> None:
        if self.method == "vapi" and self.group_size < 2:
            raise ConfigError("--group-size must be at least 2: advantages compare the rollouts of one image")
        if self.method == "vapi" and self.mse_weight == self.lpips_weight == 0 and self.prior_weight == 0:
            raise ConfigError("nothing to optimise: --mse-weight, --lpips-weight and --prior-weight are all 0")
        if self.control and self.method != "vapi":
            raise ConfigError(f"--control {self.control} needs --method vapi: --method {self.method} has no advantages")
        if self.control == "shuffled" and self.batch_size < 2:
            raise ConfigError("--control shuffled needs --batch-size 2 or more: advantages go to another image")
        if self.credit_window:
            self.check_credit()
        if self.eval_every and not self.evaluate:
            raise ConfigError(
                f"--eval-every {self.eval_every} goes without --no-eval, --random-init and --synthetic-data: they "
                "measure nothing"
            )
        if self.prior == "kl" and self.method != "vapi":
            raise ConfigError(f"--prior kl needs --method vapi: --method {self.method} has no sampled tokens")
        if self.method != "vapi" and (self.rollouts == "free" or self.reward):
            raise ConfigError(
                f"--rollouts free and --reward need --method vapi: --method {self.method} has no rollouts"
            )
        if self.rollouts == "free" and self.noise_prob:
            raise ConfigError("--rollouts free needs --noise-prob 0: its context is its own tokens")
        if self.reward is not None:
            reward_function(self.reward)

    def check_credit(self) -> None:
        if self.method != "vapi":
            raise ConfigError(f"--credit-window needs --method vapi: --method {self.method} has no advantages")
        if self.reward:
            raise ConfigError("--credit-window goes without --reward: what it gives an image has no part for a token")
        if self.rollouts == "free":
            raise ConfigError("--credit-window needs --rollouts teacher-forced: a free token decides all after it too")
        if self.credit_window % 2 == 0:
            raise ConfigError(f"--credit-window must be odd, with the token in the middle, got {self.credit_window}")
        if self.credit_window > self.grid_size:
            raise ConfigError(
                f"--credit-window must be at most {self.grid_size}, the tokens of a side, got {self.credit_window}"
            )
        if self.lpips == "vgg16" and self.image_size % VGG_STRIDE:
            raise ConfigError(
                f"--credit-window needs an --image-size that is a multiple of {VGG_STRIDE}, as a pixel of VGG16's last "
                f"map has to lie over whole tokens, got {self.image_size}"
            )

    def measures_after(self, step: int) -> bool:
        """Whether `eval_every` has the generator measured between two steps, this one and the next."""
        return bool(self.eval_every) and 0 < step < self.steps and step % self.eval_every == 0

    def check_folder(self) -> None:
        """Raise ConfigError where the output folder holds anything that this run would write."""
        check_output("output_dir", self.output_dir)
        if (self.output_dir / "run.json").exists():
            raise ConfigError(f"--output-dir {self.output_dir} holds a finished run: choose another folder")
        unfinished = bool(saved_steps(self.snapshots))
        if self.resume and not unfinished:
            raise ConfigError(f"--resume: {self.output_dir} holds no snapshots to go on from; pass its --output-dir")
        if not self.resume and unfinished:
            raise ConfigError(
                f"--output-dir {self.output_dir} holds an unfinished run: pass --resume to go on with it, or choose "
                "another folder"
            )
        there = [name for name in RESULTS if os.path.lexists(self.output_dir / name)]
        if there and not self.resume:
            raise ConfigError(
                f"--output-dir {self.output_dir} holds {there[0]}, which this run would write: choose another folder"
            )
        for name, is_kind in ADDED_TO.items():
            path = self.output_dir / name
            if os.path.lexists(path) and not is_kind(path.lstat().st_mode):
                raise ConfigError(f"{path} is none that a run has written: choose another --output-dir")


def saved_steps(directory: Path) -> list[int]:
    """The steps whose states are in `directory`, whole or damaged, in ascending order."""
    names = (
        re.fullmatch(r"step-(\d{6}|[1-9]\d{6,17})", path.name) for path in directory.glob("step-*") if path.is_dir()
    )
    return sorted(int(name[1]) for name in names if name)
