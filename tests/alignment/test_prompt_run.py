"""Alignment of Janus-Pro from its folder to a folder of the same layout, and images drawn from that."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("tokenizers")
pytest.importorskip("ftfy")
import datasets
import janus_models
from hub_server import serving
from PIL import Image
from processes import become, on_ranks

import vapi_fast
from vapi_fast import AlignConfig
from vapi_fast.data.synthetic import SyntheticData
from vapi_fast.generation.config import GenerateConfig
from vapi_fast.generation.folder import draw_samples
from vapi_fast.models import Janus, catalog
from vapi_fast.models.janus_files import ORIGINAL, to_file
from vapi_fast.models.sizes import JANUS_CONFIGS, Prompts
from vapi_fast.runtime.checkpoint import load_state_dict
from vapi_fast.runtime.errors import ConfigError, DataError
from vapi_fast.tiny import FILES

Make = Callable[..., AlignConfig]
SIZE = dataclasses.replace(janus_models.SMALL, vocab_size=512, grid_size=8, prompt_tokens=16)
CAPTIONS = ("a red cup", "two cat on a table", "a blue cat on a red table", "", None)
KEPT = {
    "vision_model.x": torch.arange(3).bfloat16(),
    "language_model.lm_head.weight": torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).bfloat16(),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with captions, and a folder in DeepSeek's layout with a tokenizer of words and the tiny preset's VQ."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "images").mkdir()
    with (folder / "images" / "metadata.jsonl").open("w") as metadata:
        for number in range(24):
            Image.new("RGB", (40, 32), (10 * number, 255 - 10 * number, 80)).save(folder / "images" / f"{number}.png")
            metadata.write(json.dumps({"file_name": f"{number}.png", "caption": CAPTIONS[number % 5]}) + "\n")
    torch.manual_seed(0)
    model = Janus(SIZE)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    janus_models.write_tokenizer(folder / "model")
    state = to_file(dict(model.state_dict()), ORIGINAL, SIZE)
    state |= {f"gen_vision_model.{name}": value for name, value in load_state_dict(FILES.tokenizer).items()}
    torch.save(
        {name: value.detach().clone() for name, value in (state | KEPT).items()}, folder / "model" / "pytorch_model.bin"
    )
    (folder / "model" / "config.json").write_text('{"model_type": "multi_modality", "language_config": {}}')
    return folder


ENTRY = dataclasses.replace(
    catalog.JANUS,
    tokenizer="tiny",
    lpips="tiny",
    image_size=32,
    files={**catalog.TINY.files, "gpt_ckpt": None, "vq_ckpt": None, "data": None, "eval_data": None},
)


@pytest.fixture(autouse=True)
def small(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model janus-pro-1b` at the tiny preset's size, with its networks."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setitem(JANUS_CONFIGS, "janus-pro-1b", SIZE)
    monkeypatch.setitem(catalog.CATALOG, "janus-pro-1b", ENTRY)


@pytest.fixture
def make(files: Path, tmp_path: Path) -> Make:
    common = {"gpt_ckpt": files / "model", "vq_ckpt": files / "model", "data": files / "images"}
    common |= {"batch_size": 4, "micro_batch": 2, "group_size": 4, "steps": 2, "lr": 1e-4}
    common |= {"output_dir": tmp_path / "run", "eval_samples": 4, "eval_batch": 4}

    def config(**changes: Any) -> AlignConfig:
        return AlignConfig(model="janus-pro-1b", **(common | changes))

    return config


def test_a_run_writes_the_layout_that_it_read_and_its_images_follow(make: Make, files: Path, tmp_path: Path) -> None:
    record = vapi_fast.align(make(evaluate=False))
    assert record["config"]["recipe"] == "janus"
    assert record["data"]["images"] == 15
    before, after = (torch.load(path / "pytorch_model.bin") for path in (files / "model", tmp_path / "run" / "aligned"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith("gen_vision_model.")} - KEPT.keys()
    assert all(after[name].dtype == before[name].dtype for name in KEPT)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "run" / "aligned" / name).read_bytes() == (files / "model" / name).read_bytes()

    common = {"model": "janus-pro-1b", "vq_ckpt": tmp_path / "run" / "aligned", "batch_size": 2}
    common |= {"gpt_ckpt": tmp_path / "run" / "aligned"}
    (tmp_path / "prompts.txt").write_text("a red cup\ntwo cat on a table\n")
    config = GenerateConfig(out=tmp_path / "drawn", prompts=tmp_path / "prompts.txt", **common)
    assert (config.cfg_scale, config.top_k, config.num) == (5.0, 0, 2)
    draw_samples(config)
    manifest = json.loads((tmp_path / "drawn" / "manifest.json").read_text())
    assert [image["prompt"] for image in manifest["images"]] == ["a red cup", "two cat on a table"]
    draw_samples(GenerateConfig(out=tmp_path / "alone", prompt="a red cup", **common | {"batch_size": 1}))
    images = [Image.open(tmp_path / folder / "images" / "000000.png") for folder in ("drawn", "alone")]
    assert images[0].tobytes() == images[1].tobytes()  # whatever else is drawn, and however long that is


def test_a_repository_of_the_hub_is_as_its_folder(
    make: Make, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, configuration and tokenizer come by its name, and what is written is what the folder leads to."""
    with serving(tmp_path, monkeypatch) as hub:
        for path in (files / "model").iterdir():
            hub.put(f"owner/janus/{path.name}", path.read_bytes())
        named = {"gpt_ckpt": "hub:owner/janus", "vq_ckpt": "hub:owner/janus"}
        record = vapi_fast.align(make(**named, evaluate=False, output_dir=tmp_path / "named"))
    assert record["hub"]["gpt_ckpt"]["file"] == "pytorch_model.bin"
    vapi_fast.align(make(evaluate=False))
    written, expected = (
        {path.name: path for path in (tmp_path / run / "aligned").iterdir()} for run in ("named", "run")
    )
    assert written.keys() == expected.keys() >= {"config.json", "tokenizer.json"}
    weights, others = (torch.load(each.pop("pytorch_model.bin")) for each in (written, expected))
    assert all(torch.equal(weights[name], others[name]) for name in others)
    assert all(written[name].read_bytes() == expected[name].read_bytes() for name in expected)


