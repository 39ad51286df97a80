"""`evaluate` on files: every form of image set, statistics, and the figures against independent ones."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from vapi_fast import tiny
from vapi_fast.data.dataset import ImageData
from vapi_fast.data.image_sets import open_image_set, read_statistics
from vapi_fast.evaluation import metrics as evaluation
from vapi_fast.evaluation import networks, scoring
from vapi_fast.evaluation.scoring import EvaluateConfig, evaluate
from vapi_fast.models import LPIPS
from vapi_fast.runtime.errors import ConfigError, DataError, Error, EvaluationError


@pytest.fixture(scope="module")
def pixels(image_sets: None) -> np.ndarray:
    """300 training images of the tiny preset, uint8 [N,H,W,3]."""
    data = ImageData(tiny.FILES.train_images, 32)
    images = torch.stack([data.load(i)[0] for i in range(300)])
    return (images * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def npz(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(path, pixels)
    return path


@pytest.fixture(scope="module")
def features(pixels: np.ndarray) -> list[Tensor]:
    """Features and logits of the samples, and features of the held-out images, by the network itself."""
    network = LPIPS.from_checkpoint(tiny.FILES.perceptual, "tiny")
    held_out = ImageData(tiny.FILES.heldout_images, 32)
    reference = torch.stack([held_out.load(i)[0] for i in range(len(held_out))])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        parts = [*network.features_and_logits(images), network.features_and_logits(reference)[0]]
        spatial = [network.feature_maps(x)[-1][:, :2].flatten(1) for x in (images, reference)]
    return parts + spatial


def test_figures_are_those_of_the_networks_features(npz: Path, features: list[Tensor]) -> None:
    pooled, logits, reference, spatial, reference_spatial = features
    report = evaluate(EvaluateConfig(model="tiny", samples=npz))
    for metric, ours, a, b in (
        (identity(128), report.fid, reference, pooled),
        (identity(128), report.sfid, reference_spatial, spatial),
    ):
        metric.update(a.double(), real=True)
        metric.update(b.double(), real=False)
        assert ours == pytest.approx(metric.compute().item(), rel=1e-4)
    assert report.inception_score == pytest.approx(evaluation.inception_score(logits), rel=1e-5)
    assert (report.precision, report.recall) == pytest.approx(evaluation.precision_recall(reference, pooled), abs=0.01)
    assert (report.samples, report.reference_images) == (300, 428)
    assert report.fid_se > 0
    assert report.inception_score_se > 0
    assert "own network, not Inception" in report.feature_network
    assert f"FID              {report.fid:.2f} ± {report.fid_se:.2f}" in str(report)


def identity(width: int) -> FrechetInceptionDistance:
    network = nn.Identity()
    network.num_features = width
    return FrechetInceptionDistance(feature=network).set_dtype(torch.float64)


def test_every_form_holds_the_same_images(npz: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    labelled, flat, generated = tmp_path / "classes", tmp_path / "flat", tmp_path / "generated"
    for folder in (labelled / "a", labelled / "b", flat, generated / "images"):
        folder.mkdir(parents=True)
    for index, image in enumerate(pixels[:7]):
        for path in (labelled / ("a" if index < 3 else "b"), flat, generated / "images"):
            Image.fromarray(image).save(path / f"{index:06d}.png")
    (flat / ".000003.png.x.tmp.png").write_bytes(b"half")  # left by a writer that was killed
    listed = [{"file": f"images/{index:06d}.png"} for index in range(7)]
    (generated / "manifest.json").write_text(json.dumps({"images": listed}))
    (generated / "contact_sheet.png").write_bytes(b"no sample")
    np.savez_compressed(tmp_path / "packed.npz", pixels[:7], np.arange(7))  # arr_1: labels, as ADM's files have
    expected = torch.from_numpy(pixels[:7]).permute(0, 3, 1, 2)
    for source in (labelled, flat, generated, tmp_path / "packed.npz"):
        images = open_image_set(source, 32)
        assert len(images) == 7, source
        assert torch.equal(torch.cat(list(images.batches(0, 7, 3))), expected), source
        assert torch.equal(torch.cat(list(images.batches(2, 6, 3))), expected[2:6]), source
    assert [len(batch) for batch in open_image_set(npz, 32).batches(0, 300, 128)] == [128, 128, 44]


def statistics(pooled: Tensor, spatial: Tensor) -> dict[str, np.ndarray]:
    means = {"mu": pooled.mean(0).numpy(), "mu_s": spatial.mean(0).numpy()}
    return means | {"sigma": np.cov(pooled.T.numpy()), "sigma_s": np.cov(spatial.T.numpy())}


def test_statistics_stand_for_images(npz: Path, pixels: np.ndarray, features: list[Tensor], tmp_path: Path) -> None:
    """A statistics file gives FID and sFID alone; with images in it, as ADM's references have, all scores."""
    pooled, _, reference, spatial, reference_spatial = features
    to_positions_first = [x.view(-1, 2, 64).transpose(1, 2).flatten(1) for x in (spatial, reference_spatial)]
    np.savez(tmp_path / "reference.npz", **statistics(reference, to_positions_first[1]))
    np.savez(tmp_path / "both.npz", arr_0=pixels[:50], **statistics(reference, to_positions_first[1]))
    np.savez(tmp_path / "samples.npz", **statistics(pooled, to_positions_first[0]))
    whole = evaluate(EvaluateConfig(model="tiny", samples=npz))
    for name in ("reference.npz", "both.npz"):
        report = evaluate(EvaluateConfig(model="tiny", samples=npz, reference=tmp_path / name))
        assert report.fid == pytest.approx(whole.fid, rel=1e-4)
        assert report.sfid == pytest.approx(whole.sfid, rel=1e-4)
        assert report.fid_se == pytest.approx(whole.fid_se, rel=1e-3)
        if name == "both.npz":
            assert (report.recall, report.reference_images) == (1.0, 50)  # its images are among the samples
        else:
            assert report.precision is report.recall is report.reference_images is None
            assert "precision        not known from statistics alone" in str(report)
    report = evaluate(
        EvaluateConfig(model="tiny", samples=tmp_path / "samples.npz", reference=tmp_path / "reference.npz")
    )
    assert report.fid == pytest.approx(whole.fid, rel=1e-4)
    assert report.inception_score is report.fid_se is None


