"""`evaluate --clip-score`: the cosines of captions and images against float64, and where the captions come from."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inputs import SIDE, VOCABULARY, clip
from PIL import Image

from vapi_fast.data.geneval import Clause, Prompt
from vapi_fast.data.image_sets import open_image_set
from vapi_fast.evaluation import scoring
from vapi_fast.evaluation.clip import Clip
from vapi_fast.evaluation.metrics import ImageFeatures
from vapi_fast.evaluation.networks import FeatureNetwork
from vapi_fast.evaluation.scoring import EvaluateConfig, Report, evaluate
from vapi_fast.runtime.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")
CAPTIONS = ["a red cup", "two dogs", "a red cup", "sea", "a long " + "word " * 40, "sea", "a cat"]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return clip(tmp_path_factory.mktemp("networks") / "clip")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Smooth images as large as the network takes them, uint8 `[7,SIDE,SIDE,3]`."""
    noise = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for each in noise]
    )


@pytest.fixture
def folder(pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images as `generate --prompts` leaves them."""
    colours = FeatureNetwork(lambda images: ImageFeatures(*[images.mean((2, 3))] * 3), "mean colours")
    monkeypatch.setattr(scoring, "feature_network", lambda *_: colours)
    listed = []
    (tmp_path / "out" / "images").mkdir(parents=True)
    for index, (each, caption) in enumerate(zip(pixels, CAPTIONS, strict=True)):
        listed.append({"id": index, "file": f"images/{index:06d}.png", "caption": index, "prompt": caption})
        Image.fromarray(each).save(tmp_path / "out" / listed[-1]["file"])
    (tmp_path / "out" / "manifest.json").write_text(json.dumps({"images": listed}))
    return tmp_path / "out"


def scored(network: Path, folder: Path, **changes: Any) -> Report:
    given = {"samples": folder, "reference": folder, "batch_size": 3, "clip_score": True, "clip_network": str(network)}
    return evaluate(EvaluateConfig(**given | changes))


def cosines(network: Path, pixels: np.ndarray, captions: list[str]) -> np.ndarray:
    """In float64, from the definition: `transformers`' own embeddings of "A photo depicts " and the caption."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(network).double()
    start, end = len(VOCABULARY) - 2, len(VOCABULARY) - 1
    mean, spread = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    found = []
    for image, caption in zip(pixels, captions, strict=True):
        letters = [
            VOCABULARY.index(letter + ("</w>" if place == len(word) - 1 else ""))
            for word in f"a photo depicts {caption}".split()
            for place, letter in enumerate(word)
        ]
        ids = torch.tensor([[start, *letters[:18], end]])  # 20 places
        values = torch.from_numpy((image / 255 - mean) / spread).permute(2, 0, 1)[None]
        with torch.no_grad():
            text = model.text_projection(model.text_model(input_ids=ids).pooler_output)[0]
            seen = model.visual_projection(model.vision_model(pixel_values=values).pooler_output)[0]
        found.append(float(text @ seen / text.norm() / seen.norm()))
    return 100 * np.array(found)


def test_the_score_is_the_mean_of_cosines(network: Path, folder: Path, pixels: np.ndarray) -> None:
    """With a standard error over captions, of which two have two images."""
    report = scored(network, folder)
    expected = cosines(network, pixels, CAPTIONS)
    assert expected.std() > 0.5
    assert report.clip_score == pytest.approx(expected.mean(), rel=1e-4)
    off = expected - expected.mean()
    groups = [[0, 2], [1], [3, 5], [4], [6]]
    error = math.sqrt(sum(off[group].sum() ** 2 for group in groups) * 5 / 4) / 7
    assert report.clip_score_se == pytest.approx(error, rel=1e-3)
    assert f"CLIP score       {report.clip_score:.2f} ± {report.clip_score_se:.2f}" in str(report)
    assert report.clip_network == str(network)
    assert report.fid < 1e-3
    plain = scored(network, folder, clip_score=False)
    assert plain.clip_score is plain.clip_network is None
    assert "CLIP" not in str(plain)


def test_captions_come_from_the_samples_or_a_file(
    network: Path, folder: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    expected = cosines(network, pixels, CAPTIONS).mean()
    other = [CAPTIONS[index] for index in (1, 3, 1, 1, 6, 3, 2)]
    (tmp_path / "other.txt").write_text("\n".join(other))
    found = scored(network, folder, prompts=tmp_path / "other.txt").clip_score
    assert found == pytest.approx(cosines(network, pixels, other).mean(), rel=1e-4)
    assert abs(found - expected) > 0.01
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in CAPTIONS))
    (folder / "manifest.json").unlink()
    found = scored(network, folder / "images", prompts=tmp_path / "captions.jsonl").clip_score
    assert found == pytest.approx(expected, rel=1e-4)
    np.savez(tmp_path / "a.npz", pixels)
    found = scored(network, tmp_path / "a.npz", prompts=tmp_path / "captions.jsonl").clip_score
    assert found == pytest.approx(expected, rel=1e-4)
    for number in range(2):  # GenEval's layout, of anybody's drawing
        inside = tmp_path / "geneval" / f"{number:05d}" / "samples"
        inside.mkdir(parents=True)
        prompt = Prompt("single_object", CAPTIONS[number], (Clause("cup", 1),))
        (inside.parent / "metadata.jsonl").write_text(json.dumps(prompt.to_json()))
        for index in range(3):
            Image.fromarray(pixels[3 * number + index]).save(inside / f"{index:04d}.png")
    found = scored(network, tmp_path / "geneval").clip_score
    assert found == pytest.approx(
        cosines(network, pixels[:6], [CAPTIONS[n] for n in (0, 0, 0, 1, 1, 1)]).mean(), rel=1e-4
    )