def test_a_measured_run_is_another_step_of_the_same(make: Make, tmp_path: Path) -> None:
    """Before and after, without guidance and with; captions under the pictures; and free rollouts."""
    record = vapi_fast.align(make(recipe="ar-grpo", reward="pixel", steps=1, batch_size=2, micro_batch=2))
    assert record["base"]["cfg"]["fid"] != record["base"]["fid"] > 0
    assert record["aligned"]["reward"] < 0
    assert record["text"]["kl"] > 0
    assert record["text"]["tokens"] > 80
    assert (tmp_path / "run" / "samples.png").stat().st_size > 1000


def test_made_up_prompts_and_random_weights(make: Make, tmp_path: Path) -> None:
    condition = SIZE.condition
    batch = SyntheticData(32, prompt=condition).batch(torch.arange(40), torch.arange(40))
    assert batch.mask.sum(1).unique().tolist() == list(range(2, 17))
    assert all(row[used][0] == 0 and row[-1] == 3 for row, used in zip(batch.features, batch.mask, strict=True))
    record = vapi_fast.align(make(random_init=True, synthetic_data=True, gpt_ckpt=None, vq_ckpt=None, data=None))
    assert record["curves"]["reward"][0] < 0
    again = Janus.from_checkpoint(tmp_path / "run" / "aligned", "janus-pro-1b")
    assert again.config.condition == Prompts(16, 40, 0, 3)


def train_rank(rank: int, world_size: int, port: int, output: Path, checkpoint: Path) -> None:
    become(rank, world_size, port)
    JANUS_CONFIGS["janus-pro-1b"], catalog.CATALOG["janus-pro-1b"] = SIZE, ENTRY
    small = {"batch_size": 4, "micro_batch": 1, "group_size": 4, "steps": 2, "lr": 1e-3, "noise_prob": 0.5}
    files = {"gpt_ckpt": checkpoint, "vq_ckpt": checkpoint, "synthetic_data": True}
    vapi_fast.align(AlignConfig(model="janus-pro-1b", output_dir=output, **files, **small))


def test_runs_do_not_depend_on_ranks(files: Path, tmp_path: Path) -> None:
    """Embeddings, aligner and head's layers are sharded with the root, and used outside of the blocks."""
    for world_size in (1, 2):
        on_ranks(train_rank, world_size, tmp_path / str(world_size), files / "model")
    start, one, two = (
        torch.cat([p.detach().double().flatten() for p in Janus.from_checkpoint(path, "janus-pro-1b").parameters()])
        for path in (files / "model", tmp_path / "1" / "aligned", tmp_path / "2" / "aligned")
    )
    assert (one - two).norm() < 1e-3 * (one - start).norm()


def test_what_does_not_go_together_is_refused(make: Make, files: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"text_encoder": "t5"}, "--text-encoder: this model reads captions by its own tokenizer, leave it out"),
        ({"random_init": True, "gpt_ckpt": None}, "--gpt-ckpt is required with --data: the tokenizer of its prompts"),
        ({"lpips": "alex", "credit_window": 3}, "--credit-window goes without LPIPS on AlexNet"),
    ):
        with pytest.raises(ConfigError, match=message):
            vapi_fast.align(make(evaluate=False, **changes))
    common = {"out": tmp_path / "out", "model": "janus-pro-1b"}
    common |= {"vq_ckpt": files / "model", "gpt_ckpt": files / "model"}
    with pytest.raises(ConfigError, match="--prompt or --prompts is required: this model draws from prompts alone"):
        draw_samples(GenerateConfig(class_ids="3", **common))
    with pytest.raises(ConfigError, match="--text-encoder: this model reads prompts by its own tokenizer"):
        draw_samples(GenerateConfig(prompt="a cup", text_encoder="t5", **common))
    with pytest.raises(DataError, match="a prompt has 26 tokens, and the model takes 16"):
        draw_samples(GenerateConfig(prompt="a cup " * 10, **common))


def test_the_released_recipe() -> None:
    """PAPER: 384², 64 images × G 8, 100 steps, AdamW 1e-7 with decay 1e-4, CE 0.1, all context noise, AlexNet."""
    settings = catalog.JANUS.preset("align")
    expected = {"image_size": 384, "batch_size": 64, "group_size": 8, "steps": 100, "lr": 1e-7, "weight_decay": 1e-4}
    expected |= {"noise_prob": 1.0, "prior": "ce", "prior_weight": 0.1, "lpips": "alex", "dropout": 0.0}
    assert {name: settings[name] for name in expected} == expected
    assert (JANUS_CONFIGS["janus-pro-7b"].hidden_width, JANUS_CONFIGS["janus-pro-7b"].norm_eps) == (11008, 1e-6)
