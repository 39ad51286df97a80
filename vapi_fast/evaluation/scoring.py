"""Score images on disk against a reference: FID, sFID, Inception Score, precision and recall, as the ADM evaluator.

That is `evaluations/evaluator.py` of openai/guided-diffusion (Dhariwal & Nichol 2021), whose reference files are read
as they are: their `mu`, `sigma` for FID, `mu_s`, `sigma_s` for sFID, and their images for precision and recall.
Images of captions also have a CLIP score (Hessel et al. 2021), as LlamaGen's evaluation takes it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vapi_fast.data.image_sets import ImageSet, has_images, open_image_set, read_statistics
from vapi_fast.data.prompts import read_prompts, text_of
from vapi_fast.evaluation.clip import Clip
from vapi_fast.evaluation.config import EvaluateConfig
from vapi_fast.evaluation.metrics import (
    NEIGHBOURS,
    Gaussian,
    ImageFeatures,
    ImageStatistics,
    Scores,
    compare,
    grouped_mean,
    warn_of_few,
)
from vapi_fast.evaluation.networks import FeatureNetwork, inception_network, tiny_network
from vapi_fast.models import LPIPS, catalog
from vapi_fast.runtime.checkpoint import write_atomically
from vapi_fast.runtime.distributed import gather_rows, process_group, rank, world_size
from vapi_fast.runtime.errors import ConfigError, EvaluationError
from vapi_fast.runtime.ownership import not_written
from vapi_fast.runtime.packages import require
from vapi_fast.runtime.progress import progress_bar

CLIP_TEXT = "A photo depicts {}"
TINY_NAME = "the tiny preset's own network, not Inception: not comparable with published figures"


@dataclass(frozen=True)
class Report(Scores):
    """What `vapi-fast evaluate` measured; None where no CLIP score was asked for.

    clip_score: the mean of 100 cosines; its standard error is over captions, whose images err together.
    """

    seconds: float
    clip_score: float | None = None
    clip_score_se: float | None = None
    clip_network: str | None = None

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
                *([line("CLIP score", self.clip_score, self.clip_score_se)] if self.clip_network else []),
            ]
        )


def evaluate(config: EvaluateConfig) -> Report | None:
    """Score `config.samples` against `config.reference`; under torchrun the ranks share the images, and rank 0 reports.

    Raises:
        DataError: a file or folder that does not hold what it should.
        CheckpointError: the network's weights are missing, damaged or of another network.
        EvaluationError: sets too small or too different to be scored.
    """
    started = time.perf_counter()
    with process_group() as device:
        fit = clip_score(config, device) if config.clip_score else {}
        network = feature_network(config, device)
        samples = image_statistics(config.samples, config, network, device, "samples")
        reference = image_statistics(config.reference, config, network, device, "reference")
        if rank() > 0:
            return None
        check_widths(samples, reference)
        scores = compare(samples, reference, network.name)
        report = Report(**dataclasses.asdict(scores), seconds=time.perf_counter() - started, **fit)
        if config.output is not None:
            text = json.dumps(dataclasses.asdict(report), indent=1) + "\n"
            try:
                write_atomically(config.output, lambda temporary: temporary.write_text(text, "utf-8"), replace=False)
            except OSError as error:
                print(report)  # it took its time
                raise not_written(error, config.output.parent, "the scores stand above", len(text)) from error
    return report


def feature_network(config: EvaluateConfig, device: torch.device) -> FeatureNetwork:
    """Inception, or the preset's own classifier."""
    if not config.own_network:
        return inception_network(config.inception_weights, device)
    preset = catalog.entry(config.model)
    network = tiny_network(LPIPS.from_checkpoint(preset.files["vgg_weights"], preset.lpips).to(device))
    return network._replace(name=TINY_NAME)


def image_statistics(
    source: Path, config: EvaluateConfig, network: FeatureNetwork, device: torch.device, name: str
) -> ImageStatistics:
    """The statistics in `source`, features of the images in it, or both; statistics win for FID and sFID."""
    statistics = read_statistics(source)
    features = None
    if statistics is None or has_images(source):
        images = open_image_set(source, config.image_size, config.split)
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
        return ImageStatistics(features, Gaussian.fit(features.pooled), Gaussian.fit(features.spatial))
    if features is not None:
        for key, values in (("mu", features.pooled), ("mu_s", features.spatial)):
            if key in statistics and len(statistics[key]) != values.shape[1]:
                raise EvaluationError(
                    f"{source}: its {key} has {len(statistics[key])} features, those of {network.name} for its images "
                    f"are {values.shape[1]}: take statistics of the same network, or leave them out of the file"
                )
    on_device = {key: value.to(device) for key, value in statistics.items()}
    spatial = Gaussian(on_device["mu_s"], on_device["sigma_s"]) if "mu_s" in on_device else None
    return ImageStatistics(features, Gaussian(on_device["mu"], on_device["sigma"]), spatial)


