"""FID, Inception Score, precision and recall from features, with standard errors.

The distance is written here rather than taken from torchmetrics because the bootstrap needs it many times: a symmetric
eigenproblem is about 5 to 20 times faster than torchmetrics' general one, and torchmetrics' Inception Score shuffles
with the global random state. The tests hold both to torchmetrics' values.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from vapi_fast.runtime.errors import EvaluationError

CHUNK = 1024  # rows of a distance matrix held at once: 1024 × 50 000 float64 is 0.4 GB
NEIGHBOURS = 3  # of precision and recall
SPLIT_SIZE = 5000  # samples of one Inception Score, as the ADM evaluator splits them


class ImageFeatures(NamedTuple):
    """What scores are computed from, one row an image: FID, sFID and Inception Score in this order."""

    pooled: Tensor  # [N, F]
    spatial: Tensor  # [N, S], positions major, channels minor
    logits: Tensor  # [N, K]


@dataclass(frozen=True)
class Scores:
    """Generated samples against a reference; None where statistics without images cannot tell.

    `fid_se` and `inception_score_se` are standard errors over the generated samples alone.
    """

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


@dataclass(frozen=True)
class ImageStatistics:
    """What is known of one set of images: features, Gaussians, or both."""

    features: ImageFeatures | None
    pooled: Gaussian
    spatial: Gaussian | None = None

    @property
    def count(self) -> int | None:
        return None if self.features is None else len(self.features.pooled)


def score(
    reference_features: Tensor,
    features: Tensor,
    logits: Tensor,
    *,
    bootstrap: int = 20,
    seed: int = 0,
    feature_network: str = "",
) -> Scores:
    """Measure generated samples against reference images.

    `reference_features` is [M, F], `features` [N, F] and `logits` [N, K] of the generated samples, on one device.
    `bootstrap` and `seed` are those of `standard_errors`. Raises ValueError for fewer than 4 samples, non-finite values
    or sizes that do not match; warns when a set has too few samples for a covariance of full rank.
    """
    _check(reference_features, features)
    _check_matrix("logits", logits)
    if len(logits) != len(features):
        raise ValueError(
            f"logits of {len(logits)} samples given with features of {len(features)}; give one row for each"
        )
    none = features[:, :0]
    samples = ImageStatistics(ImageFeatures(features, none, logits), Gaussian.fit(features))
    reference = ImageStatistics(ImageFeatures(reference_features, none, none), Gaussian.fit(reference_features))
    return compare(samples, reference, feature_network, bootstrap=bootstrap, seed=seed)


def compare(
    samples: ImageStatistics, reference: ImageStatistics, feature_network: str, *, bootstrap: int = 20, seed: int = 0
) -> Scores:
    """All scores that the two sets allow; their features are as wide."""
    errors: tuple[float | None, float | None] = (None, None)
    sfid = precision = recall = quality = None
    if samples.features is not None:
        drawn, logits = samples.features.pooled, samples.features.logits
        errors = standard_errors(reference.pooled, drawn, logits, bootstrap=bootstrap, seed=seed)
        quality = inception_score(logits)
        if reference.features is not None:
            precision, recall = precision_recall(reference.features.pooled, drawn)
    if samples.spatial is not None and reference.spatial is not None:
        sfid = float(reference.spatial.distance(samples.spatial))
    fid = float(reference.pooled.distance(samples.pooled))
    if not math.isfinite(fid) or not math.isfinite(sfid or 0.0):
        raise EvaluationError("the sets' features are too large or too far apart for a distance: check the images")
    return Scores(
        fid=fid,
        fid_se=errors[0],
        sfid=sfid,
        inception_score=quality,
        inception_score_se=errors[1],
        precision=precision,
        recall=recall,
        samples=samples.count,
        reference_images=reference.count,
        feature_network=feature_network,
    )


def standard_errors(
    reference: Gaussian, features: Tensor, logits: Tensor, *, bootstrap: int = 20, seed: int = 0
) -> tuple[float, float]:
    """Standard errors of FID and Inception Score: their spread over resamples (with replacement) of the samples.

    The reference stays fixed. Only the spread is taken from the resamples: their mean FID is biased upwards.
    """
    if bootstrap < 2:
        raise ValueError(f"bootstrap must be at least 2 resamples to show a spread, got {bootstrap}")
    samples, logprobs = len(features), logits.double().log_softmax(dim=1)
    generator = torch.Generator().manual_seed(seed)
    fids, inception_scores = [], []
    for _ in range(bootstrap):
        drawn = torch.randint(samples, (samples,), generator=generator)
        counts = drawn.bincount(minlength=samples).to(features.device)
        fids.append(reference.distance(Gaussian.fit(features, counts)))
        inception_scores.append(_inception_score(logprobs, counts))
    return float(torch.stack(fids).std()), float(torch.stack(inception_scores).std())


def frechet_distance(reference_features: Tensor, features: Tensor) -> float:
    """Fréchet distance (FID) between Gaussians fitted to features [M, F] and [N, F], computed in float64.

    |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), with unbiased covariances (Heusel et al. 2017, arXiv 1706.08500).
    Raises ValueError for fewer than 2 samples, non-finite features or different widths; warns when a covariance is
    singular for lack of samples: the number is then finite but strongly biased upwards.
    """
    _check(reference_features, features)
    return float(Gaussian.fit(reference_features).distance(Gaussian.fit(features)))


def inception_score(logits: Tensor, split_size: int = SPLIT_SIZE) -> float:
    """Inception Score exp(E_x KL(p(y|x) ‖ p(y))) of classifier logits [N, K] (Salimans et al. 2016, arXiv 1606.03498).

    The mean over splits of `split_size` consecutive samples (the last may be smaller), as the ADM evaluator has it.
    Raises ValueError for fewer than 2 samples or non-finite logits.
    """
    _check_matrix("logits", logits)
    splits = logits.double().log_softmax(dim=1).split(split_size)
    return float(torch.stack([_inception_score(part, part.new_ones(len(part))) for part in splits]).mean())


def precision_recall(reference_features: Tensor, features: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall of features [N, F] against reference [M, F] (Kynkäänniemi et al. 2019, 1904.06991).

    A set's manifold is the union of balls around its points, each reaching to the point's `neighbours`-th nearest
    other point. Precision is the share of generated samples inside the reference manifold, recall the share of
    reference samples inside the generated one. Raises ValueError unless both sets have more than `neighbours` samples.
    """
    _check_features(reference_features, features)
    fewest = min(len(reference_features), len(features))
    if fewest <= neighbours:
        raise ValueError(
            f"precision and recall with {neighbours} neighbours need {neighbours + 1} samples, got {fewest}"
        )
    # float64 about a common centre: distances come from |a|² + |b|² − 2ab, which cancels badly far from the origin
    reference = reference_features.double()
    centre = reference.mean(dim=0)
    reference, features = reference - centre, features.double() - centre
    precision = _covered(features, reference, _radii(reference, neighbours))
    recall = _covered(reference, features, _radii(features, neighbours))
    return precision, recall


