"""Measuring a generator: the same test for both, whatever the batch size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from vapi_fast import AlignConfig
from vapi_fast.alignment import measurement
from vapi_fast.alignment.measurement import Evaluator
from vapi_fast.alignment.models import Models, load_models
from vapi_fast.alignment.report import tasks_table
from vapi_fast.evaluation import metrics as evaluation
from vapi_fast.evaluation import networks
from vapi_fast.evaluation.config import EvaluateConfig
from vapi_fast.evaluation.inception import InceptionV3
from vapi_fast.evaluation.metrics import ImageFeatures
from vapi_fast.evaluation.scene_judge import SceneJudge
from vapi_fast.evaluation.scoring import evaluate
from vapi_fast.generation.config import GenerateConfig
from vapi_fast.generation.folder import Sampler

Make = Callable[..., AlignConfig]


@pytest.fixture(autouse=True)
def few_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr(measurement, "REWARD_IMAGES", 24)


def evaluator(config: AlignConfig, models: Models) -> Evaluator:
    return Evaluator(config, models, torch.device("cpu"))


def test_measurement_does_not_depend_on_batch_sizes(tiny_config: Make, tiny_models: Models) -> None:
    measured = [
        evaluator(tiny_config(eval_samples=130, eval_batch=batch, micro_batch=micro), tiny_models)
        .measure(tiny_models.generator, "base")
        .as_record()
        for batch, micro in ((130, 32), (48, 10))
    ]
    first, second = measured
    assert first["fid"] == pytest.approx(second["fid"], rel=1e-3)
    assert first["cfg"]["inception_score"] == pytest.approx(second["cfg"]["inception_score"], rel=1e-3)
    assert first["reward"] == pytest.approx(second["reward"], rel=1e-3)
    assert first["samples"] == 130


@pytest.mark.parametrize("micro_batch", [10, 24])
def test_entropy_and_cross_entropy_are_those_of_a_plain_computation(
    tiny_config: Make, tiny_models: Models, micro_batch: int
) -> None:
    """In float64, by their definitions, over all positions of the first held-out images; at temperature 1 always."""
    test = evaluator(tiny_config(eval_samples=24, micro_batch=micro_batch, temperature=0.7), tiny_models)
    found = test.held_out(tiny_models.generator, 0.7)
    images = torch.cat([batch.images for batch in test.rewarded])
    labels = torch.cat([batch.labels for batch in test.rewarded])
    assert len(images) == 24
    tokens = tiny_models.codec.encode(images)
    with torch.no_grad():
        logits = copy.deepcopy(tiny_models.generator).double().eval()(tokens[:, :-1], labels)
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    cross_entropy = -probabilities.gather(-1, tokens[..., None]).log().mean()
    assert found.entropy == pytest.approx(float(entropy), rel=1e-5)
    assert found.cross_entropy == pytest.approx(float(cross_entropy), rel=1e-5)


def test_a_temperature_makes_samples_and_rollouts_sharper(tiny_config: Make, tiny_models: Models) -> None:
    """By default samples are drawn at 1, and rollouts at the configuration's temperature; entropy stays at 1."""
    test = evaluator(tiny_config(eval_samples=24, temperature=0.8), tiny_models)
    generator, drawn = tiny_models.generator, []
    draw = test.draw
    test.draw = lambda *arguments: (drawn.append(arguments[3]), draw(*arguments))[1]
    plain, sharp = test.measure(generator, "base"), test.measure(generator, "base", 0.5)
    assert drawn == [1.0, 1.0, 0.5, 0.5]
    assert plain.held_out == test.held_out(generator, 0.8)
    assert sharp.held_out.reward > plain.held_out.reward + 0.02
    for name in ("entropy", "cross_entropy"):
        assert getattr(sharp.held_out, name) == getattr(plain.held_out, name)
    assert plain.plain.scores.fid != sharp.plain.scores.fid
    tokens = [draw(generator, torch.arange(8), 1.0, temperature) for temperature in (1.0, 0.01, 0.01)]
    assert torch.equal(draw(generator, torch.arange(8), 1.0), tokens[0])
    assert not torch.equal(tokens[0], tokens[1])


def test_heldout_images_score_better_than_samples(tiny_config: Make, tiny_models: Models) -> None:
    """Real images are near the reference in FID; the base generator's samples are worse than their reconstructions."""
    from vapi_fast.tiny import build

    config = tiny_config(eval_samples=428)
    test = evaluator(config, tiny_models)
    images, _ = build.load_images(config.eval_data)
    with torch.no_grad():
        reconstructed = tiny_models.tokenizer.decode(tiny_models.tokenizer.encode(images))
        features = [tiny_models.reward.lpips.features_and_logits(x)[0] for x in (images, reconstructed)]
    fids = [evaluation.frechet_distance(test.reference, f) for f in features]
    base = test.measure(tiny_models.generator, "base")
    assert abs(fids[0]) < 1e-6
    assert 0 < fids[1] < base.plain.scores.fid
    assert base.cfg.scores.fid != base.plain.scores.fid