def test_few_samples_warn_with_the_number_needed(pixels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", pixels[:60])
    with pytest.warns(UserWarning, match=r"FID from 60 samples of 128 features.*at least 129 samples, better 1280"):
        report = evaluate(EvaluateConfig(model="tiny", samples=tmp_path / "few.npz"))
    assert np.isfinite([report.fid, report.sfid, report.fid_se, report.inception_score]).all()
    np.savez(tmp_path / "none.npz", pixels[:3])
    with pytest.raises(EvaluationError, match="holds 3 images: at least 4"):
        evaluate(EvaluateConfig(model="tiny", samples=tmp_path / "none.npz"))


def test_other_models_are_scored_by_inception(
    pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(networks, "load_inception", lambda weights: loaded.append(weights) or FlatNetwork())
    np.savez(tmp_path / "a.npz", pixels[:150])
    np.savez(tmp_path / "b.npz", pixels[150:])
    (tmp_path / "weights.pth").touch()
    config = EvaluateConfig(
        samples=tmp_path / "a.npz", reference=tmp_path / "b.npz", inception_weights=tmp_path / "weights.pth"
    )
    report = evaluate(config)
    a, b = (torch.from_numpy(x).double().mean((1, 2)) for x in (pixels[:150], pixels[150:]))
    assert report.fid == pytest.approx(evaluation.frechet_distance(b, a), rel=1e-4)
    assert report.feature_network == "Inception-v3"
    assert loaded == [tmp_path / "weights.pth"]


class FlatNetwork(nn.Module):
    """Mean colours instead of Inception's features."""

    def image_features(self, images: Tensor) -> scoring.ImageFeatures:
        colours = (images * 127.5 + 127.5).mean((2, 3))
        return scoring.ImageFeatures(colours, colours, colours / 100)


@pytest.mark.parametrize(
    "damage", ["truncated", "text", "flipped", "packed", "no array", "float", "pickled", "grey", "missing"]
)
def test_a_bad_npz_is_one_line(npz: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bad.npz"
    content = bytearray(npz.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1")
    elif damage == "flipped":
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    elif damage == "packed":
        np.savez_compressed(path, np.arange(5 * 32 * 32 * 3, dtype=np.uint8).reshape(5, 32, 32, 3))
        content = bytearray(path.read_bytes())
        content[200:260] = bytes(60)
        path.write_bytes(content)
    elif damage == "no array":
        np.savez(path, images=np.zeros((5, 8, 8, 3), np.uint8))
    elif damage == "float":
        np.savez(path, np.zeros((5, 8, 8, 3), np.float32))
    elif damage == "pickled":
        np.savez(path, np.array([{"a": 1}], dtype=object))
    elif damage == "grey":
        np.savez(path, np.zeros((5, 8, 8), np.uint8))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", b"not an array")
    with pytest.raises(DataError, match=str(path)) as caught:
        evaluate(EvaluateConfig(model="tiny", samples=path))
    assert "\n" not in str(caught.value)
    assert "pickle" not in str(caught.value)


NO_COVARIANCES = (
    {"sigma": np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])},
    {"sigma": np.diag([1.0, 1.0, -0.1])},
    {"sigma": np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])},
    {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
)


def test_a_covariance_may_be_singular_and_rounded(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 40)) * np.geomspace(1, 1e-3, 40)
    for index, sigma in enumerate((np.cov(rows.T).astype(np.float32), np.zeros((40, 40)))):
        np.savez(tmp_path / f"{index}.npz", mu=np.zeros(40), sigma=sigma)
        assert read_statistics(tmp_path / f"{index}.npz")["sigma"].shape == (40, 40)


