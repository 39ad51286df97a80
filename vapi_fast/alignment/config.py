"""What an alignment run does: frozen dataclasses, one for each part of the loop, that make up one, validated once."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapi_fast import tiny
from vapi_fast.alignment.reward_terms import RewardTerm, reward_terms
from vapi_fast.alignment.user_reward import reward_function
from vapi_fast.data.config import SHORT_SHARE
from vapi_fast.generation.config import DrawOptions, ModelOptions
from vapi_fast.models import catalog
from vapi_fast.models.sizes import VQ_CONFIGS
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.options import CHECKPOINT, MOST, PRESET, as_text, check_output, flag, hub_checkpoints, option
from vapi_fast.runtime.packages import installed

METHODS = ("vapi", "ste", "ntp")
PRIORS = ("ce", "kl")
ROLLOUTS = ("teacher-forced", "free")
ROLLOUT_MODES = ("train", "eval")
CODES = ("normalised", "raw")
CONTROLS = ("random", "shuffled")
ADVANTAGES = ("sum", "each")
REWARD_DTYPES = ("bfloat16", "float16", "float32", "fp8")
VGG_STRIDE = 16  # pixels of the image to one of the last map of features
PROGRESS = "progress.jsonl"  # in the run's folder, a line a step, and one for a measurement between two
ADDED_TO = {PROGRESS: stat.S_ISREG, "tensorboard": stat.S_ISDIR, "snapshots": stat.S_ISDIR}  # what they have to be
# Besides run.json; the others are added to.
RESULTS = ("aligned.pt", "aligned", "samples.png", "originals.png", "reward.png", "stages.png", "fid.png")


def settings(values: Mapping[str, Any], beside: str) -> list[str]:
    """A recipe's values as a command line has them, without those that another one has as well."""
    others = catalog.RECIPES[beside]
    return [f"{flag(name)} {as_text(value)}" for name, value in values.items() if value != others.get(name)]