def test_samples_follow_the_classes_of_the_heldout_images(tiny_config: Make, tiny_models: Models) -> None:
    test = evaluator(tiny_config(eval_samples=428), tiny_models)
    assert test.labels.bincount(minlength=9).min() >= 10
    images = test.sample(tiny_models.generator, torch.tensor([5, 9]))
    assert torch.equal(images, test.sample(tiny_models.generator, torch.tensor([5, 9])))
    torch.testing.assert_close(images[1:], test.sample(tiny_models.generator, torch.tensor([9])), rtol=1e-3, atol=1e-3)
    assert images.min() >= -1
    assert images.max() <= 1


class MeanColours(torch.nn.Module):
    """In Inception's place: smooth features of 8-bit images, quick to compute."""

    image_features = InceptionV3.image_features

    def forward(self, pixels: Tensor) -> ImageFeatures:
        means = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 2).flatten(1)
        return ImageFeatures(torch.cat([means, means.square()], dim=1), means, means)


@pytest.mark.parametrize("side", [24, 40])
def test_align_scores_tokens_as_generate_and_evaluate_do(
    side: int, tiny_config: Make, tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same FID of the same tokens, where images are drawn at 32 pixels and scored at others."""
    monkeypatch.setattr(measurement, "PAPER_SIDE", side)
    monkeypatch.setattr(networks, "load_inception", lambda weights: MeanColours())
    pictures = torch.rand(30, 60, 3, generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
    for index in range(24):
        path = tmp_path / "held-out" / str(index % 3) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures.roll(index, 1).mul(index % 5 + 1).numpy()).resize((75, 50)).save(path)
    test = evaluator(tiny_config(lpips="vgg16", eval_data=tmp_path / "held-out", eval_samples=24), tiny_models)
    assert [len(batch.images[0, 0]) for batch in test.rewarded] == [32] * len(test.rewarded)
    drawn, draw = [], test.draw
    test.draw = lambda *arguments: (drawn.append(draw(*arguments)), drawn[-1])[1]
    fid = test.score(tiny_models.generator, 1.5, "base", 1.0).scores.fid

    config = GenerateConfig(model="tiny", num=24, save_size=side, out=tmp_path / "samples")
    images = Sampler.load(config, config.gpt_ckpt, torch.device("cpu")).decode(torch.cat(drawn))
    config.out.mkdir()
    for index, image in enumerate((images * 127.5 + 127.5).round().to(torch.uint8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(config.out / f"{index}.png")
    options = {"samples": config.out, "reference": tmp_path / "held-out", "image_size": side}
    report = evaluate(EvaluateConfig(model="xxl", **options))
    assert report.fid > 0.01
    assert fid == pytest.approx(report.fid, rel=1e-4)


def test_samples_of_scenes_are_judged_by_their_captions(tmp_path: Path) -> None:
    """GenEval without and with guidance, of the preset whose captions a detector can judge; printed by task."""
    config = AlignConfig(model="tiny-text", eval_samples=40, eval_batch=20, micro_batch=8, output_dir=tmp_path / "run")
    models = load_models(config, torch.device("cpu"))
    test = Evaluator(config, models, torch.device("cpu"))
    record = test.measure(models.generator, "base").as_record()
    for scores in (record, record["cfg"]):
        found = scores["geneval"]
        assert 0 < found["overall"] < 1
        assert sum(task["images"] for task in found["tasks"].values()) == 40
    lines = tasks_table({"base": record}, config.cfg_scale)
    assert [line.split(",")[0].split()[0] for line in lines] == ["GenEval", "base", "base"]
    assert f"{record['geneval']['overall']:.3f}" in lines[1]
    assert f"{record['cfg']['geneval']['overall']:.3f}" in lines[2]
    others = [caption.replace("a photo of", "a picture of") for caption in test.captions]
    assert SceneJudge.of(others, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("names", "split", "said"),
    [
        (("cat", "dog"), None, True),
        (("train/cat", "val/cat"), None, False),
        (("train/cat", "val/cat"), "Validation", True),
        (("train/cat", "test/cat"), "train", False),
    ],
)
def test_images_of_the_training_are_not_measured_on_in_silence(
    names: tuple[str, ...],
    split: str | None,
    said: bool,
    tiny_config: Make,
    tiny_models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name / "a.png")
    evaluator(tiny_config(data=tmp_path, split=split, eval_data=None, eval_samples=4), tiny_models)
    assert ("the measurement takes the split that is aligned on" in capsys.readouterr().err) == said
