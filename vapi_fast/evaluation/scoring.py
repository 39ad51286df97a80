"""Score images on disk against a reference: FID, sFID, Inception Score, precision and recall, as the ADM evaluator.

That is `evaluations/evaluator.py` of openai/guided-diffusion (Dhariwal & Nichol 2021), whose reference files are read
as they are: their `mu`, `sigma` for FID, `mu_s`, `sigma_s` for sFID, and their images for precision and recall.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from vapi_fast import tiny
from vapi_fast.data.image_sets import ImageSet, has_images, open_image_set, read_statistics
from vapi_fast.evaluation.config import EvaluateConfig
from vapi_fast.evaluation.metrics import (
    NEIGHBOURS,
    Gaussian,
    ImageFeatures,
    ImageStatistics,
    Scores,
    compare,
    warn_of_few,
)
from vapi_fast.evaluation.networks import FeatureNetwork, inception_network, tiny_network
from vapi_fast.models import LPIPS
from vapi_fast.runtime.checkpoint import write_atomically
from vapi_fast.runtime.distributed import gather_rows, process_group, rank, world_size
from vapi_fast.runtime.errors import EvaluationError
from vapi_fast.runtime.ownership import not_written
from vapi_fast.runtime.progress import progress_bar

TINY_NAME = "the tiny preset's own network, not Inception: not comparable with published figures"


@dataclass(frozen=True)
class Report(Scores):
    """What `vapi-fast evaluate` measured."""

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
        samples = image_statistics(config.samples, config, network, device, "samples")
        reference = image_statistics(config.reference, config, network, device, "reference")
        if rank() > 0:
            return None
        check_widths(samples, reference)
        scores = compare(samples, reference, network.name)
        report = Report(**dataclasses.asdict(scores), seconds=time.perf_counter() - started)
        if config.output is not None:
            text = json.dumps(dataclasses.asdict(report), indent=1) + "\n"
            try:
                write_atomically(config.output, lambda temporary: temporary.write_text(text, "utf-8"), replace=False)
            except OSError as error:
                print(report)  # it took its time
                raise not_written(error, config.output.parent, "the scores stand above", len(text)) from error
    return report


def feature_network(config: EvaluateConfig, device: torch.device) -> FeatureNetwork:
    """Inception, or the tiny preset's own classifier."""
    if not config.is_tiny:
        return inception_network(config.inception_weights, device)
    network = tiny_network(LPIPS.from_checkpoint(tiny.FILES.perceptual, "tiny").to(device))
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


def extract(
    images: ImageSet, network: FeatureNetwork, batch_size: int, device: torch.device, name: str
) -> ImageFeatures:
    """Features of all images on every rank, in their order; each rank extracts one run of them."""
    start, stop = (len(images) * part // world_size() for part in (rank(), rank() + 1))
    parts: list[ImageFeatures] = []
    with progress_bar(stop - start, desc=f"features ({name})", unit="image", disable=rank() > 0) as progress:
        for pixels in images.batches(start, stop, batch_size):
            parts.append(ImageFeatures(*(value.cpu() for value in network.features(pixels.to(device) / 127.5 - 1))))
            progress.update(len(pixels))
    return ImageFeatures(*(gather_rows(torch.cat(column)).to(device) for column in zip(*parts, strict=True)))


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
