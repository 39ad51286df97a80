"""The commands by a model's name alone, against a small server that answers as Hugging Face's hub does."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("datasets")
from hub_server import COMMIT, Hub, serving, with_data
from huggingface_hub import constants

from vapi_fast import AlignConfig, cli, tiny
from vapi_fast.alignment.run import comparable
from vapi_fast.models import catalog
from vapi_fast.runtime import hub as names
from vapi_fast.runtime.checkpoint import identity

FILES = tiny.FILES


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path, monkeypatch) as found:
        with_data(found, tmp_path, monkeypatch)
        yield found


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str]]:
    def run(line: str) -> tuple[int, str]:
        for each in (names.files_of, names.located, names.fetched):
            each.cache_clear()
        monkeypatch.setattr(sys, "argv", ["vapi-fast", *line.split()])
        code = cli.main()
        return code, "\n".join(each for each in capsys.readouterr().err.splitlines() if "error:" in each)

    return run


def publish(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny preset's files and images as the hub's, and a catalog that has them there; the generator's sha256."""
    digest = hub.put("owner/tiny/generator_32.safetensors", FILES.generator.read_bytes())
    hub.put("owner/tiny/tokenizer.safetensors", FILES.tokenizer.read_bytes())
    for split, source in (("train", FILES.train_images), ("validation", FILES.heldout_images)):
        copy = hub.folder / "datasets/owner/glyphs" / f"{split}-00000-of-00001.parquet"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
    files = {name: value for name, value in catalog.TINY.files.items() if name != "gpt_ckpt"}
    files |= {"vq_ckpt": f"hub:owner/tiny@{COMMIT}/tokenizer.safetensors", "data": "hub:owner/glyphs"}
    entry = dataclasses.replace(catalog.TINY, files=files, generators={32: "hub:owner/tiny/generator_32.safetensors"})
    monkeypatch.setitem(catalog.CATALOG, "tiny", entry)
    return digest


