"""GenEval's networks: small random ones of the same classes, and what is made of their outputs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vapi_fast.data.geneval import COLORS, OBJECTS, Clause, Prompt
from vapi_fast.evaluation import geneval_networks
from vapi_fast.evaluation.config import GenevalConfig
from vapi_fast.evaluation.geneval import evaluate_geneval
from vapi_fast.evaluation.geneval_detections import Found, Mask
from vapi_fast.evaluation.geneval_networks import ClipParts, ColorClassifier, Detector, instances, loaded
from vapi_fast.runtime.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
DOG, CAT = OBJECTS.index("dog"), OBJECTS.index("cat")


def test_scores_boxes_and_masks_of_queries() -> None:
    """Two objects of one query, one whose mask is unsure, and what is nothing, or too unlikely."""
    probs = torch.full((4, 81), 1e-9)
    probs[0, [DOG, CAT]] = torch.tensor([0.55, 0.4])
    probs[1, CAT] = 0.9
    probs[2, DOG] = 0.29
    probs[:, -1] = 1 - probs[:, :-1].sum(1)
    logits = torch.full((4, 6, 8), -20.0)
    logits[0, 1:3, 2:7] = 20.0
    logits[1, 4, 0] = 0.5
    logits[1, 5, 7] = -0.1
    logits[2] = 20.0
    found = instances(probs.log(), lambda queries: logits[queries])
    assert [each.name for each in found] == ["cat", "dog", "cat"]
    assert [each.score for each in found] == pytest.approx([0.9 / (1 + np.exp(-0.5)), 0.55, 0.4], rel=1e-4)
    assert [each.box for each in found] == [(0, 4, 1, 5), (2, 1, 7, 3), (2, 1, 7, 3)]
    assert (found[1].mask.pixels() == (logits[0] > 0).numpy()).all()


def test_the_likeliest_hundred_pairs_count() -> None:
    probs = torch.full((150, 81), 1e-9)
    probs[:, 0] = torch.linspace(0.4, 0.9, 150)
    probs[:, -1] = 1 - probs[:, :-1].sum(1)
    found = instances(probs.log(), lambda queries: torch.full((len(queries), 2, 2), 50.0))
    assert len(found) == 100
    assert min(each.score for each in found) == pytest.approx(float(probs[50, 0]))


class OneObject(nn.Module):
    """A detector that finds a dog in what is brighter than grey, at a quarter of its input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, pixel_values: Tensor) -> Any:
        self.seen.append(pixel_values)
        classes = torch.full((len(pixel_values), 1, 81), -30.0, device=pixel_values.device)
        classes[:, :, DOG] = 30.0
        masks = F.avg_pool2d(pixel_values.mean(1, keepdim=True), 4) * 100
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


@DEVICES
def test_boxes_are_in_the_images_own_pixels(device: str) -> None:
    """Whatever the image is resized and padded to; images of a batch may have different sizes."""
    network = OneObject()
    square, wide = np.zeros((64, 64, 3), np.uint8), np.zeros((50, 200, 3), np.uint8)
    square[16:48, 8:24] = 255
    wide[20:30, 100:180] = 255
    (first,), (second,) = Detector(network, torch.device(device))([square, wide])
    assert network.seen[0].shape == (2, 3, 800, 1344)  # 800 × 800, and 333 × 1333
    assert network.seen[0][0, :, :, 800:].abs().max() == 0
    assert network.seen[0][0, :, 0, 0].tolist() == pytest.approx([-123.675 / 58.395, -116.28 / 57.12, -103.53 / 57.375])
    for found, expected in ((first, (8, 16, 24, 48)), (second, (100, 20, 180, 30))):
        assert found.name == "dog"
        assert np.abs(np.array(found.box) - expected).max() <= 1
    assert first.mask.pixels().shape == (64, 64)
    assert second.mask.pixels()[25, 110:170].all()


