"""Alignment on captioned images from start to finish: encoder, features, run, pictures, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")
pytest.importorskip("ftfy")
import datasets
from inputs import text_encoder
from PIL import Image
from processes import become, on_ranks
from safetensors.torch import save_file

import vapi_fast
from vapi_fast import AlignConfig
from vapi_fast.alignment import loop
from vapi_fast.data import text
from vapi_fast.models import LLAMAGEN_CONFIGS, LlamaGen, catalog
from vapi_fast.runtime.checkpoint import load_state_dict
from vapi_fast.runtime.errors import CheckpointError, ConfigError, DataError
from vapi_fast.tiny import FILES

Make = Callable[..., AlignConfig]
TOKENS, WIDTH = 7, 16
SIZE = dataclasses.replace(LLAMAGEN_CONFIGS["tiny"], layers=2, caption_tokens=TOKENS, caption_width=WIDTH)
CAPTIONS = ("a red cup", "two dogs on a table", "a blue cat on a red table a cup on a table a cat", "", None)
SEEN: list[list[str]] = []


def brightness(images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    SEEN.append(captions)
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with captions, a text encoder, and a generator that takes its features."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "images").mkdir()
    with (folder / "images" / "metadata.jsonl").open("w") as metadata:
        for number in range(20):
            Image.new("RGB", (40, 32), (12 * number, 255 - 12 * number, 80)).save(folder / "images" / f"{number}.png")
            metadata.write(json.dumps({"file_name": f"{number}.png", "caption": CAPTIONS[number % 5]}) + "\n")
    text_encoder(folder / "t5", WIDTH)
    torch.manual_seed(0)
    save_file(LlamaGen(SIZE).state_dict(), folder / "generator.safetensors")
    return folder


@pytest.fixture
def make(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`--model t2i-xl` at the tiny preset's size, with its networks."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setitem(LLAMAGEN_CONFIGS, "t2i-xl", SIZE)
    small = dataclasses.replace(
        catalog.TINY, align={**catalog.TINY.align, "noise_prob": 0.5, "data": files / "images", "eval_data": None}
    )
    monkeypatch.setitem(catalog.CATALOG, "t2i-xl", small)
    common = {"gpt_ckpt": files / "generator.safetensors", "text_encoder": str(files / "t5")}
    common |= {"caption_cache": tmp_path / "cache", "batch_size": 4, "micro_batch": 2, "group_size": 4, "steps": 2}
    common |= {"output_dir": tmp_path / "run", "eval_samples": 8, "eval_batch": 4}

    def config(**changes: Any) -> AlignConfig:
        return AlignConfig(model="t2i-xl", **(common | changes))

    return config


def test_a_run_on_captions(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It measures, aligns and writes as for classes; the second run finds the features and needs no encoder."""
    record = vapi_fast.align(make(reward=f"pixel,{__name__}:brightness", recipe="va-pi"))
    assert record["data"]["images"] == 12
    assert record["data"]["captions"]["left_out"] == 8
    assert {"base", "aligned"} <= record.keys()
    assert record["base"]["fid"] > 0
    assert record["base"]["cfg"]["fid"] != record["base"]["fid"]
    assert set(SEEN[0]) <= set(CAPTIONS[:3])
    assert len(SEEN[0]) == 2 * 4  # a text a rollout
    aligned = load_state_dict(tmp_path / "run" / "aligned.pt")
    before = load_state_dict(make(output_dir=tmp_path / "other").gpt_ckpt)
    assert aligned.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], aligned[name].float())}
    assert moved == before.keys() - {"cls_embedding.uncond_embedding"}
    for name in ("samples.png", "originals.png", "run.json", "reward.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000

    monkeypatch.setattr(text.TextEncoder, "__init__", None)
    again = vapi_fast.align(make(reward=f"pixel,{__name__}:brightness", recipe="va-pi", output_dir=tmp_path / "again"))
    assert again["aligned"] == record["aligned"]


def test_a_resumed_run_ends_alike(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vapi_fast.align(make(evaluate=False, steps=3))
    expected = load_state_dict(tmp_path / "run" / "aligned.pt")
    compute, calls = loop.accumulate_gradients, []

    def failing(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return compute(*arguments)

    stopped = make(evaluate=False, steps=3, checkpoint_every=1, output_dir=tmp_path / "stopped")
    monkeypatch.setattr(loop, "accumulate_gradients", failing)
    with pytest.raises(KeyboardInterrupt):
        vapi_fast.align(stopped)
    monkeypatch.setattr(loop, "accumulate_gradients", compute)
    vapi_fast.align(dataclasses.replace(stopped, resume=True))
    resumed = load_state_dict(tmp_path / "stopped" / "aligned.pt")
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def train_rank(rank: int, world_size: int, port: int, output: Path, checkpoint: Path) -> None:
    become(rank, world_size, port)
    LLAMAGEN_CONFIGS["t2i-xl"], catalog.CATALOG["t2i-xl"] = SIZE, catalog.TINY
    small = {"batch_size": 4, "micro_batch": 1, "group_size": 4, "steps": 2, "lr": 1e-3, "recipe": "va-pi"}
    vapi_fast.align(
        AlignConfig(
            model="t2i-xl", gpt_ckpt=checkpoint, synthetic_data=True, output_dir=output, noise_prob=0.5, **small
        )
    )


def test_runs_do_not_depend_on_ranks(files: Path, tmp_path: Path) -> None:
    """Each rank leaves out the padding that its own captions have, and shares the captions' projection."""
    checkpoint = files / "generator.safetensors"
    for world_size in (1, 2):
        on_ranks(train_rank, world_size, tmp_path / str(world_size), checkpoint)
    start, one, two = (
        torch.cat([value.double().flatten() for _, value in sorted(load_state_dict(path).items())])
        for path in (checkpoint, tmp_path / "1" / "aligned.pt", tmp_path / "2" / "aligned.pt")
    )
    assert (one - two).norm() < 1e-3 * (one - start).norm()


def test_free_rollouts_and_made_up_captions(make: Make) -> None:
    record = vapi_fast.align(
        make(synthetic_data=True, recipe="ar-grpo", reward="pixel", batch_size=2, steps=1, lr=1e-3)
    )
    assert record["curves"]["reward"][0] < 0


def test_what_does_not_go_together(make: Make, files: Path, tmp_path: Path) -> None:
    """Nothing is written, and each is a line that says what to do."""
    of_classes = tmp_path / "classes.safetensors"
    save_file(LlamaGen(dataclasses.replace(SIZE, caption_tokens=0)).state_dict(), of_classes)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (CheckpointError, "is conditioned on classes, --model t2i-xl on captions", {"gpt_ckpt": of_classes}),
        (DataError, "has no captions", {"data": FILES.train_images}),
        (ConfigError, "--class-index: this model is conditioned on captions", {"class_index": FILES.train_images}),
    ]
    for error, message, changes in wrong:
        with pytest.raises(error, match=message):
            vapi_fast.align(make(evaluate=False, **changes))
    torch.manual_seed(1)
    other = dataclasses.replace(SIZE, caption_tokens=9)
    save_file(LlamaGen(other).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"takes captions of 9 × 16 numbers, and --model t2i-xl those of 7 × 16"):
        vapi_fast.align(make(evaluate=False, gpt_ckpt=tmp_path / "other.safetensors"))
    save_file(LlamaGen(dataclasses.replace(SIZE, layers=6)).state_dict(), tmp_path / "text.safetensors")
    with pytest.raises(
        CheckpointError, match="is conditioned on captions, --model tiny on classes: pass --model t2i-xl"
    ):
        vapi_fast.align(AlignConfig(model="tiny", gpt_ckpt=tmp_path / "text.safetensors", output_dir=tmp_path / "run"))
    with pytest.raises(ConfigError, match="--text-encoder: this model is conditioned on classes, leave it out"):
        vapi_fast.align(AlignConfig(model="tiny", text_encoder="x", output_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
