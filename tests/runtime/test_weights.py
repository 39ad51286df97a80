"""Weights as people really have them: wrapped, averaged, sharded, with leftovers; and those that are none."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vapi_fast.runtime.checkpoint import load_into, load_state_dict
from vapi_fast.runtime.errors import CheckpointError

WEIGHTS = {"norm.weight": torch.tensor([1.0, -2.0, 3.0]), "layers.0.attention.wo.weight": torch.arange(6.0).view(2, 3)}
AVERAGED = {key: value + 1 for key, value in WEIGHTS.items()}
Named = dict[str, Tensor]


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def assert_same(state: Named, expected: Named) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"module.module.{key}",
        lambda key: f"model._orig_mod.module.{key}",
        lambda key: f"_fsdp_wrapped_module._orig_mod.{key}",
        lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
        lambda key: f"_orig_mod.{key.replace('layers.0.', 'layers.0._orig_mod.')}",
    ],
)
def test_wrappers_in_any_order_and_number(wrapped: Callable[[str], str], tmp_path: Path) -> None:
    state = {wrapped(key): value for key, value in WEIGHTS.items()}
    assert_same(load_state_dict(saved({"model": state}, tmp_path / "a.pt")), WEIGHTS)


def test_containers_in_each_other_or_of_another_name(tmp_path: Path) -> None:
    assert_same(load_state_dict(saved({"state_dict": {"module": {"model": WEIGHTS}}}, tmp_path / "a.pt")), WEIGHTS)
    other = {"generator_weights": WEIGHTS, "optimizer": {"state": {0: {"step": 3}}}, "args": {"lr": 1}}
    assert_same(load_state_dict(saved(other, tmp_path / "b.pt")), WEIGHTS)
    with pytest.raises(CheckpointError, match="no weights found"):  # which of the two?
        load_state_dict(saved({"generator": WEIGHTS, "discriminator": AVERAGED}, tmp_path / "c.pt"))
    endless: dict[str, Any] = {}
    endless["model"] = endless
    with pytest.raises(CheckpointError, match="no weights found"):
        load_state_dict(saved(endless, tmp_path / "d.pt"))


def test_a_name_under_two_prefixes_is_refused(tmp_path: Path) -> None:
    path = saved({"a": torch.ones(1), "module.a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds a twice, under several prefixes"):
        load_state_dict(path)


def test_leftovers_of_sampling_and_training_go_and_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = {
        "layers.0.attention.kv_cache.k_cache": torch.zeros(2, 6, 64, 32),
        "causal_mask": torch.ones(2, 64, 64, dtype=torch.bool),
        "freqs_cis": torch.zeros(4, 2, 2),
        "layers.0._extra_state": torch.zeros(0),
        "bn.num_batches_tracked": torch.tensor(4),
        "args": argparse.Namespace(lr=1),
        "optimizer": {"state": {}},
        "steps": 7,
    }
    assert_same(load_state_dict(saved(WEIGHTS | left, tmp_path / "a.pt")), WEIGHTS)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"vapi-fast: warning: {tmp_path / 'a.pt'}: left out 8 entries that are no weights (layers.0."
    )
    assert_same(load_state_dict(saved(WEIGHTS, tmp_path / "b.pt")), WEIGHTS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("key", ["ema", "model_ema", "ema_state_dict"])
def test_averaged_weights(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = saved({key: AVERAGED, "model": WEIGHTS, "steps": 3}, tmp_path / "both.pt")
    assert_same(load_state_dict(both), WEIGHTS)
    assert_same(load_state_dict(both, averaged=True), AVERAGED)
    assert capsys.readouterr().err == ""
    assert_same(load_state_dict(saved({key: AVERAGED, "model": {}}, tmp_path / "a.pt")), AVERAGED)
    assert f"holds averaged weights ({key}) alone: they are taken" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"has no averaged weights .*: leave --ema out"):
        load_state_dict(saved({"model": WEIGHTS}, tmp_path / "none.pt"), averaged=True)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a", "a.safetensors.part"])
def test_safetensors_under_any_suffix(name: str, tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / name)
    assert_same(load_state_dict(tmp_path / name), WEIGHTS)


def sharded(folder: Path, suffix: str) -> Path:
    """The weights in two files and their index."""
    names = {}
    for number, (key, value) in enumerate(WEIGHTS.items(), start=1):
        names[key] = f"model-{number:05d}-of-00002.{suffix}"
        write = save_file if suffix == "safetensors" else torch.save
        write({key: value}, folder / names[key])
    (folder / f"model.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_of_shards(suffix: str, tmp_path: Path) -> None:
    assert_same(load_state_dict(sharded(tmp_path, suffix)), WEIGHTS)


@pytest.mark.parametrize("name", ["consolidated.pth", "consolidated.00.pth", "pytorch_model.bin", "model.safetensors"])
def test_a_folder_with_one_file_of_a_usual_name(name: str, tmp_path: Path) -> None:
    (save_file if name.endswith("safetensors") else torch.save)(WEIGHTS, tmp_path / name)
    assert_same(load_state_dict(tmp_path), WEIGHTS)


def test_a_weight_is_read_from_the_shard_that_the_index_names(tmp_path: Path) -> None:
    folder = sharded(tmp_path, "safetensors")
    first, second = WEIGHTS
    save_file({first: WEIGHTS[first] + 9, second: WEIGHTS[second]}, folder / "model-00002-of-00002.safetensors")
    assert_same(load_state_dict(folder), WEIGHTS)


def test_damaged_folders_of_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path, "bin")
    index = folder / "model.bin.index.json"
    whole = json.loads(index.read_text())
    for content, message in (
        ("[" * 100_000, "is no index of weights"),
        ('{"weight_map": 3}', "is no index of weights"),
        (
            json.dumps({"weight_map": whole["weight_map"] | {"more": "model-00001-of-00002.bin"}}),
            "that its shards lack",
        ),
        (json.dumps({"weight_map": {"a": "../../etc/passwd"}}), "names files outside of its folder"),
        (json.dumps({"weight_map": {"a": "gone.bin"}}), "names the shard gone.bin, which is not beside it"),
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=message) as refused:
            load_state_dict(folder)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "has values that are not finite"),
        (torch.tensor([1.0, float("-inf")]), "has values that are not finite"),
        (torch.tensor([1e300], dtype=torch.float64), "has values that are not finite in float32"),
        (torch.tensor([65504.0, float("inf")], dtype=torch.float16), "has values that are not finite"),
        (torch.zeros(2, dtype=torch.int64), "is of type int64, expected float32"),
        (torch.zeros(2, dtype=torch.bool), "is of type bool"),
        (torch.zeros(2, dtype=torch.complex64), "is of type complex64"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "is of type float8_e4m3fn"),
        (torch.zeros(0, 3), "is empty"),
        (torch.zeros(1).expand(1 << 40), "repeats 4 bytes: save the whole weights"),
        (torch.eye(3).to_sparse(), "is sparse"),
        (torch.empty(3, device="meta"), "is on the meta device"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "is quantized"),
    ],
)
def test_what_is_no_weight(weight: Tensor, message: str, tmp_path: Path) -> None:
    path = saved(WEIGHTS | {"output\n\x1b[31m.weight": weight}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as refused:
        load_state_dict(path)
    said = str(refused.value)
    assert said.startswith(f"{path}: ")
    assert message in said
    assert said.isprintable()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_become_the_models_own(dtype: torch.dtype, tmp_path: Path) -> None:
    path = saved({"weight": torch.ones(2, 3, dtype=dtype), "bias": torch.ones(2, dtype=dtype)}, tmp_path / "a.pt")
    for device in ("cpu", "meta"):
        layer = nn.Linear(3, 2, device=device)
        load_into(layer, load_state_dict(path), path)
        assert layer.weight.dtype == torch.float32
        assert (layer.weight == 1).all()


def test_the_largest_finite_values_are_finite(tmp_path: Path) -> None:
    state: dict[str, Any] = {"a": torch.full((1000,), torch.finfo(torch.float16).max, dtype=torch.float16)}
    assert len(load_state_dict(saved(state, tmp_path / "a.pt"))["a"]) == 1000