def test_a_name_alone_aligns_and_generates(
    hub: Hub, command: Callable[[str], tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a second start, and one without a network, have all of it here."""
    digest = publish(hub, monkeypatch)
    small = "align --model tiny --steps 2 --batch-size 4 --group-size 2 --no-eval"
    assert command(f"{small} --output-dir a") == (0, "")
    record = json.loads(Path("a/run.json").read_text())
    assert record["config"]["gpt_ckpt"] == "hub:owner/tiny/generator_32.safetensors"
    assert record["hub"]["gpt_ckpt"] == {
        "repository": "owner/tiny",
        "commit": COMMIT,
        "file": "generator_32.safetensors",
        "sha256": digest,
    }
    assert record["hub"].keys() == {"gpt_ckpt", "vq_ckpt"}
    assert sum(each["images"] for each in record["data"]["classes"].values()) == 2 * 4
    assert Path("a/aligned.pt").exists()
    assert command("generate --model tiny --num 2 --out b") == (0, "")
    manifest = json.loads(Path("b/manifest.json").read_text())
    assert manifest["hub"]["gpt_ckpt"]["commit"] == COMMIT
    assert manifest["files"]["generator"]["blake2b"] == identity(FILES.generator)["blake2b"]
    assert len(hub.ranges) == 2  # each file once
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert command(f"{small} --output-dir c") == (0, "")
    assert json.loads(Path("c/run.json").read_text())["hub"] == record["hub"]
    assert hub.asked == []
    code, error = command("generate --model tiny --num 2 --out d --compare-ckpt hub:owner/other/x.pt")
    assert code == 2
    assert f"fetch {hub.endpoint}/owner/other/resolve/main/x.pt; then pass --compare-ckpt FILE" in error
    assert not Path("d").exists()


def test_what_a_resumed_run_is_compared_by() -> None:
    """Names of the hub from anywhere, and the rows that its steps made a run fetch."""
    config = AlignConfig(model="tiny", data="hub:owner/set", gpt_ckpt="hub:owner/name/a.pt", steps=3, batch_size=4)
    assert {name: comparable(config)[name] for name in ("data", "gpt_ckpt", "hub_rows")} == {
        "data": "hub:owner/set",
        "gpt_ckpt": "hub:owner/name/a.pt",
        "hub_rows": "12",
    }
    assert config.rows(held_out=True) == config.eval_samples
    assert comparable(AlignConfig(model="tiny", steps=3))["hub_rows"] == "None"


def test_without_a_network_one_line_says_what_to_fetch(
    hub: Hub, command: Callable[[str], tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, error = command("align --model xxl")
    assert code == 2
    pinned = catalog.LLAMAGEN.partition("@")[2]
    repository = f"{hub.endpoint}/FoundationVision/LlamaGen/resolve/{pinned}"
    assert error == (
        "vapi-fast: error: the hub cannot be reached (offline mode is on: HF_HUB_OFFLINE): on a machine that is online "
        f"fetch {repository}/c2i_XXL_384.pt, {repository}/vq_ds16_c2i.pt, "
        "https://download.pytorch.org/models/vgg16-397923af.pth, https://github.com/toshas/torch-fidelity/releases/"
        "download/v0.2.0/weights-inception-2015-12-05-6726825d.pth; then pass --gpt-ckpt FILE --vq-ckpt FILE "
        "--vgg-weights FILE --inception-weights FILE, and images in class folders, or as docs/captions.md says, with "
        "--data FOLDER; or, to time the model alone, leave files and images to --random-init --synthetic-data"
    )
    code, error = command("generate --model l --image-size 256 --out out")
    assert code == 2
    assert f"fetch {repository}/c2i_L_256.pt, {repository}/vq_ds16_c2i.pt; then pass --gpt-ckpt FILE --vq-ckpt" in error
    page = f"{hub.endpoint}/google/flan-t5-xl/tree/main"
    passed = "--gpt-ckpt FILE --vq-ckpt FILE --text-encoder FOLDER"
    code, error = command("generate --model t2i-xl --prompt cats --out out")
    assert code == 2
    assert f"vq_ds16_t2i.pt, {page}; then pass {passed}\n" in f"{error}\n"
    code, error = command("align --model t2i-xl --data hub:owner/set --no-eval")
    assert code == 2
    assert page in error
    assert " --text-encoder FOLDER, and images in class folders" in error
    for line in ("generate --model t2i-xl --text-encoder . --prompt a", "generate --model t2i-xl --class-ids 1"):
        code, error = command(f"{line} --out out")
        assert code == 2
        assert error.endswith("then pass --gpt-ckpt FILE --vq-ckpt FILE")
    assert command("align --model t2i-xl --synthetic-data")[0] == 2
    assert {path.name for path in tmp_path.iterdir()} <= {"hub", "hub-cache"}
    assert hub.asked == []


def test_terms_come_before_the_weights(hub: Hub, command: Callable[[str], tuple[int, str]], tmp_path: Path) -> None:
    pinned = catalog.LLAMAGEN.partition("@")[2]
    hub.revisions["pinned"] = pinned
    for name in ("c2i_XXL_384.pt", "vq_ds16_c2i.pt"):
        hub.put(f"FoundationVision/LlamaGen/{name}", b"weights")
    hub.gated.add("datasets/ILSVRC/imagenet-1k")
    assert command("align --model xxl --text-encoder x")[1].endswith(
        "this model is conditioned on classes, leave it out"
    )
    assert hub.asked == []
    code, error = command("align --model xxl")
    assert code == 2
    page = f"{hub.endpoint}/datasets/ILSVRC/imagenet-1k"
    assert error == (
        f"vapi-fast: error: --data hub:ILSVRC/imagenet-1k: accept its terms at {page}, then run `hf auth login` here "
        "as the same user"
    )
    assert hub.ranges == []
    hub.folder.joinpath("FoundationVision/LlamaGen/c2i_XXL_384.pt").unlink()
    code, error = command("align --model xxl")
    assert re.search(r"c2i_XXL_384\.pt: there is no such file, see http.*/FoundationVision/LlamaGen/tree/", error)
    assert not (tmp_path / "runs").exists()
