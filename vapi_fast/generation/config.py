"""What `vapi-fast generate` does: the model that draws, how tokens are drawn, and one run's options."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vapi_fast.models import catalog
from vapi_fast.models.sizes import VQ_CONFIGS
from vapi_fast.runtime.errors import ConfigError, DataError
from vapi_fast.runtime.options import CHECKPOINT, LARGEST_SIDE, MOST, PRESET, check_files, check_output, flag, option

if TYPE_CHECKING:
    from vapi_fast.data.geneval import Prompt

CFG_SCHEDULES = ("constant", "power-cosine", "rar")
LARGEST_BATCH = 256
GENEVAL = "geneval"
DRAWN_WITH: dict[str, Any] = {"top_k": 0, "cfg_scale": 1.0}
DRAWN_FOR_GENEVAL: dict[str, Any] = {"num": 4, "top_k": 2000, "cfg_scale": 7.5}  # LlamaGen's


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which generator and tokenizer, and the size of their images."""

    model: str = option(
        "xxl",
        f"size of the generator: {', '.join(catalog.CATALOG)}; the tiny ones bring their own files",
        choices=tuple(catalog.CATALOG),
    )
    gpt_ckpt: Path | None = option(
        PRESET,
        "LlamaGen's generator, or an aligned one: `.pt` (bare or in `model`, `module`, `state_dict`), `.safetensors`, "
        "or of the hub: `hub:owner/name[@revision][/file]`; or Janus-Pro's folder or repository",
        shown="the hub's (shipped)",
        file=CHECKPOINT,
    )
    ema: bool = option(False, "the averaged weights in `--gpt-ckpt`, where it holds both")
    vq_ckpt: Path | None = option(
        PRESET,
        "LlamaGen's VQ tokenizer, in the same forms; of Janus-Pro the same",
        shown="the hub's (shipped)",
        file=CHECKPOINT,
    )
    image_size: int = option(
        PRESET,
        "pixels per side as drawn; that the checkpoint was trained at (`c2i_…_256.pt`: 256)",
        at_least=1,
        at_most=LARGEST_SIDE,
    )

    def prepare(self, command: str) -> None:
        """Fill in what `--model` and the recipe decide for the command, and check ranges. Raises ConfigError."""
        catalog.prepare(self, command)
        downsample = VQ_CONFIGS[self.tokenizer].downsample
        if self.image_size % downsample:
            raise ConfigError(f"--image-size must be a multiple of {downsample}, got {self.image_size}")

    def check_required(self, *names: str) -> None:
        """Raise ConfigError where a file is missing that the model does not bring, or names none."""
        for name in names:
            if getattr(self, name) is None:
                why = f": the hub has none for --image-size {self.image_size}" * (name == "gpt_ckpt")
                raise ConfigError(f"{flag(name)} is required for --model {self.model}{why}")
        check_files(self)

    def given(self, *names: str) -> list[str]:
        """The flags of those fields that have a value, and not the model's own."""
        own = catalog.entry(self.model).files
        return [flag(name) for name in names if getattr(self, name) not in (None, own.get(name))]

    @property
    def grid_size(self) -> int:
        """Tokens along one side of the image."""
        return self.image_size // VQ_CONFIGS[self.tokenizer].downsample


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How tokens are drawn from the generator's distribution."""

    temperature: float = option(1.0, "of the draws", at_least=1e-6)  # float32's logits, divided by less, overflow
    top_k: int = option(0, "keep the k likeliest tokens in the draws; 0: all", at_least=0)
    top_p: float = option(1.0, "nucleus of the draws; 1: all", above=0, at_most=1)
    seed: int = option(0, "decides every random draw", at_least=0)

    @property
    def filters(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DrawOptions, ModelOptions):
    """One `vapi-fast generate`. Fields left out take the paper's value, or the tiny preset's for `model="tiny"`.

    `prompts="geneval"` becomes the path of GenEval's own, which are downloaded if need be.

    Raises:
        ConfigError: a field out of range, a missing file, or fields that contradict each other.
    """

    out: Path = option(help="folder of the results; an interrupted run is finished by the same command")
    num: int = option(
        PRESET,
        "images to draw, of prompts one each; with `--format geneval` images of each prompt, 4; torchrun takes `--num` "
        "for its own, use the second there",
        at_least=1,
        at_most=MOST,
        flags=("--num", "--num-images"),
    )
    class_ids: tuple[int, ...] | str | None = option(
        None,
        "such as `0,7,20-29`: one image of each in turn",
        shown="all",
        kind=str,
    )
    prompt: str | None = option(None, "text to draw, for a text-conditioned model")
    prompts: Path | None = option(
        None,
        "file of texts in turn: one a line, or lines of JSON with `prompt`; or `geneval`: its own 553, downloaded "
        "(of tiny ones: 281 scenes)",
        file="file",
    )
    text_encoder: str | None = option(
        PRESET,
        "T5 that the model was trained with: folder, or name on Hugging Face's hub",
        shown="google/flan-t5-xl (tiny-text: shipped words)",
    )
    caption_cache: Path | None = option(
        None, "folder where prompts' features are kept, as captions' of `align`", shown="beside torch.hub's"
    )
    caption_features: Path | None = option(
        None,
        "text-encoder features `[N, 120, 2048]` (`.npy`, `.safetensors`) for a text-conditioned model, in turn",
        file="file",
    )
    top_k: int = option(
        PRESET, "keep the k likeliest tokens in the draws; 0: all", at_least=0, shown="0; GenEval: 2000 (Janus-Pro 0)"
    )
    cfg_scale: float = option(
        PRESET, "classifier-free guidance; 1: none", at_least=1, shown="1; GenEval: 7.5; Janus-Pro: 5"
    )
    cfg_interval: int = option(-1, "guide tokens up to this one only, as LlamaGen counts; -1: all", at_least=-1)
    cfg_schedule: str = option(
        "constant",
        "or `power-cosine`, as VA-π's evaluation: `--cfg-scale` for the first token, from 1 up to it for the rest; or "
        "`rar`: from 1 up for all",
        choices=CFG_SCHEDULES,
    )
    cfg_power: float = option(1.0, "of `power-cosine` and `rar`; above 1 they rise later", above=0)
    save_size: int | None = option(
        None,
        "pixels per side as written; papers draw 384 and score 256",
        at_least=1,
        at_most=LARGEST_SIDE,
        shown="`--image-size`",
    )
    format: str | None = option(
        None,
        "or `npz`: one file in the ADM evaluator's layout; or `geneval`: GenEval's folders, of `--prompts` of its kind",
        choices=("png", "npz", GENEVAL),
        shown="png; of `--prompts geneval` geneval",
    )
    batch_size: int | None = option(
        None,
        "images drawn at once on one GPU; lower it when memory runs out",
        at_least=1,
        at_most=MOST,
        shown=f"up to {LARGEST_BATCH}",
    )
    kv_dtype: str | None = option(
        None,
        "`int8` or `fp8`: keys and values in 8 bits, faster, less memory, rounded; `int8` with a scale for each token "
        "and head, a quarter of the error of `fp8`, which needs compute capability 8.9",
        choices=("int8", "fp8"),
    )
    compare_ckpt: Path | None = option(
        None, "another generator: `comparison.png` shows both at equal seeds", file=CHECKPOINT
    )
    entropy_maps: bool = option(False, "also draw where the generator is unsure: `entropy.png`")

    def __post_init__(self) -> None:
        if self.caption_features is not None and self.num is PRESET:
            raise ConfigError("--num is required with --caption-features: image i has caption i mod N of the file's N")
        model = catalog.entry(self.model)
        official = self.prompts is not None and str(self.prompts) == GENEVAL
        if self.format is None:
            object.__setattr__(self, "format", GENEVAL if official else "png")
        drawn = DRAWN_FOR_GENEVAL if self.format == GENEVAL else DRAWN_WITH
        for name, value in (drawn | model.drawn).items():
            if getattr(self, name) is PRESET:
                object.__setattr__(self, name, value)
        one_each = self.num is PRESET
        self.prepare("generate")
        if self.save_size is None:
            object.__setattr__(self, "save_size", self.image_size)
        if self.class_ids is not None:
            object.__setattr__(self, "class_ids", parse_class_ids(self.class_ids))
        kinds = ("class_ids", "caption_features", "prompt", "prompts")
        if len(given := [flag(kind) for kind in kinds if getattr(self, kind) is not None]) > 1:
            raise ConfigError(f"{' and '.join(given)}: images are drawn of one kind of condition, pass one of them")
        if self.format == GENEVAL and self.prompts is None:
            raise ConfigError("--format geneval is for --prompts geneval, or --prompts FILE of that kind: pass one")
        if official:
            from vapi_fast.data.geneval import fetch_prompts

            with prompts_refused():
                object.__setattr__(self, "prompts", model.geneval_prompts or fetch_prompts())
        self.check_required("gpt_ckpt", "vq_ckpt")
        if self.texts and one_each:
            object.__setattr__(self, "num", len(self.texts))
        if self.count > MOST:
            raise ConfigError(f"--num {self.num}: of {len(self.texts)} prompts, at most {MOST} images are drawn")
        check_output("out", self.out)
        if self.out.suffix == ".npz":
            raise ConfigError(f"--out {self.out} is a folder; the images go to OUT/samples.npz: leave out the .npz")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a file: pass a folder")

    @property
    def tokenizer(self) -> str:
        return catalog.entry(self.model).tokenizer

    @property
    def count(self) -> int:
        """Images in all."""
        return self.num * (len(self.texts) if self.format == GENEVAL else 1)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The prompts, in turn; empty where classes or features are drawn. Raises ConfigError for a file of none."""
        if self.prompts is None:
            return () if self.prompt is None else (self.prompt,)
        if self.format == GENEVAL:
            return tuple(each.text for each in self.geneval_prompts)
        from vapi_fast.data.prompts import read_prompts, text_of

        with prompts_refused():
            return read_prompts(self.prompts, text_of)

    @cached_property
    def geneval_prompts(self) -> tuple[Prompt, ...]:
        """`prompts` with what they ask for. Raises ConfigError for a file of any others."""
        from vapi_fast.data.geneval import parse_prompt
        from vapi_fast.data.prompts import read_prompts

        with prompts_refused():
            return read_prompts(self.prompts, parse_prompt)


@contextlib.contextmanager
def prompts_refused() -> Iterator[None]:
    """A file of other prompts is a matter of the flag: its DataError becomes a ConfigError."""
    try:
        yield
    except DataError as error:
        raise ConfigError(f"--prompts {error}") from error


def parse_class_ids(text: str | Sequence[int]) -> tuple[int, ...]:
    """Class ids from "0,7,20-29" (both ends included), or numbers, as given; raises ConfigError for anything else."""
    ids: list[int] = []
    if not isinstance(text, str):
        try:
            ids += map(operator.index, text)
        except TypeError:
            ids.clear()
        if not ids:
            raise ConfigError(f"--class-ids must be whole numbers, at least one, got {text!r}")
        return tuple(ids)
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part)
        if not found:
            raise ConfigError(f"--class-ids {text}: expected numbers and ranges such as 0,7,20-29")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first > 10**6:
            raise ConfigError(f"--class-ids {text}: {part.strip()} is not a range from low to high")
        ids += range(first, last + 1)
    return tuple(ids)
