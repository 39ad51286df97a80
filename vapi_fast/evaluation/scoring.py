"""Score images on disk against a reference: FID, sFID, Inception Score, precision and recall, as the ADM evaluator.

That is `evaluations/evaluator.py` of openai/guided-diffusion (Dhariwal & Nichol 2021), whose reference files are read
as they are: their `mu`, `sigma` for FID, `mu_s`, `sigma_s` for sFID, and their images for precision and recall.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vapi_fast import tiny
from vapi_fast.data.image_sets import ImageSet, has_images, open_image_set, read_statistics
from vapi_fast.evaluation.inception import ImageFeatures, load_inception
from vapi_fast.evaluation.metrics import Gaussian, inception_score, precision_recall, standard_errors, warn_of_few
from vapi_fast.models import LLAMAGEN_CONFIGS, LPIPS
from vapi_fast.runtime.checkpoint import write_atomically
from vapi_fast.runtime.distributed import gather_rows, process_group, rank, world_size
from vapi_fast.runtime.errors import ConfigError, EvaluationError
from vapi_fast.runtime.flags import flag
from vapi_fast.runtime.progress import progress_bar

REFERENCE_SIZE = 256  # pixels a side that a labelled image set is cropped to: the ADM evaluator's ImageNet reference
TINY_SPATIAL_CHANNELS = 2  # of 8 × 8 positions: 128 features, as many as the pooled ones
NEIGHBOURS = 3


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One `vapi-fast evaluate`: what is scored against what.

    Raises:
        ConfigError: a field out of range, a missing file, or fields that contradict each other.
    """

    samples: Path
    model: str = "xxl"  # "tiny" brings its own network and reference
    reference: Path | None = None
    inception_weights: Path | None = None  # None: download
    image_size: int | None = None  # None: 256, tiny 32
    batch_size: int | None = None  # None: 64, tiny 250
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.model.lower() not in LLAMAGEN_CONFIGS:
            raise ConfigError(f"--model {self.model}: unknown, choose one of {', '.join(LLAMAGEN_CONFIGS)}")
        presets: dict[str, Any] = {"image_size": REFERENCE_SIZE, "batch_size": 64}
        if self.is_tiny:
            presets = {"image_size": tiny.IMAGE_SIZE, "batch_size": 250, "reference": tiny.FILES.heldout_images}
            if self.inception_weights is not None:
                raise ConfigError("--model tiny scores with its own network: leave --inception-weights out")
        for name, value in presets.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.reference is None:
            raise ConfigError(f"--reference is required for --model {self.model}; only tiny brings its own")
        for name in ("image_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("samples", "reference", "inception_weights"):
            path = getattr(self, name)
            if path is not None and not path.exists():
                raise ConfigError(f"{flag(name)} {path}: no such file or folder")
        if self.output is not None and self.output.exists():
            raise ConfigError(f"--output {self.output} exists: choose another name")

    @property
    def is_tiny(self) -> bool:
        return self.model.lower() == "tiny"


@dataclass(frozen=True)
class Report:
    """What `vapi-fast evaluate` measured; None where statistics without images cannot tell."""

    fid: float
    fid_se: float | None
    sfid: float | None
    inception_score: float | None
    inception_score_se: float | None
    precision: float | None
    recall: float | None
    samples: int | None
    reference_images: int | None
    feature_network: str
    seconds: float

    def __str__(self) -> str:
        def line(label: str, value: float | None, error: float | None = None, digits: int = 2) -> str:
            shown = "not known from statistics alone" if value is None else f"{value:.{digits}f}"
            return f"{label:<16} {shown}{'' if error is None else f' ± {error:.{digits}f}'}"

        counted = ["statistics" if n is None else f"{n} images" for n in (self.samples, self.reference_images)]
        return "\n".join(
            [
                f"{counted[0]} against {counted[1]}, features of {self.feature_network}",
                line("FID", self.fid, self.fid_se),
                line("sFID", self.sfid),
                line("Inception Score", self.inception_score, self.inception_score_se),
                line("precision", self.precision, digits=3),
                line("recall", self.recall, digits=3),
            ]
        )


class FeatureNetwork(NamedTuple):
    """A function of uint8 images `[N,3,H,W]`, and its name for reports."""

    features: Callable[[Tensor], ImageFeatures]
    name: str


@dataclass(frozen=True)
class Measured:
    """What is known of one set of images: features, Gaussians, or both."""

    features: ImageFeatures | None
    pooled: Gaussian
    spatial: Gaussian | None

    @property
    def count(self) -> int | None:
        return None if self.features is None else len(self.features.pooled)


def evaluate(config: EvaluateConfig) -> Report | None:
    """Score `config.samples` against `config.reference`; under torchrun the ranks share the images, and rank 0 reports.

    Raises:
        DataError: a file or folder that does not hold what it should.
        CheckpointError: the network's weights are missing, damaged or of another network.
        EvaluationError: sets too small or too different to be scored.
    """
    started = time.perf_counter()
    with process_group() as device:
        network = feature_network(config, device)
        samples = measure(config.samples, config, network, device, "samples")
        reference = measure(config.reference, config, network, device, "reference")
        if rank() > 0:
            return None
        report = compare(samples, reference, network.name, started)
        if config.output is not None:
            text = json.dumps(dataclasses.asdict(report), indent=1) + "\n"
            write_atomically(config.output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return report


def feature_network(config: EvaluateConfig, device: torch.device) -> FeatureNetwork:
    """Inception, or the tiny preset's own classifier."""
    if not config.is_tiny:
        return FeatureNetwork(load_inception(config.inception_weights).to(device), "Inception-v3")
    lpips = LPIPS.from_checkpoint(tiny.FILES.perceptual, "tiny").to(device)

    @torch.no_grad()
    def features(pixels: Tensor) -> ImageFeatures:
        if pixels.shape[2:] != (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE):
            height, width = pixels.shape[2:]
            raise EvaluationError(
                f"--model tiny scores images of {tiny.IMAGE_SIZE}x{tiny.IMAGE_SIZE} pixels, got {width}x{height}: pass "
                "another --model to score with Inception"
            )
        last = lpips.feature_maps(pixels / 127.5 - 1)[-1]
        pooled = last.mean((2, 3))
        spatial = last[:, :TINY_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return ImageFeatures(pooled, spatial, lpips.classifier(pooled))

    return FeatureNetwork(
        features, "the tiny preset's own network, not Inception: not comparable with published figures"
    )


def measure(source: Path, config: EvaluateConfig, network: FeatureNetwork, device: torch.device, name: str) -> Measured:
    """The statistics in `source`, features of the images in it, or both; statistics win for FID and sFID."""
    statistics = read_statistics(source)
    features = None
    if statistics is None or has_images(source):
        images = open_image_set(source, config.image_size)
        if len(images) < max(NEIGHBOURS + 1, world_size()):
            raise EvaluationError(
                f"{source} holds {len(images)} images: at least {NEIGHBOURS + 1} are needed, and one for each process"
            )
        features = extract(images, network, config.batch_size, device, name)
        for metric, values in (("FID", features.pooled), ("sFID", features.spatial)):
            if statistics is None:
                warn_of_few(len(values), values.shape[1], metric)
            if not values.isfinite().all():
                raise EvaluationError(f"{network.name} has values that are not finite for images of {source}")
    if statistics is None:
        return Measured(features, Gaussian.fit(features.pooled), Gaussian.fit(features.spatial))
    if features is not None:
        for key, values in (("mu", features.pooled), ("mu_s", features.spatial)):
            if key in statistics and len(statistics[key]) != values.shape[1]:
                raise EvaluationError(
                    f"{source}: its {key} has {len(statistics[key])} features, those of {network.name} for its images "
                    f"are {values.shape[1]}: take statistics of the same network, or leave them out of the file"
                )
    on_device = {key: value.to(device) for key, value in statistics.items()}
    spatial = Gaussian(on_device["mu_s"], on_device["sigma_s"]) if "mu_s" in on_device else None
    return Measured(features, Gaussian(on_device["mu"], on_device["sigma"]), spatial)


def extract(
    images: ImageSet, network: FeatureNetwork, batch_size: int, device: torch.device, name: str
) -> ImageFeatures:
    """Features of all images on every rank, in their order; each rank extracts one run of them."""
    start, stop = (len(images) * part // world_size() for part in (rank(), rank() + 1))
    parts: list[ImageFeatures] = []
    with progress_bar(stop - start, desc=f"features ({name})", unit="image", disable=rank() > 0) as progress:
        for pixels in images.batches(start, stop, batch_size):
            parts.append(ImageFeatures(*(value.cpu() for value in network.features(pixels.to(device)))))
            progress.update(len(pixels))
    return ImageFeatures(*(gather_rows(torch.cat(column)).to(device) for column in zip(*parts, strict=True)))


def compare(samples: Measured, reference: Measured, network_name: str, started: float) -> Report:
    """All scores that the two sets allow."""
    widths = [len(measured.pooled.mean) for measured in (samples, reference)]
    if widths[0] != widths[1]:
        raise EvaluationError(
            f"the samples have {widths[0]} features and the reference {widths[1]}: take statistics of the same network"
        )
    errors: tuple[float | None, float | None] = (None, None)
    sfid = precision = recall = quality = None
    if samples.features is not None:
        errors = standard_errors(reference.pooled, samples.features.pooled, samples.features.logits)
        quality = inception_score(samples.features.logits)
    if samples.spatial is not None and reference.spatial is not None:
        widths = [len(measured.spatial.mean) for measured in (samples, reference)]
        if widths[0] != widths[1]:
            raise EvaluationError(
                f"the samples have {widths[0]} spatial features (mu_s) and the reference {widths[1]}: take statistics "
                "of the same network, or leave mu_s and sigma_s out of the file"
            )
        sfid = float(reference.spatial.distance(samples.spatial))
    if samples.features is not None and reference.features is not None:
        precision, recall = precision_recall(reference.features.pooled, samples.features.pooled, NEIGHBOURS)
    return Report(
        fid=float(reference.pooled.distance(samples.pooled)),
        fid_se=errors[0],
        sfid=sfid,
        inception_score=quality,
        inception_score_se=errors[1],
        precision=precision,
        recall=recall,
        samples=samples.count,
        reference_images=reference.count,
        feature_network=network_name,
        seconds=time.perf_counter() - started,
    )
