"""Scores against closed forms, torchmetrics and scipy; standard errors against repeated draws."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from vapi_fast.evaluation import metrics as evaluation


def normal(samples: int, width: int, seed: int) -> Tensor:
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean: Tensor, root: Tensor, samples: int, seed: int) -> Tensor:
    """Rows whose sample mean is exactly `mean` and whose unbiased sample covariance is exactly root rootᵀ."""
    rows = normal(samples, len(mean), seed)
    rows = rows - rows.mean(dim=0)
    whitened = torch.linalg.qr(rows).Q * math.sqrt(samples - 1)
    return whitened @ root.T + mean


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    mean_a, mean_b = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    scale_a, scale_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.25, 0.5]).double()
    reference = with_moments(mean_a, scale_a.diag(), 50, seed=0)
    features = with_moments(mean_b, scale_b.diag(), 80, seed=1)
    expected = (1 + 9 + 0) + (4 + 1.75**2 + 0)  # |μ_a − μ_b|² + Σ (σ_a − σ_b)²
    assert evaluation.frechet_distance(reference, features) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_correlated_gaussians_equals_torchmetrics_and_scipy() -> None:
    width = 16
    reference = with_moments(normal(1, width, 1)[0], normal(width, width, 2), 200, seed=3)
    features = with_moments(normal(1, width, 4)[0], normal(width, width, 5), 300, seed=6)
    distance = evaluation.frechet_distance(reference, features)

    cov_a, cov_b = np.cov(reference.numpy().T), np.cov(features.numpy().T)
    cross = scipy.linalg.sqrtm(cov_a @ cov_b).real
    shift = (reference.mean(0) - features.mean(0)).square().sum().item()
    assert distance == pytest.approx(shift + np.trace(cov_a + cov_b - 2 * cross), rel=1e-6)

    identity = nn.Identity()
    identity.num_features = width
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    metric.update(reference, real=True)
    metric.update(features, real=False)
    assert distance == pytest.approx(metric.compute().item(), rel=1e-8)


def test_frechet_distance_of_identical_sets_is_zero_and_never_negative() -> None:
    features = normal(100, 20, 0).float() * 30 + 100
    distance = evaluation.frechet_distance(features, features)
    assert 0 <= distance < 1e-6


def test_frechet_distance_of_float32_features_far_from_zero_keeps_its_digits() -> None:
    reference = with_moments(torch.full((4,), 1000.0).double(), torch.eye(4).double(), 400, seed=0)
    features = with_moments(torch.full((4,), 1000.5).double(), torch.eye(4).double(), 400, seed=1)
    assert evaluation.frechet_distance(reference.float(), features.float()) == pytest.approx(1.0, rel=1e-3)


def test_singular_covariance_warns_and_stays_finite() -> None:
    reference, features = normal(200, 32, 0), normal(10, 32, 1)
    with pytest.warns(UserWarning, match="10 samples of 32 features.*at least 33 samples"):
        distance = evaluation.frechet_distance(reference, features)
    cov_a, cov_b = reference.T.cov(), features.T.cov()
    root = torch.linalg.svdvals(torch.linalg.cholesky(cov_a).T @ (features - features.mean(0)).T / 3).sum()
    expected = (reference.mean(0) - features.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    assert distance == pytest.approx(expected.item(), rel=1e-6)


def test_the_covariance_is_of_full_rank_from_one_sample_more_than_features() -> None:
    with pytest.warns(UserWarning, match="singular"):
        evaluation.frechet_distance(normal(33, 32, 0), normal(32, 32, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation.frechet_distance(normal(33, 32, 0), normal(33, 32, 1))


@pytest.mark.parametrize("classes", [2, 7])
def test_inception_score_of_sure_and_balanced_predictions_is_the_number_of_classes(classes: int) -> None:
    logits = 1000 * torch.eye(classes).repeat(5, 1)
    assert evaluation.inception_score(logits) == pytest.approx(classes, rel=1e-12)


def test_inception_score_is_the_mean_over_splits_in_order() -> None:
    """Splits of sure predictions for 3, 3 and 1 classes: (3 + 3 + 1) / 3, where all samples together give 3."""
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 1])
    logits = 1000 * torch.eye(3)[labels]
    assert evaluation.inception_score(logits, split_size=3) == pytest.approx(7 / 3, rel=1e-12)
    assert evaluation.inception_score(logits[:6]) == pytest.approx(3, rel=1e-12)


def test_inception_score_of_equal_predictions_is_one() -> None:
    assert evaluation.inception_score(torch.tensor([[0.3, 2.0, -1.0]]).repeat(9, 1)) == pytest.approx(1, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`:UserWarning", "ignore:std\\(\\):UserWarning")
def test_inception_score_equals_torchmetrics() -> None:
    logits = normal(300, 11, 0) * 3
    metric = InceptionScore(feature=nn.Identity(), splits=1)
    metric.update(logits)
    assert evaluation.inception_score(logits) == pytest.approx(metric.compute()[0].item(), rel=1e-9)


def test_precision_and_recall_of_identical_and_of_distant_sets() -> None:
    reference = normal(40, 5, 0)
    assert evaluation.precision_recall(reference, reference) == (1.0, 1.0)
    assert evaluation.precision_recall(reference, reference + 100) == (0.0, 0.0)


def test_precision_and_recall_count_points_inside_the_balls() -> None:
    """With one neighbour, the reference 0, 1, 10, 12 has radii 1, 1, 2, 2 and the generated set 0.5, 0.5, 19."""
    reference = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    features = torch.tensor([[0.5], [1.0], [20.0]])
    precision, recall = evaluation.precision_recall(reference, features, neighbours=1)
    assert precision == pytest.approx(2 / 3)  # 0.5 and 1.0 are inside, 20 is 8 away from the nearest centre
    assert recall == 1.0  # the outlier's ball of radius 19 swallows 1 … 39, and 0 is 0.5 from 0.5
    # a mode left out costs recall, never precision
    features = torch.tensor([[0.0], [1.0], [0.5]])
    assert evaluation.precision_recall(reference, features, neighbours=1) == (1.0, 0.5)


def test_precision_and_recall_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, features = normal(50, 3, 0), normal(61, 3, 1) * 1.5
    whole = evaluation.precision_recall(reference, features)
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    assert evaluation.precision_recall(reference, features) == whole
    assert 0.3 < whole[0] < 1


def test_score_agrees_with_the_single_metrics_and_is_reproducible() -> None:
    reference, features, logits = normal(90, 6, 0), normal(70, 6, 1) + 0.5, normal(70, 4, 2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    result = evaluation.score(reference, features, logits, feature_network="noise")
    assert torch.equal(torch.get_rng_state(), before)  # measuring must not change the run it measures
    assert result.fid == evaluation.frechet_distance(reference, features)
    assert result.inception_score == evaluation.inception_score(logits)
    assert (result.precision, result.recall) == evaluation.precision_recall(reference, features)
    assert (result.samples, result.feature_network) == (70, "noise")
    assert result == evaluation.score(reference, features, logits, feature_network="noise")
    assert result.fid_se != evaluation.score(reference, features, logits, seed=1).fid_se


def test_bootstrap_weighs_samples_as_if_they_were_repeated() -> None:
    features, logprobs = normal(12, 3, 0), normal(12, 4, 1).log_softmax(dim=1)
    counts = torch.tensor([0, 3, 1, 1, 0, 2, 1, 0, 1, 1, 1, 1])
    repeated, ones = features.repeat_interleave(counts, dim=0), torch.ones(12, dtype=torch.long)
    weighted, fitted = evaluation.Gaussian.fit(features, counts), evaluation.Gaussian.fit(repeated)
    torch.testing.assert_close(weighted.mean, fitted.mean)
    torch.testing.assert_close(weighted.covariance, fitted.covariance)
    torch.testing.assert_close(
        evaluation._inception_score(logprobs, counts),
        evaluation._inception_score(logprobs.repeat_interleave(counts, dim=0), ones),
    )


def test_standard_errors_match_the_spread_of_repeated_draws() -> None:
    width, samples, draws = 8, 400, 60
    reference = normal(2000, width, 0)
    mixing = normal(width, width, 1) / 2
    results = []
    for seed in range(draws):
        features = normal(samples, width, 100 + seed) @ mixing + 0.3
        results.append(evaluation.score(reference, features, 2 * features[:, :5]))
    for name in ("fid", "inception_score"):
        spread = np.std([getattr(result, name) for result in results], ddof=1)
        estimate = np.mean([getattr(result, f"{name}_se") for result in results])
        assert estimate == pytest.approx(spread, rel=0.3)  # 60 draws know the spread to 9 %


@pytest.mark.parametrize(
    ("reference", "features", "logits", "message"),
    [
        ((9, 2), (1, 2), (1, 3), "features of at least 2 samples are needed, got 1"),
        ((1, 2), (9, 2), (9, 3), "reference features of at least 2 samples"),
        ((9, 2), (9, 3), (9, 3), "reference features are 2 wide and features 3"),
        ((9, 2), (9, 2), (8, 3), "logits of 8 samples given with features of 9"),
        ((9, 2, 1), (9, 2), (9, 3), r"got shape \[9, 2, 1\]"),
        ((9, 2), (3, 2), (3, 3), "3 neighbours need 4 samples, got 3"),
    ],
)
def test_bad_shapes_raise_one_line(reference: tuple, features: tuple, logits: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        evaluation.score(torch.rand(reference), torch.rand(features), torch.rand(logits))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_values_that_are_not_finite_raise(value: float, which: int) -> None:
    inputs = [normal(20, 3, 0), normal(20, 3, 1), normal(20, 4, 2)]
    inputs[which][5, 1] = value
    with pytest.raises(ValueError, match="of 1 samples are not finite"):
        evaluation.score(*inputs)


def test_bootstrap_needs_two_resamples() -> None:
    with pytest.raises(ValueError, match="at least 2 resamples"):
        evaluation.score(normal(9, 2, 0), normal(9, 2, 1), normal(9, 3, 2), bootstrap=1)