def shown_settings(values: Mapping[str, Any]) -> str:
    """For a table's cell."""
    return " ".join(f"`{each}`" for each in settings(values, beside=catalog.PAPER.recipe)) or "those shown here"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The images that are trained on."""

    data: Path | None = option(
        PRESET,
        "images: folder of class folders, `save_to_disk` folder, parquet, WebDataset tars, or `hub:owner/name`; with "
        "captions for a text-conditioned model: the same but for class folders, or lists of paths (`.jsonl`, `.csv`)",
        shown=f"`{catalog.IMAGENET}`, text: required (shipped)",
        file="file, folder or hub",
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
    hub_rows: int | None = option(
        None,
        "rows of a `hub:` data set, from its start on",
        at_least=1,
        at_most=MOST,
        shown="`--steps` × `--batch-size`; held-out: `--eval-samples`",
    )
    caption_column: str | None = option(
        None,
        "where `--data` has its captions; `NAME:K`: of several of an image the K-th, from 0 on",
        shown="a usual name; the first of several",
    )
    text_encoder: str | None = option(
        PRESET,
        "T5 that the model was trained with: folder, or name on Hugging Face's hub",
        shown="google/flan-t5-xl (tiny-text: shipped words)",
    )
    caption_cache: Path | None = option(
        None, "folder where captions' features are kept, for any number of runs", shown="beside torch.hub's"
    )
    caption_features: Path | None = option(
        None,
        "captions' features in place of a text encoder, as `encode-captions` and LlamaGen write them",
        file="file or folder",
    )
    short_caption_features: Path | None = option(
        None, "the same of shorter captions, which a share of the images has instead", file="file or folder"
    )
    short_caption_share: float = option(SHORT_SHARE, "that share; 0.3 in LlamaGen's training", at_least=0, at_most=1)
    synthetic_data: bool = option(False, "made-up images instead of `--data`, to time a model; nothing is measured")


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(DrawOptions):
    """The G token sequences that are drawn for each image."""

    group_size: int = option(PRESET, "rollouts per image, G", at_least=1, at_most=MOST)
    rollouts: str = option(
        PRESET,
        "around the image's own tokens; `free`: sampled from the class alone, as AR-GRPO does",
        choices=ROLLOUTS,
    )
    rollout_cfg_scale: float = option(
        PRESET, "guidance of `--rollouts free`, which are learned from without", at_least=1
    )
    noise_prob: float = option(PRESET, "share ξ of context tokens replaced by random ones", at_least=0, at_most=1)
    rollout_mode: str = option(
        PRESET,
        "`train`: rollouts and loss come of one forward, dropout and all; `eval`: rollouts of a forward without "
        "dropout, the loss of a second one with it, one an image",
        choices=ROLLOUT_MODES,
    )
    dropout: float = option(
        PRESET,
        "dropout of embeddings, attention's and feed-forward's results, one mask for all rollouts of an image",
        at_least=0,
        below=1,
    )
    label_dropout: float = option(
        PRESET, 'share of images whose class is replaced by "none" where dropout acts', at_least=0, at_most=1
    )

    @property
    def second_forward(self) -> bool:
        """Whether rollouts are drawn without the dropout that the loss's forward has: else one forward serves both."""
        return self.rollout_mode == "eval" and (self.dropout > 0 or self.label_dropout > 0)

    @property
    def off_policy(self) -> bool:
        """Whether rollouts come of another distribution than the loss's.

        Under guidance they do, and as in AR-GRPO the ratio is the generator's own to itself.
        """
        return self.rollout_cfg_scale == 1 and (self.second_forward or self.top_k > 0 or self.top_p < 1)


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """What a rollout's image is worth."""

    lpips: str = option(
        PRESET,
        "network of LPIPS: `vgg16` as the paper's, `alex` as Janus-Pro's script; presets have their own",
        choices=("vgg16", "alex", *tiny.NETWORKS),
    )
    vgg_weights: Path | None = option(
        PRESET,
        "torchvision's file for LPIPS, of VGG16 or with Janus-Pro of AlexNet, for machines that are offline",
        shown="download (shipped)",
        file=CHECKPOINT,
    )
    reward: str | None = option(
        PRESET,
        "with weights, such as `clip:5,clip-levels,pixel:2`: `pixel`, `classifier` (tiny), `clip`, `clip-levels`, "
        "`hpsv2`, `hpsv2-levels`, and `module:function` of images `[N,3,H,W]` in [−1, 1] and class ids `[N]`, or "
        "a list of captions, to rewards `[N]`",
        shown="pixel",
    )
    reward_networks: Path | None = option(
        None,
        "folder with the networks of `--reward`, each in a sub-folder of its name, for machines that are offline",
        shown="download",
        file="file or folder",
    )
    class_names: Path | None = option(
        None,
        "what networks that read call the classes: a name a line in the order of the ids, or JSON",
        shown="the class folders' names",
        file="file",
    )
    reward_dtype: str | None = option(
        None,
        "of decoder and LPIPS; advantages' cosine with `float32`'s, of the preset in the mean: `bfloat16` 0.99998, "
        "`float16` 0.9999999, with `float32` for what it cannot hold, and `fp8`, which is that with the decoder's "
        "convolutions at full resolution in e4m3, 0.99996; on an H100, H200, B200 or B300",
        choices=REWARD_DTYPES,
        shown="bfloat16, without a GPU float32",
    )
    mse_weight: float = option(PRESET, "w_mse: the reward is −(w_mse · MSE + w_lpips · LPIPS)", at_least=0)
    lpips_weight: float = option(PRESET, "w_lpips", at_least=0)

    @property
    def reward_terms(self) -> tuple[RewardTerm, ...]:
        """What `reward` is the weighted sum of."""
        return reward_terms(self.reward)

    @property
    def networks(self) -> list[str]:
        """The networks that `reward` needs, each once."""
        return list(dict.fromkeys(term.network for term in self.reward_terms if term.network))


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What the rewards are made into."""

    recipe: str = option(
        PRESET,
        "values for flags that are not given: "
        + "; ".join(f"`{name}`, {shown_settings(values)}" for name, values in catalog.RECIPES.items()),
        choices=tuple(catalog.RECIPES),
    )
    method: str = option(
        PRESET,
        "`vapi`, `ste` (straight-through baseline) or `ntp` (next-token prediction alone)",
        choices=METHODS,
    )
    codes: str = option(
        PRESET,
        "code vectors that `--method ste` decodes: `normalised`, which the decoder knows, or `raw`, as released",
        choices=CODES,
    )
    control: str | None = option(
        None,
        "what the rewards are worth: advantages drawn at `random`, or `shuffled` between the images of a step; "
        "everything else stays",
        choices=CONTROLS,
        shown="none",
    )
    advantage: str = option(
        "sum", "of several rewards: of their weighted `sum`, or of `each` and then weighted", choices=ADVANTAGES
    )
    credit_window: int | None = option(
        None,
        "judge each token by its own neighbourhood, so many tokens wide (odd), and not all of them by the whole image",
        at_least=1,
        shown="the whole image",
    )
    advantage_eps: float = option(
        PRESET, "beside the deviation in a group that advantages are divided by", at_least=1e-30
    )
    advantage_clip: float = option(
        PRESET,
        "bound of advantages on both sides, which 5 is from 27 rollouts a group on; 0: none",
        at_least=0,
    )
    prior: str = option(
        PRESET, "`ce`: cross-entropy to the image's tokens; `kl`: divergence from the base model", choices=PRIORS
    )
    prior_weight: float = option(PRESET, "weight β of the prior", at_least=0)
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
    weight_decay: float = option(PRESET, "AdamW's, of all weights but norms'", at_least=0)
    beta2: float = option(PRESET, "AdamW's second β", at_least=0, below=1)
    clip_grad_norm: float = option(1.0, above=0)
    train: str = option(
        "all",
        "what is trained, where memory is short: `all`; `head`, the last layers alone; `image`, Janus-Pro's also what "
        "image tokens enter by; or `lora`, low-rank adapters of the blocks, which the checkpoint has added to its "
        "weights, at an `--lr` as of 1e-4",
        choices=("all", "head", "image", "lora"),
    )
    lora_rank: int = option(16, "of `--train lora`", at_least=1, at_most=1024)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The measurements before and after."""

    evaluate: bool = option(True, "align, and measure nothing before and after", flags=("--no-eval",))
    eval_every: int | None = option(
        None, "measure after every so many steps too; `fid.png` shows FID over the steps", at_least=1, shown="never"
    )
    eval_data: Path | None = option(
        PRESET, "images that samples are measured against", shown="`--data` (held-out)", file="file, folder or hub"
    )
    inception_weights: Path | None = option(
        None,
        "the network of FID and IS, for machines that are offline",
        shown="download (none)",
        file=CHECKPOINT,
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
        not_given = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) is PRESET}
        self.prepare("align")
        if self.random_init or self.synthetic_data:  # samples of an untrained generator, or no images to hold them to
            object.__setattr__(self, "evaluate", False)
        if self.output_dir == Path(""):
            name = f"{self.model}-{self.method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            object.__setattr__(self, "output_dir", Path("runs") / name)
        try:
            self.check_combinations()
        except ConfigError as error:
            raise ConfigError(f"{error}{self.set_by_recipe(not_given, str(error))}") from error
        self.check_required(
            *(() if self.random_init else ("vq_ckpt", "gpt_ckpt")), *(() if self.synthetic_data else ("data",))
        )
        self.check_folder()

    def set_by_recipe(self, not_given: Set[str], message: str) -> str:
        """For a message's end: of the flags in it, those that the recipe has set, as they were not given."""
        named = {name for name in not_given if flag(name) in re.findall(r"--[a-z0-9-]+", message)}
        values = {name: value for name, value in catalog.RECIPES[self.recipe].items() if name in named}
        said = settings(values, beside="lean")
        return f"; --recipe {self.recipe} sets {' '.join(said)}" if said else ""

    def check_combinations(self) -> None:
        if self.method == "vapi" and self.group_size < 2:
            raise ConfigError("--group-size must be at least 2: advantages compare the rollouts of one image")
        self.check_rewards()
        pixels_alone = all(term.name == "pixel" for term in self.reward_terms)
        if self.method == "vapi" and pixels_alone and self.mse_weight == self.lpips_weight == self.prior_weight == 0:
            raise ConfigError("nothing to optimise: --mse-weight, --lpips-weight and --prior-weight are all 0")
        if self.codes == "raw" and self.method != "ste":
            raise ConfigError(f"--codes raw needs --method ste: --method {self.method} decodes tokens")
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
        if self.method != "vapi" and self.reward_dtype:
            raise ConfigError(
                f"--reward-dtype {self.reward_dtype} needs --method vapi: --method {self.method} has no rewards of "
                "rollouts"
            )
        if self.rollouts != "free" and self.rollout_cfg_scale > 1:
            raise ConfigError(
                f"--rollout-cfg-scale {self.rollout_cfg_scale:g} needs --rollouts free: those around an image are "
                "drawn from the forward that they are learned in"
            )
        if self.rollouts == "free" and self.noise_prob:
            raise ConfigError("--rollouts free needs --noise-prob 0: its context is its own tokens")

    def check_rewards(self) -> None:
        for term in self.reward_terms:
            if term.is_users:
                reward_function(term.name)
            if term.network and not installed("transformers"):
                raise ConfigError(
                    f"--reward {term.name} needs transformers, not installed here: pip install 'vapi-fast[rewards]'"
                )
            if term.name == "classifier" and self.lpips != "tiny":
                raise ConfigError(
                    "--reward classifier needs --model tiny, whose perceptual network has a classifier: --reward clip "
                    "tells how well an image fits its class for any --model"
                )
        if not any(term.weight for term in self.reward_terms):
            raise ConfigError(f"--reward {self.reward}: all weights are 0, so no reward decides anything")

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
        if self.lpips == "alex":
            raise ConfigError("--credit-window goes without LPIPS on AlexNet, whose pixels lie over no whole tokens")
        if self.lpips == "vgg16" and self.image_size % VGG_STRIDE:
            raise ConfigError(
                f"--credit-window needs an --image-size that is a multiple of {VGG_STRIDE}, as a pixel of VGG16's last "
                f"map has to lie over whole tokens, got {self.image_size}"
            )

    def rows(self, held_out: bool) -> int:
        """How many of a `hub:` data set are read: as many as the steps need, or a measurement."""
        return self.hub_rows or (self.eval_samples if held_out else self.steps * self.batch_size)

    @property
    def hub_checkpoints(self) -> dict[str, Path]:
        """What the run reads of Hugging Face's hub, by field."""
        if self.random_init:
            return {}
        unread = set() if self.evaluate else {"inception_weights"}
        return {name: path for name, path in hub_checkpoints(self).items() if name not in unread}

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