def small_detector(folder: Path, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "num_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
    labels = {"id2label": dict(enumerate(OBJECTS)), "num_queries": 5}
    config = transformers.Mask2FormerConfig(backbone_config=backbone, **sizes, **layers, **(labels | changes))
    network = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    network.save_pretrained(folder)
    return network


def test_a_mask2former_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, boxes and masks are those of its own outputs, computed pair by pair."""
    monkeypatch.setattr(geneval_networks, "SHORT_SIDE", 64)
    monkeypatch.setattr(geneval_networks, "THRESHOLD", 0.0)
    network = small_detector(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = Detector.load(str(tmp_path), CPU)([image])[0]
    mean, spread = (torch.tensor(each).view(3, 1, 1) for each in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    pixels = F.interpolate(torch.tensor(image).permute(2, 0, 1)[None].float(), (64, 64), mode="bilinear").round()
    with torch.no_grad():
        drawn = network(pixel_values=(pixels - mean) / spread)
    masks = F.interpolate(
        F.interpolate(drawn.masks_queries_logits, (64, 64), mode="bilinear"), (32, 32), mode="bilinear"
    )
    expected = []
    for query, probs in enumerate(drawn.class_queries_logits[0].softmax(-1)[:, :80]):
        inside = masks[0, query] > 0
        if inside.any():
            rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            quality = masks[0, query].sigmoid()[inside].mean()
            expected += [(float(p * quality), label, tuple(map(float, box)), float(p)) for label, p in enumerate(probs)]
    expected = sorted(sorted(expected, key=lambda each: -each[3])[:100], key=lambda each: -each[0])
    assert len(found) > 80
    found = sorted(found, key=lambda each: -each.score)
    assert [each.score for each in found[:50]] == pytest.approx([each[0] for each in expected[:50]], rel=1e-4)
    assert [(each.name, each.box) for each in found[:20]] == [(OBJECTS[e[1]], e[2]) for e in expected[:20]]


def test_what_is_no_detector_on_coco_is_one_line(tmp_path: Path) -> None:
    network = small_detector(tmp_path / "five", id2label=dict(enumerate("abcde")))
    with pytest.raises(CheckpointError, match="five: has 5 labels that are not COCO's 80"):
        Detector.load(str(tmp_path / "five"), CPU)
    with pytest.raises(CheckpointError, match=r"absent: cannot be read \(.*\): pass a folder with that Mask2Former's"):
        Detector.load(str(tmp_path / "absent"), CPU)
    network = small_detector(tmp_path / "part")
    state = {name: value for name, value in network.state_dict().items() if "class_predictor" not in name}
    network.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(CheckpointError, match=r"part: lacks 2 weights of a Mask2Former, class_predictor\.bias"):
        Detector.load(str(tmp_path / "part"), CPU)


def test_a_package_that_cannot_be_imported_is_one_line() -> None:
    def read() -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    with pytest.raises(ConfigError, match=r"torchvision::nms does not exist\): install the torchvision that belongs"):
        loaded("--detector x", "", read)


class Average(nn.Module):
    """A CLIP whose embeddings are colours, in RGB."""

    RGB: ClassVar = {"red": (1, -1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1), "black": (-1, -1, -1)}

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def encode_image(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * 2 - 1

    def encode_text(self, tokens: Tensor) -> Tensor:
        """A template that has the object's name says another colour, so that all three have to be taken."""
        found = []
        for text in (self.texts[int(token)] for token in tokens):
            color = next(color for color in COLORS if f" {color}" in text)
            direction = torch.tensor(self.RGB.get(color, (0.01, 0.02, 0.01)), dtype=torch.float)
            found.append(-direction if text.startswith(f"a photo of a {color} dog") else 5 * direction)
        return torch.stack(found).to(tokens.device)

    def tokenize(self, texts: list[str]) -> Tensor:
        start = len(self.texts)
        self.texts += texts
        return torch.arange(start, len(self.texts))


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.tensor(np.asarray(picture.resize((4, 4)))).permute(2, 0, 1) / 255


@DEVICES
def test_colors_are_those_of_masked_crops(device: str) -> None:
    network = Average()
    classify = ColorClassifier(ClipParts(network, to_tensor, network.tokenize), torch.device(device))
    image = np.zeros((20, 30, 3), np.uint8)
    image[:, :10] = (255, 0, 0)
    image[:, 10:20] = (0, 0, 255)
    pixels = np.zeros((20, 30), bool)
    pixels[:10, :4] = True
    objects = [
        Found("dog", 0.9, (0, 0, 10, 20)),
        Found("dog", 0.8, (10.4, 0, 19.6, 20)),
        Found("dog", 0.8, (0, 0, 20, 20), mask=Mask.of(pixels)),
        Found("cat", 0.7, (20, 0, 30, 20)),
    ]
    assert classify(image, objects) == ["red", "blue", "white", "black"]
    assert network.texts[:3] == ["a photo of a red dog", "a photo of a red-colored dog", "a photo of a red object"]
    assert len(network.texts) == 60  # three templates, ten colors, two classes
    classify(image, objects)
    assert len(network.texts) == 60
    plain, masked, thin = ColorClassifier.crops(image, [objects[1], objects[2], Found("dog", 0.5, (3.2, 4, 3.4, 4.1))])
    assert plain.size == (10, 20)  # rounded
    assert masked.getpixel((3, 9)) == (255, 0, 0)
    assert {masked.getpixel((4, 9)), masked.getpixel((3, 10)), masked.getpixel((12, 3))} == {(0x99, 0x99, 0x99)}
    assert thin.size == (1, 1)


SMALL_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def test_a_clip_from_a_file_scores_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command on small networks: what it wrote says the colors, by the network's own cosines."""
    open_clip = pytest.importorskip("open_clip")
    small_detector(tmp_path / "detector")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/small-clip.json").write_text(json.dumps(SMALL_CLIP))
    open_clip.add_model_config(tmp_path / "configs")
    monkeypatch.setattr(geneval_networks, "CLIP", "small-clip")
    monkeypatch.setattr(geneval_networks, "SHORT_SIDE", 64)
    for module in ("geneval_networks.THRESHOLD", "geneval_rules.THRESHOLD"):
        monkeypatch.setattr(f"vapi_fast.evaluation.{module}", 0.0)
    torch.manual_seed(1)
    clip = open_clip.create_model("small-clip", force_quick_gelu=True)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    folder = tmp_path / "samples"
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = Detector.load(str(tmp_path / "detector"), CPU)([image])[0]
    likeliest = max(found, key=lambda each: each.score)
    (folder / "00000/samples").mkdir(parents=True)
    prompt = Prompt("colors", f"a photo of a red {likeliest.name}", (Clause(likeliest.name, 1, "red"),))
    (folder / "00000/metadata.jsonl").write_text(json.dumps(prompt.to_json()))
    Image.fromarray(image).save(folder / "00000/samples/0000.png")
    report = evaluate_geneval(
        GenevalConfig(samples=folder, detector=str(tmp_path / "detector"), clip_weights=tmp_path / "clip.pt")
    )
    lines = (folder / "geneval/detections.jsonl").read_text().splitlines()
    (said,) = [each for each in json.loads(lines[0])["objects"] if "color" in each]
    assert (said["class"], tuple(said["box"])) == (likeliest.name, likeliest.box)
    _, _, transform = open_clip.create_model_and_transforms("small-clip", force_quick_gelu=True)
    (crop,) = ColorClassifier.crops(image, [likeliest])
    cosines = []
    with torch.no_grad():
        feature = clip.eval().encode_image(transform(crop)[None])
        for color in COLORS:
            texts = [f"a photo of a {c} {likeliest.name}" for c in (color, f"{color}-colored")]
            embedded = clip.encode_text(open_clip.tokenize([*texts, f"a photo of a {color} object"]))
            cosines.append(float(F.cosine_similarity(F.normalize(embedded, dim=1).mean(0, keepdim=True), feature)))
    assert said["color"] == COLORS[int(np.argmax(cosines))]
    assert report.tasks["colors"].score == (said["color"] == "red")
    assert "not the official detector: their figures have not been compared" in str(report)
    assert "colours by ViT-L-14 openai" in str(report)
    (tmp_path / "clip.pt").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"--clip-weights .*clip\.pt: cannot be read"):
        ColorClassifier.load(tmp_path / "clip.pt", CPU)
