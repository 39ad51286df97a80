"""FID, Inception Score, precision and recall from features, with standard errors.

The distance is written here rather than taken from torchmetrics because the bootstrap needs it many times: a symmetric
eigenproblem is about 5 to 20 times faster than torchmetrics' general one, and torchmetrics' Inception Score shuffles
with the global random state. The tests hold both to torchmetrics' values.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from vapi_fast.checkpoint import load_file_checked

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
CHUNK = 1024  # rows of a distance matrix held at once: 1024 × 50 000 float64 is 0.4 GB


class EvaluationError(RuntimeError):
    """The network that scores samples is not available; the message says what to install or pass."""


@dataclass(frozen=True)
class Scores:
    """A generator's scores. `fid_se` and `inception_score_se` are standard errors over the generated samples alone."""

    fid: float
    fid_se: float
    inception_score: float
    inception_score_se: float
    precision: float
    recall: float
    samples: int
    feature_network: str


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
    Standard errors are the standard deviation over `bootstrap` resamples (with replacement) of the generated samples;
    the reference set stays fixed. Only the spread is taken from the resamples: their mean FID is biased upwards.
    Raises ValueError for fewer than 4 samples, non-finite values or sizes that do not match; warns when a set has too
    few samples for a covariance of full rank.
    """
    _check(reference_features, features)
    _check_matrix("logits", logits)
    if len(logits) != len(features):
        raise ValueError(
            f"logits of {len(logits)} samples given with features of {len(features)}; give one row for each"
        )
    if bootstrap < 2:
        raise ValueError(f"bootstrap must be at least 2 resamples to show a spread, got {bootstrap}")
    samples, device = len(features), features.device
    reference, features = _Gaussian(reference_features), features.double()
    logprobs = logits.double().log_softmax(dim=1)
    everyone = torch.ones(samples, dtype=torch.long, device=device)
    generator = torch.Generator().manual_seed(seed)
    fids, inception_scores = [], []
    for _ in range(bootstrap):
        drawn = torch.randint(samples, (samples,), generator=generator)
        counts = drawn.bincount(minlength=samples).to(device)
        fids.append(reference.distance(features, counts))
        inception_scores.append(_inception_score(logprobs, counts))
    precision, recall = precision_recall(reference_features, features)
    return Scores(
        fid=float(reference.distance(features, everyone)),
        fid_se=float(torch.stack(fids).std()),
        inception_score=float(_inception_score(logprobs, everyone)),
        inception_score_se=float(torch.stack(inception_scores).std()),
        precision=precision,
        recall=recall,
        samples=samples,
        feature_network=feature_network,
    )


def frechet_distance(reference_features: Tensor, features: Tensor) -> float:
    """Fréchet distance (FID) between Gaussians fitted to features [M, F] and [N, F], computed in float64.

    |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), with unbiased covariances (Heusel et al. 2017, arXiv 1706.08500).
    Raises ValueError for fewer than 2 samples, non-finite features or different widths; warns when a covariance is
    singular for lack of samples: the number is then finite but strongly biased upwards.
    """
    _check(reference_features, features)
    everyone = torch.ones(len(features), dtype=torch.long, device=features.device)
    return float(_Gaussian(reference_features).distance(features.double(), everyone))


def inception_score(logits: Tensor) -> float:
    """Inception Score exp(E_x KL(p(y|x) ‖ p(y))) of classifier logits [N, K] (Salimans et al. 2016, arXiv 1606.03498).

    All samples form one split, so the score is deterministic and does not lose with small N; the common ten splits of
    5 000 differ from it by their smaller size only. Raises ValueError for fewer than 2 samples or non-finite logits.
    """
    _check_matrix("logits", logits)
    everyone = torch.ones(len(logits), dtype=torch.long, device=logits.device)
    return float(_inception_score(logits.double().log_softmax(dim=1), everyone))


def precision_recall(reference_features: Tensor, features: Tensor, neighbours: int = 3) -> tuple[float, float]:
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


class Inception(nn.Module):
    """torch-fidelity's InceptionV3 (the original FID weights) behind `features_and_logits`."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pool features [N, 2048] and unbiased logits [N, 1008] of images [N, 3, H, W] in [−1, 1], seen as 8-bit."""
        pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        features, logits = self.extractor(pixels)
        return features, logits


def load_inception(weights: str | Path | None = None) -> Inception:
    """The Inception network FID is defined by, from the optional package torch-fidelity.

    `weights` is its weight file; None takes torch.hub's cached copy or downloads it. Raises EvaluationError when the
    package or the weights are not there, CheckpointError when the file is damaged.
    """
    absent = [package for package in ("torch_fidelity", "torchvision") if find_spec(package) is None]
    if absent:
        raise EvaluationError(
            f"FID needs the Inception network, but {' and '.join(absent)} cannot be found; "
            "run pip install 'vapi-fast[eval]' (torch-fidelity and torchvision), or pass --no-eval"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights is not None:
        load_file_checked(weights)  # torch-fidelity unpickles anything; this refuses what is not plain weights
    try:
        extractor = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], None if weights is None else str(weights)
        )
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        place = weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        raise EvaluationError(
            f"the Inception weights did not load ({reason}); put torch-fidelity's {INCEPTION_FILE} at {place}, "
            "or pass --no-eval"
        ) from error
    return Inception(extractor)


class _Gaussian:
    """Mean and covariance root of the reference set, factored once for all distances to it."""

    def __init__(self, features: Tensor) -> None:
        features = features.double()
        eigenvalues, vectors = torch.linalg.eigh(features.T.cov())
        self.mean = features.mean(dim=0)
        self.root = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, features: Tensor, counts: Tensor) -> Tensor:
        """Fréchet distance to float64 features [N, F], row n taken counts[n] times; Σ counts ≥ 2."""
        weights = counts.double()
        mean = weights @ features / weights.sum()
        covariance = features.T.cov(fweights=counts)
        # Tr (Σ_a Σ_b)^½ through the symmetric Σ_a^½ Σ_b Σ_a^½: its eigenvalues are real and, but for rounding, ≥ 0
        eigenvalues = torch.linalg.eigvalsh(self.root @ covariance @ self.root)
        trace = self.root.square().sum() + covariance.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
        return ((self.mean - mean).square().sum() + trace).clamp(min=0)


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
    fewest, width = min(len(reference_features), len(features)), features.shape[1]
    if fewest <= width:
        warnings.warn(
            f"FID from {fewest} samples of {width} features: the covariance is singular and the distance biased; "
            f"use at least {width + 1} samples, better {10 * width}",
            stacklevel=3,
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