def test_statistics_of_another_width_than_the_features_are_one_line(
    npz: Path, pixels: np.ndarray, features: list[Tensor], tmp_path: Path
) -> None:
    right = statistics(features[0], features[3])
    for narrow, message in (
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "its mu has 3 features, those of .* are 128: take statistics of the"),
        ({"mu_s": np.zeros(3), "sigma_s": np.eye(3)}, "its mu_s has 3 features, those of .* are 128: take"),
    ):
        np.savez(tmp_path / "both.npz", arr_0=pixels[:10], **(right | narrow))
        with pytest.raises(EvaluationError, match=message) as caught:
            evaluate(EvaluateConfig(model="tiny", samples=tmp_path / "both.npz", reference=tmp_path / "both.npz"))
        assert "\n" not in str(caught.value)
    np.savez(tmp_path / "reference.npz", **(right | {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}))
    with pytest.raises(EvaluationError, match=r"samples have 128 spatial features \(mu_s\) and the reference 3: take"):
        evaluate(EvaluateConfig(model="tiny", samples=npz, reference=tmp_path / "reference.npz"))


def test_bad_statistics_are_one_line(npz: Path, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    for wrong in (
        {"sigma": np.eye(2)},
        {"mu": np.full(3, np.nan)},
        {"mu_s": np.zeros(2)},
        {"mu": np.array([None])},
        *NO_COVARIANCES,
    ):
        np.savez(path, **(good | wrong))
        with pytest.raises(DataError, match=str(path)) as caught:
            read_statistics(path)
        assert "\n" not in str(caught.value)
    np.savez(path, **good)
    with pytest.raises(EvaluationError, match="the samples have 128 features and the reference 3"):
        evaluate(EvaluateConfig(model="tiny", samples=npz, reference=path))


def test_a_folder_that_cannot_be_scored_is_one_line(tmp_path: Path, pixels: np.ndarray) -> None:
    for size, name in ((32, "a"), (32, "b"), (16, "c"), (32, "d")):
        Image.new("RGB", (size, size)).save(tmp_path / f"{name}.png")
    with pytest.raises(DataError, match=r"c.png is 16x16 pixels, others are 32x32"):
        evaluate(EvaluateConfig(model="tiny", samples=tmp_path))
    (tmp_path / "c.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read .*c.png"):
        evaluate(EvaluateConfig(model="tiny", samples=tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps({"images": [{"file": "images/0.png"}] * 9}))
    with pytest.raises(DataError, match="holds 0 of 9 samples: run the same vapi-fast generate again"):
        evaluate(EvaluateConfig(model="tiny", samples=tmp_path))
    np.savez(tmp_path / "large.npz", np.zeros((5, 64, 64, 3), np.uint8))
    with pytest.raises(EvaluationError, match="scores images of 32x32 pixels, got 64x64"):
        evaluate(EvaluateConfig(model="tiny", samples=tmp_path / "large.npz"))


def test_scores_replace_nothing_that_came_meanwhile(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(model="tiny", samples=npz, output=tmp_path / "scores.json")
    found = scoring.compare

    def meanwhile(*arguments: object) -> object:
        (tmp_path / "scores.json").write_text("precious")
        return found(*arguments)

    monkeypatch.setattr(scoring, "compare", meanwhile)
    with pytest.raises(Error, match=r"scores\.json could not be written: File exists.*the scores stand above"):
        evaluate(config)
    assert "FID  " in capsys.readouterr().out
    assert [path.read_text() for path in tmp_path.iterdir() if path.suffix == ".json"] == ["precious"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": None}, "--samples must be given, got None"),
        ({"model": "huge"}, "--model huge: unknown"),
        ({"model": "xxl"}, "--reference is required for --model xxl"),
        ({"inception_weights": Path("x.pth")}, "leave --inception-weights out"),
        ({"samples": Path("absent")}, "--samples absent: no such file"),
        ({"batch_size": 0}, "--batch-size must be between 1 and 10000000"),
        ({"output": Path(__file__)}, "exists: choose another name"),
    ],
)
def test_bad_options(npz: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**({"model": "tiny", "samples": npz} | changes))