def test_other_sizes_are_the_middle_square_resized(network: Path, pixels: np.ndarray) -> None:
    loaded = Clip.load(str(network), CPU)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(loaded.images(torch.nn.functional.pad(images, (5, 6, 0, 0))), loaded.images(images))
    large = np.stack([np.asarray(Image.fromarray(each).resize((64, 64), Image.Resampling.BICUBIC)) for each in pixels])
    small = [np.asarray(Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for each in large]
    found, expected = (loaded.images(torch.from_numpy(np.stack(each)).permute(0, 3, 1, 2)) for each in (large, small))
    assert (found * expected).sum(-1).min() > 0.9999


@pytest.mark.usefixtures("image_sets")
def test_pictures_of_any_size_are_a_reference_in_a_folder(tmp_path: Path) -> None:
    """As COCO's are: the folder above theirs is given, and each is cropped."""
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    for index, size in enumerate(((64, 48), (40, 52), (33, 33), (70, 90))):
        Image.new("RGB", size, (index, 0, 0)).save(tmp_path / "coco" / "val2014" / f"COCO_{index}.jpg")
    assert next(open_image_set(tmp_path / "coco", 32).batches(0, 4, 4)).shape == (4, 3, 32, 32)


def test_what_cannot_be_scored(
    network: Path, folder: Path, pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(error: type[Exception], message: str, **changes: Any) -> None:
        given = {"samples": folder, "reference": folder, "clip_score": True, "clip_network": str(network)}
        with pytest.raises(error, match=message) as told:
            evaluate(EvaluateConfig(**given | changes))
        assert "\n" not in str(told.value)

    (tmp_path / "few.txt").write_text("a cup\n")
    refused(ConfigError, r"few\.txt: has 1 captions, and .*out 7 images: one for each", prompts=tmp_path / "few.txt")
    refused(ConfigError, "--prompts has captions for --clip-score", prompts=tmp_path / "few.txt", clip_score=False)
    message = r"--clip-score: .*images does not say what its images are of: pass --prompts FILE"
    refused(ConfigError, message, samples=folder / "images")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["images"][3]["prompt"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(ConfigError, "--clip-score: .*out does not say what its images are of")
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    given = {"prompts": tmp_path / "captions.txt"}
    refused(
        CheckpointError, "--clip-network .*: cannot be read .*pass --clip-network FOLDER", **given, clip_network="/x"
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    refused(ConfigError, "--clip-score needs transformers, not installed here: pip install transformers", **given)


def test_a_network_without_some_weights_is_no_clip(network: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "clip").mkdir()
    for path in network.iterdir():
        (tmp_path / "clip" / path.name).write_bytes(path.read_bytes())
    state = load_file(network / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"it lacks 1 weights of a CLIP, text_projection\.weight for one"):
        Clip.load(str(tmp_path / "clip"), CPU)