def clip_score(config: EvaluateConfig, device: torch.device) -> dict[str, Any]:
    """How well the samples fit their captions, as fields of the report."""
    require(ConfigError, "--clip-score", "transformers")
    images, captions = captioned(config)
    clip = Clip.load(config.clip_network, device)

    def cosines(pixels: Tensor, first: int) -> tuple[Tensor]:
        texts = [CLIP_TEXT.format(caption) for caption in captions[first : first + len(pixels)]]
        return ((clip.images(pixels) * clip.texts(texts)).sum(-1),)

    (values,) = over_images(images, cosines, config.batch_size, device, "CLIP score")
    if not values.isfinite().all():
        raise EvaluationError(f"--clip-network {config.clip_network}: has no finite values for {config.samples}")
    by_caption: dict[str, list[float]] = {}
    for caption, value in zip(captions, values.tolist(), strict=True):
        by_caption.setdefault(caption, []).append(100 * value)
    mean, error = grouped_mean(list(by_caption.values()))
    return {"clip_score": mean, "clip_score_se": error, "clip_network": config.clip_network}


def captioned(config: EvaluateConfig) -> tuple[ImageSet, tuple[str, ...]]:
    """The samples, and the caption of each; raises ConfigError where there is not one for each."""
    images = open_image_set(config.samples, config.image_size, config.split)
    captions = images.captions if config.prompts is None else read_prompts(config.prompts, text_of)
    if not captions:
        raise ConfigError(
            f"--clip-score: {config.samples} does not say what its images are of: pass --prompts FILE, a caption a "
            "line in the order of the images"
        )
    if len(captions) != len(images):
        raise ConfigError(
            f"--prompts {config.prompts}: has {len(captions)} captions, and {config.samples} {len(images)} images: "
            "one for each is needed, in the order of the images"
        )
    if len(images) < world_size():
        raise EvaluationError(f"{config.samples} holds {len(images)} images: one for each process is needed")
    return images, captions


def extract(
    images: ImageSet, network: FeatureNetwork, batch_size: int, device: torch.device, name: str
) -> ImageFeatures:
    """Features of all images on every rank, in their order."""
    columns = over_images(
        images, lambda pixels, _: network.features(pixels / 127.5 - 1), batch_size, device, f"features ({name})"
    )
    return ImageFeatures(*columns)


def over_images(
    images: ImageSet,
    compute: Callable[[Tensor, int], Sequence[Tensor]],
    batch_size: int,
    device: torch.device,
    name: str,
) -> list[Tensor]:
    """What `compute` gives for all images, a row each, on every rank; each rank computes one run of them.

    compute: is given a batch uint8 `[n,3,H,W]` on `device` and the number of its first image.
    """
    start, stop = (len(images) * part // world_size() for part in (rank(), rank() + 1))
    parts: list[list[Tensor]] = []
    done = start
    with progress_bar(stop - start, desc=name, unit="image", disable=rank() > 0) as progress:
        for pixels in images.batches(start, stop, batch_size):
            parts.append([value.cpu() for value in compute(pixels.to(device), done)])
            done += len(pixels)
            progress.update(len(pixels))
    return [gather_rows(torch.cat(column)).to(device) for column in zip(*parts, strict=True)]


def check_widths(samples: ImageStatistics, reference: ImageStatistics) -> None:
    """Raise EvaluationError where the two sets' features are of different networks."""
    widths = [len(each.pooled.mean) for each in (samples, reference)]
    if widths[0] != widths[1]:
        raise EvaluationError(
            f"the samples have {widths[0]} features and the reference {widths[1]}: take statistics of the same network"
        )
    if samples.spatial is not None and reference.spatial is not None:
        widths = [len(each.spatial.mean) for each in (samples, reference)]
        if widths[0] != widths[1]:
            raise EvaluationError(
                f"the samples have {widths[0]} spatial features (mu_s) and the reference {widths[1]}: take statistics "
                "of the same network, or leave mu_s and sigma_s out of the file"
            )
