from __future__ import annotations

import argparse
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vapi_fast.models import LLAMAGEN_CONFIGS, VQ_CONFIGS, LlamaGen, LlamaGenConfig, VQTokenizer, VQTokenizerConfig
from vapi_fast.runtime.checkpoint import load_into, load_state_dict, save_generator, write_atomically
from vapi_fast.runtime.errors import CheckpointError

WEIGHTS = {"norm.weight": torch.tensor([1.0, -2.0, 3.0]), "output.weight": torch.arange(6.0).view(2, 3)}


class TouchesFile:
    """A pickle that, loaded carelessly, runs a shell command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> LlamaGen:
    """A generator of a size that `from_checkpoint` knows as "small"."""
    config = LlamaGenConfig(layers=2, heads=2, width=32, vocab_size=11, grid_size=2, num_classes=3)
    monkeypatch.setitem(LLAMAGEN_CONFIGS, "small", config)
    torch.manual_seed(0)
    return LlamaGen(config)


def refusal(path: Path, load: Callable[[], object]) -> str:
    """The message of the CheckpointError that `load` raises: one line that starts with the file's path."""
    with pytest.raises(CheckpointError) as error:
        load()
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)


# ---- what is read


@pytest.mark.parametrize("container", [None, "model", "module", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_every_container_and_prefix(container: str | None, prefix: str, tmp_path: Path) -> None:
    state = {prefix + key: value for key, value in WEIGHTS.items()}
    path = tmp_path / "generator.pt"
    torch.save(state if container is None else {container: state, "steps": 5}, path)
    assert_same(load_state_dict(path), WEIGHTS)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "generator.safetensors"
    save_file({prefix + key: value for key, value in WEIGHTS.items()}, path)
    assert_same(load_state_dict(str(path)), WEIGHTS)


def test_what_llamagens_training_stores_beside_the_weights_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "0001000.pt"
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(gpt_model="GPT-B", lr=1e-4, image_size=256, compile=True)
    torch.save({"model": WEIGHTS, "optimizer": optimizer.state_dict(), "steps": 1000, "args": arguments}, path)
    assert_same(load_state_dict(path), WEIGHTS)


def test_files_from_before_pytorch_1_6(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"model": WEIGHTS}, path, _use_new_zipfile_serialization=False)
    assert_same(load_state_dict(path), WEIGHTS)


# ---- what is refused


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "c2i_XXL_384.pt"
    assert refusal(path, lambda: load_state_dict(path)) == "no such checkpoint file; check the path"
    assert refusal(tmp_path, lambda: load_state_dict(tmp_path)).startswith("is a folder without a checkpoint that is")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_file(kind: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / ("generator.safetensors" if kind == "safetensors" else "generator.pt")
    weights = {"output.weight": torch.randn(50, 50)}
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"model": weights}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    message = refusal(path, lambda: load_state_dict(path))
    assert message.startswith("cannot be read, truncated or not a PyTorch checkpoint (")
    assert message.endswith("); copy or download it again")


@pytest.mark.parametrize(
    "text",
    [
        b"hello, this is a text\nfile",  # each text makes the unpickler fail in another way
        b"<!DOCTYPE html><html>404</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        b"\xff\xfe\x00\x01" * 20,
        b"]q\x00e.",
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_not_a_checkpoint(text: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"generator{suffix}"
    path.write_bytes(text)
    message = refusal(path, lambda: load_state_dict(path))
    assert message.startswith("cannot be read, truncated or not a PyTorch checkpoint (")
    assert "weights_only" not in message


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_does_not_run(zipped: bool, tmp_path: Path) -> None:
    path, touched = tmp_path / "generator.pt", tmp_path / "touched"
    if zipped:
        torch.save({"model": {"output.weight": TouchesFile(touched)}}, path)
    else:
        path.write_bytes(pickle.dumps(TouchesFile(touched), protocol=2))
    message = refusal(path, lambda: load_state_dict(path))
    assert not touched.exists()
    assert message.startswith(f"holds the Python object {os.system.__module__}.system, which could run code")
    if not zipped:
        pickle.loads(path.read_bytes())
        assert touched.exists()  # the file was a real threat


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"epoch": 3, "best": "yes"}, "no weights found; expected tensors at the top level or under model, module"),
        ({"model": {"steps": 3}}, "no weights found"),
        ({"state": {0: torch.ones(2)}, 1: []}, "no weights found"),
        ({}, "got an empty file"),
        ({"model": {}}, "got an empty file"),
        ([torch.ones(2)], "holds a list, expected a state dict"),
        (torch.ones(2), "holds a Tensor, expected a state dict"),
    ],
)
def test_no_weights_inside(content: object, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "generator.pt"
    torch.save(content, path)
    assert expected in refusal(path, lambda: load_state_dict(path))


def test_another_size_names_the_right_model(tmp_path: Path, small: LlamaGen) -> None:
    path = tmp_path / "generator.pt"
    save_generator(path, small.state_dict())
    assert refusal(path, lambda: LlamaGen.from_checkpoint(path, "xxl")) == (
        "holds 2 layers of width 32, but --model xxl has 48 of width 1536: pass --model small"
    )
    del LLAMAGEN_CONFIGS["small"]
    assert refusal(path, lambda: LlamaGen.from_checkpoint(path, "xxl")).endswith("no known size fits it")


def test_a_tokenizer_is_not_a_generator(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pt"
    torch.save({"model": {"quantize.embedding.weight": torch.ones(4, 2)}}, path)
    assert refusal(path, lambda: LlamaGen.from_checkpoint(path, "b")) == (
        "no weight named tok_embeddings.weight: not a LlamaGen generator's checkpoint"
    )


def test_missing_and_unknown_weights_are_named(tmp_path: Path, small: LlamaGen) -> None:
    path = tmp_path / "generator.pt"
    state = small.state_dict()
    del state["layers.1.attention.wo.weight"], state["norm.weight"]
    torch.save(state | {"layers.0.attention.wq.weight": torch.ones(1)}, path)
    assert refusal(path, lambda: LlamaGen.from_checkpoint(path, "small")) == (
        "does not fit this LlamaGen: 2 weights missing (layers.1.attention.wo.weight, norm.weight); 1 unknown weights "
        "(layers.0.attention.wq.weight): pass a whole checkpoint of a LlamaGen of size small"
    )


def test_another_tokenizer_is_named_with_its_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VQTokenizerConfig(channels=8, multipliers=(1, 1), latent_channels=8, codebook_size=5, norm_groups=4)
    monkeypatch.setitem(VQ_CONFIGS, "small", config)
    path = tmp_path / "tokenizer.pt"
    state = VQTokenizer(config).state_dict() | {"quantize.embedding.weight": torch.ones(7, 8)}
    torch.save({"model": state}, path)
    assert refusal(path, lambda: VQTokenizer.from_checkpoint(path, "small")) == (
        "does not fit this VQTokenizer: quantize.embedding.weight is [7, 8], expected [5, 8]: "
        "pass the checkpoint of a small tokenizer"
    )


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    layer = nn.Linear(3, 2)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(5)}
    path = Path("layer.pt")
    expected = "does not fit this Linear: bias is [5], expected [2]"
    assert refusal(path, lambda: load_into(layer, state, path)) == expected
    assert_same(layer.state_dict(), before)
    load_into(layer, state | {"bias": torch.ones(2)}, path)
    assert layer.weight.eq(1).all()


# ---- what is written


def test_saved_generator_is_loaded_again(tmp_path: Path, small: LlamaGen) -> None:
    path = tmp_path / "runs" / "1" / "aligned.pt"
    save_generator(path, small.state_dict())
    public = torch.load(path, weights_only=True)  # the layout that LlamaGen's own scripts read with --from-fsdp
    assert public.keys() == small.state_dict().keys()
    loaded = LlamaGen.from_checkpoint(path, "small")
    assert_same(loaded.state_dict(), small.state_dict())
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    inputs = torch.tensor([[4, 5, 6]]), torch.tensor([2])
    assert torch.equal(loaded(*inputs), small(*inputs))


def test_half_precision_weights_are_loaded_in_float32(tmp_path: Path, small: LlamaGen) -> None:
    path = tmp_path / "generator.pt"
    torch.save({key: value.bfloat16() for key, value in small.state_dict().items()}, path)
    loaded = LlamaGen.from_checkpoint(path, "small").output.weight
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, small.output.weight.bfloat16().float())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "aligned.pt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["aligned.pt"]


def test_a_write_replaces_the_old_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    seen = []

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        seen.append((temporary.parent, path.read_text()))

    write_atomically(path, write)
    assert seen == [(tmp_path, "old")]
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
