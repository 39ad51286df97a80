"""What `vapi-fast evaluate` and `vapi-fast geneval` do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vapi_fast import tiny
from vapi_fast.models import catalog
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.options import (
    CHECKPOINT,
    LARGEST_SIDE,
    MOST,
    PRESET,
    check,
    check_files,
    check_output,
    fill_in,
    option,
)

CLIP = "openai/clip-vit-base-patch32"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One `vapi-fast evaluate`: what is scored against what.

    Raises:
        ConfigError: a field out of range, a missing file, or fields that contradict each other.
    """

    model: str = option(
        "xxl",
        "the tiny ones bring their own reference and feature network, all others take Inception",
        choices=tuple(catalog.CATALOG),
    )
    samples: Path = option(
        help="folder of `generate`, `.npz` of images or statistics, folder of pictures, or what `align --data` takes",
        file="file or folder",
    )
    reference: Path | None = option(
        PRESET,
        "images or statistics to score against, in the same forms",
        shown="required (shipped)",
        file="file or folder",
    )
    inception_weights: Path | None = option(
        None,
        "`weights-inception-2015-12-05-6726825d.pth`, for machines that are offline",
        shown="download (none)",
        file=CHECKPOINT,
    )
    batch_size: int = option(PRESET, "images in the network at once", at_least=1, at_most=MOST)
    image_size: int = option(
        PRESET, "crop of images in class folders, parquet or tars", at_least=1, at_most=LARGEST_SIDE
    )
    split: str | None = option(
        None, "which split of class folders, parquet or tars, in any case", shown="validation, test or the only one"
    )
    clip_score: bool = option(
        False, "also 100 times CLIP's cosine of an image and its caption, which `generate --prompts` left beside it"
    )
    prompts: Path | None = option(
        None,
        "captions for `--clip-score`, one for each image in the order of their names: a text a line, or lines of JSON "
        "with `prompt`",
        shown="the samples' own",
        file="file",
    )
    clip_network: str = option(
        CLIP, "CLIP of `--clip-score`, by its name on the hub, or its folder for machines that are offline"
    )
    output: Path | None = option(None, "also write the scores there, as JSON")

    def __post_init__(self) -> None:
        catalog.prepare(self, "evaluate")
        if self.own_network and self.inception_weights is not None:
            raise ConfigError(f"--model {self.model} scores with its own network: leave --inception-weights out")
        if self.reference is None:
            raise ConfigError(f"--reference is required for --model {self.model}; only tiny ones bring their own")
        if self.prompts is not None and not self.clip_score:
            raise ConfigError("--prompts has captions for --clip-score: pass that too, or leave --prompts out")
        check_files(self)
        if self.output is not None:
            check_output("output", self.output)
        if self.output is not None and self.output.exists():
            raise ConfigError(f"--output {self.output} exists: choose another name")

    @property
    def own_network(self) -> bool:
        """Whether samples are scored by the preset's perceptual network, not by Inception."""
        return catalog.entry(self.model).lpips in tiny.NETWORKS


SCENES = "tiny-text"  # of `--detector`


@dataclass(frozen=True, kw_only=True)
class GenevalConfig:
    """One `vapi-fast geneval`: which images, and who says what is in them.

    Raises:
        ConfigError: a field out of range, or a missing file.
    """

    samples: Path = option(
        help="folder in GenEval's layout: `00000/metadata.jsonl`, `00000/samples/0000.png`, …", file="file or folder"
    )
    detections: Path | None = option(
        None, "what is in the images, as JSON lines, in place of the detector", file="file"
    )
    detector: str = option(
        "facebook/mask2former-swin-small-coco-instance",
        "a Mask2Former on COCO, by its name on the hub, or its folder for machines that are offline; `tiny-text`: that "
        "of its scenes, shipped",
    )
    clip_weights: Path | None = option(
        None, "OpenAI's CLIP ViT-L/14, for machines that are offline", shown="download", file="file"
    )
    batch_size: int = option(8, "images in the detector at once", at_least=1, at_most=MOST)
    output: Path | None = option(None, "folder of the results, a new one", shown="`SAMPLES/geneval`")

    def __post_init__(self) -> None:
        fill_in(self, {})
        check(self)
        check_files(self)
        if not self.samples.is_dir():
            raise ConfigError(f"--samples {self.samples} is a file: pass a folder in GenEval's layout")
        if self.output is None:
            object.__setattr__(self, "output", self.samples / "geneval")
        check_output("output", self.output)
        if self.output.exists():
            raise ConfigError(f"--output {self.output} exists: choose another name")