def grouped_mean(groups: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """The mean of all values, and its standard error where those of a group err together; None of a single group."""
    count = sum(map(len, groups))
    mean = sum(map(sum, groups)) / count
    squares = sum((sum(each) - mean * len(each)) ** 2 for each in groups)
    return mean, math.sqrt(squares * len(groups) / (len(groups) - 1)) / count if len(groups) > 1 else None


class Gaussian:
    """Mean [F] and covariance [F, F] of features, in float64; the covariance is factored once for all distances."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean = mean.double()
        self.covariance = covariance.double()

    @classmethod
    def fit(cls, features: Tensor, counts: Tensor | None = None) -> Gaussian:
        """Mean and unbiased covariance of features [N, F], row n taken counts[n] times; Σ counts ≥ 2."""
        features = features.double()
        weights = features.new_ones(len(features)) if counts is None else counts.double()
        return cls(weights @ features / weights.sum(), features.T.cov(fweights=counts))

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance."""
        eigenvalues, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, other: Gaussian) -> Tensor:
        """Fréchet distance, 0-d; factors this covariance, not the other's."""
        # Tr (Σ_a Σ_b)^½ through the symmetric Σ_a^½ Σ_b Σ_a^½: its eigenvalues are real and, but for rounding, ≥ 0
        eigenvalues = torch.linalg.eigvalsh(self.root @ other.covariance @ self.root)
        trace = self.covariance.trace() + other.covariance.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
        return ((self.mean - other.mean).square().sum() + trace).clamp(min=0)


def _inception_score(logprobs: Tensor, counts: Tensor) -> Tensor:
    """Inception Score of float64 log-probabilities [N, K], row n taken counts[n] times."""
    probs, weights = logprobs.exp(), counts.double() / counts.sum()
    marginal = weights @ probs
    mean_negative_entropy = weights @ (probs * logprobs).sum(dim=1)
    return (mean_negative_entropy - torch.xlogy(marginal, marginal).sum()).exp()


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance from each point to its `neighbours`-th nearest other point; the nearest of all is the point itself."""
    nearest = [torch.cdist(rows, features).topk(neighbours + 1, largest=False).values for rows in features.split(CHUNK)]
    return torch.cat(nearest)[:, -1]


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(torch.cdist(rows, centres) <= radii).any(dim=1) for rows in points.split(CHUNK)]
    return float(torch.cat(inside).double().mean())


def _check(reference_features: Tensor, features: Tensor) -> None:
    _check_features(reference_features, features)
    warn_of_few(min(len(reference_features), len(features)), features.shape[1], stacklevel=4)


def warn_of_few(samples: int, width: int, metric: str = "FID", stacklevel: int = 3) -> None:
    """Warn when a covariance of `width` features has too few samples for full rank."""
    if samples <= width:
        warnings.warn(
            f"{metric} from {samples} samples of {width} features: the covariance is singular and the distance biased; "
            f"use at least {width + 1} samples, better {10 * width}",
            stacklevel=stacklevel,
        )


def _check_features(reference_features: Tensor, features: Tensor) -> None:
    _check_matrix("reference features", reference_features)
    _check_matrix("features", features)
    if reference_features.shape[1] != features.shape[1]:
        raise ValueError(
            f"reference features are {reference_features.shape[1]} wide and features {features.shape[1]}; "
            "extract both with the same network"
        )


def _check_matrix(name: str, values: Tensor) -> None:
    if values.ndim != 2:
        raise ValueError(f"{name} must be a matrix with one row a sample, got shape {list(values.shape)}")
    if len(values) < 2:
        raise ValueError(f"{name} of at least 2 samples are needed, got {len(values)}")
    if not values.isfinite().all():
        raise ValueError(
            f"{name} of {int((~values.isfinite()).any(dim=1).sum())} samples are not finite; check the images"
        )
