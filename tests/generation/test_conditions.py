"""`generate` of text: features of captions, and prompts that are encoded first."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inputs import text_encoder
from safetensors.torch import save_file
from torch import Tensor

from vapi_fast import generate, tiny
from vapi_fast.data.captions import Caption
from vapi_fast.data.features import CachedFeatures
from vapi_fast.data.image_sets import open_image_set
from vapi_fast.data.text import TextEncoder
from vapi_fast.generation.conditions import read_captions
from vapi_fast.generation.config import GenerateConfig
from vapi_fast.generation.folder import draw_samples
from vapi_fast.models import LlamaGen, VQTokenizer
from vapi_fast.runtime.checkpoint import save_generator
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.options import PRESET


def config(out: Path, **changes: object) -> GenerateConfig:
    return GenerateConfig(out=out, model="tiny", seed=5, **changes)


def test_captions_condition_a_text_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaGen.from_name("tiny", caption_tokens=5, caption_width=16).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    save_generator(tmp_path / "text.pt", model.state_dict())
    features, mask = torch.randn(2, 5, 16), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    save_file({"features": features.half(), "mask": mask}, tmp_path / "captions.safetensors")
    np.save(tmp_path / "captions.npy", features.half().numpy())
    text = {"gpt_ckpt": tmp_path / "text.pt", "class_ids": None, "num": 3, "batch_size": 3, "cfg_scale": 1.0}
    sampled = {}
    for suffix in ("safetensors", "npy"):
        path = tmp_path / f"captions.{suffix}"
        draw_samples(config(tmp_path / suffix, caption_features=path, **text))
        manifest = json.loads((tmp_path / suffix / "manifest.json").read_text())
        assert [image["caption"] for image in manifest["images"]] == [0, 1, 0]
        assert manifest["files"]["captions"]["name"] == path.name
        sampled[suffix] = next(open_image_set(tmp_path / suffix, 32).batches(0, 3, 3)).int()
    rows = features.half().float()[[0, 1, 0]]
    tokenizer = VQTokenizer.from_checkpoint(tiny.FILES.tokenizer, "tiny")
    with torch.no_grad():
        for suffix, condition_mask in (("safetensors", mask[[0, 1, 0]].bool()), ("npy", None)):
            tokens = generate(model, rows, seed=5, condition_mask=condition_mask)
            images = (tokenizer.decode(tokens).clamp(-1, 1) * 127.5 + 127.5).round()
            assert (sampled[suffix] - images).abs().max() <= 1
    assert not torch.equal(sampled["npy"][0], sampled["safetensors"][0])

    np.save(tmp_path / "narrow.npy", np.zeros((2, 5, 8), np.float32))
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    (tmp_path / "damaged.npy").write_bytes(b"damaged")
    save_file({"embeddings": features}, tmp_path / "other.safetensors")
    for name, message in (
        ("narrow.npy", r"is \[2, 5, 8\], this checkpoint takes \[N, 5, 16\]"),
        ("text.npy", "cannot be read"),
        ("damaged.npy", "cannot be read"),
        ("other.safetensors", "no tensor `features`, only embeddings"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            draw_samples(config(tmp_path / "refused", caption_features=tmp_path / name, **text))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="--caption-features is required: this checkpoint is conditioned on captions"):
        draw_samples(config(tmp_path / "refused", **text))
    classes = text | {"gpt_ckpt": tiny.FILES.generator}
    with pytest.raises(ConfigError, match="conditioned on classes, pass --class-ids"):
        draw_samples(config(tmp_path / "refused", caption_features=tmp_path / "captions.npy", **classes))
    assert not (tmp_path / "refused").exists()


def test_prompts_are_encoded_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image each by default, the same as of the features that their encoder gives; these are kept."""
    encoder = text_encoder(tmp_path / "encoder")
    torch.manual_seed(0)
    save_generator(tmp_path / "text.pt", LlamaGen.from_name("tiny", caption_tokens=9, caption_width=16).state_dict())
    prompts = ["two dogs", "A red cup on a table"]
    (tmp_path / "lines.txt").write_text("\n".join(["", *prompts, ""]))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"tag": "x", "prompt": text}) for text in prompts))
    features, mask = TextEncoder(encoder, torch.device("cpu")).encode(prompts, 9)
    save_file({"features": features, "mask": mask}, tmp_path / "features.safetensors")
    text = {"gpt_ckpt": tmp_path / "text.pt", "class_ids": None, "batch_size": 2, "text_encoder": str(encoder)}
    given: list[str] = []
    states = TextEncoder.states
    monkeypatch.setattr(
        TextEncoder, "states", lambda self, part, *sizes: (given.extend(part), states(self, part, *sizes))[1]
    )
    cache = tmp_path / "cache"

    def drawn(name: str, **changes: Any) -> Tensor:
        kept = {"text_encoder": None} if "caption_features" in changes else {"caption_cache": cache}
        draw_samples(config(tmp_path / name, **text | {"num": PRESET} | kept | changes))
        count = len(json.loads((tmp_path / name / "manifest.json").read_text())["images"])
        return next(open_image_set(tmp_path / name, 32).batches(0, count, count)).int()

    expected = drawn("features", caption_features=tmp_path / "features.safetensors", num=2)
    assert torch.equal(drawn("text", prompts=tmp_path / "lines.txt"), expected)
    assert torch.equal(drawn("json", prompts=tmp_path / "lines.jsonl"), expected)
    assert torch.equal(drawn("one", prompt=prompts[0]), expected[:1])
    assert len(drawn("many", prompt=prompts[0], num=3)) == 3
    assert sorted(given) == ["a red cup on a table", "two dogs"]  # once, by whichever folder's draws
    held = CachedFeatures(encoder, torch.device("cpu"), 9, 16, cache)  # as `align` has it
    held.prepare([Caption(text, "list", 0) for text in prompts])
    assert len(given) == 2
    manifest = json.loads((tmp_path / "text" / "manifest.json").read_text())
    assert str(cache) not in json.dumps(manifest)  # any folder will do to finish it

    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "links.txt").write_text("a cup\n\nhttps://x.com\n")
    (tmp_path / "other.jsonl").write_text('{"text": "a cup"}')
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff")
    refused = tmp_path / "refused"
    for name, message in (
        ("none.txt", "has no prompts"),
        ("other.jsonl", "neither lines of text nor of JSON with `prompt`"),
        ("picture.txt", "neither lines of text nor of JSON with `prompt`"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(refused, **text, prompts=tmp_path / name)
    with pytest.raises(ConfigError, match="--prompt and --prompts: images are drawn of one kind of condition"):
        config(refused, **text, prompts=tmp_path / "lines.txt", prompt="a cup")
    with pytest.raises(ConfigError, match="its states are 24 wide, this checkpoint takes 16"):
        draw_samples(config(refused, prompt="a cup", **text | {"text_encoder": str(text_encoder(tmp_path / "w", 24))}))
    for changes, message in (
        ({"prompt": " "}, "--prompt: prompt 1, ' ', has no words"),
        ({"prompts": tmp_path / "links.txt"}, r"--prompts .*links\.txt: prompt 2, 'https://x\.com', has no words"),
        ({"caption_features": tmp_path / "features.safetensors", "num": 1}, "--caption-features and --text-encoder"),
        (
            {"gpt_ckpt": tiny.FILES.generator, "text_encoder": None},
            "--caption-cache: this checkpoint is conditioned on",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            draw_samples(config(refused, **text | {"caption_cache": cache} | changes))
    with pytest.raises(ConfigError, match="--prompt: this checkpoint is conditioned on classes"):
        draw_samples(config(refused, prompt="a cup", **text | {"gpt_ckpt": tiny.FILES.generator}))
    assert not refused.exists()


@pytest.mark.parametrize("value", [1e300, -1e39, math.nan, math.inf])
def test_captions_that_float32_cannot_hold_are_refused(tmp_path: Path, value: float) -> None:
    features = np.zeros((3, 5, 16))
    features[2, 4, 7] = 1e38
    np.save(tmp_path / "captions.npy", features)
    assert read_captions(tmp_path / "captions.npy", 5, 16).rows[2, 4, 7] == torch.tensor(1e38)
    features[2, 4, 7] = value
    np.save(tmp_path / "captions.npy", features)
    save_file({"features": torch.from_numpy(features)}, tmp_path / "captions.safetensors")
    for suffix in ("npy", "safetensors"):
        with pytest.raises(ConfigError, match="expected finite floating-point numbers"):
            read_captions(tmp_path / f"captions.{suffix}", 5, 16)
