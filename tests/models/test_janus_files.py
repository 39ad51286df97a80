"""Janus-Pro's files: both formats, whole and in shards, read and written; and what is no Janus-Pro."""

from __future__ import annotations

import json
from pathlib import Path

import janus_models
import pytest
import torch
from janus_models import NAME, SMALL
from torch import Tensor

from vapi_fast.models import Janus
from vapi_fast.models.janus_files import save_weights
from vapi_fast.models.sizes import JANUS_CONFIGS
from vapi_fast.runtime.checkpoint import checkpoint_files, load_file_checked
from vapi_fast.runtime.errors import CheckpointError

LAYOUTS = ("bin", "bin-shards", "safetensors-shards", "transformers")


@pytest.fixture(autouse=True)
def small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JANUS_CONFIGS, NAME, SMALL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model, root = janus_models.public_model(), tmp_path_factory.mktemp("janus")
    return {layout: janus_models.write(root / layout, layout, model) for layout in LAYOUTS}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in load_file_checked(folder).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_read_is_written_in_its_layout(folders: dict[str, Path], layout: str, tmp_path: Path) -> None:
    source = folders[layout]
    model = Janus.from_checkpoint(source, NAME)
    model.requires_grad_(False)
    save_weights(tmp_path / "same", source, model.state_dict(), model.config)
    assert {path.name for path in (tmp_path / "same").iterdir()} == {path.name for path in source.iterdir()}
    before, after = tensors(source), tensors(tmp_path / "same")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key

    for parameter in model.parameters():
        parameter.add_(1)
    save_weights(tmp_path / "other", source, model.state_dict(), model.config)
    changed = {key for key, value in tensors(tmp_path / "other").items() if not torch.equal(value, before[key])}
    kept = ("vision_model", "aligner", "vqmodel", "gen_vision_model", "lm_head", "language_model.lm_head")
    assert before.keys() - changed == {key for key in before if key.removeprefix("model.").startswith(kept)}
    again = Janus.from_checkpoint(tmp_path / "other", NAME)
    for (name, weight), found in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(found, weight), name
    if layout.endswith("shards"):
        index = json.loads(next((tmp_path / "other").glob("*.index.json")).read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in before.values())
    for path in checkpoint_files(tmp_path / "other"):  # no view of a larger tensor is saved whole
        assert path.stat().st_size < 1.1 * (source / path.name).stat().st_size + 100


def test_the_layouts_hold_the_same_model_and_one_file_of_a_folder_is_enough(folders: dict[str, Path]) -> None:
    first, *others = (Janus.from_checkpoint(folders[layout], NAME).state_dict() for layout in LAYOUTS)
    others.append(Janus.from_checkpoint(folders["bin"] / "pytorch_model.bin", NAME).state_dict())
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_half_precision_goes_unchanged_beside_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    """The hub's files are bf16; trained weights are written in float32, and nothing else becomes larger."""
    state = {key: value.bfloat16() for key, value in tensors(folders["bin"]).items()}
    (tmp_path / "half").mkdir()
    torch.save(state, tmp_path / "half" / "pytorch_model.bin")
    model = Janus.from_checkpoint(tmp_path / "half", NAME)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    save_weights(tmp_path / "out", tmp_path / "half", model.state_dict(), model.config)
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[key].float(), value.float()) for key, value in state.items())
    assert (
        found["language_model.lm_head.weight"].dtype
        == found["vision_model.vision_tower.embeddings.position_embedding.weight"].dtype
        == torch.bfloat16
    )
    assert found["language_model.model.norm.weight"].dtype == found["gen_embed.weight"].dtype == torch.float32


def refused(path: Path, name: str = NAME) -> str:
    with pytest.raises(CheckpointError) as raised:
        Janus.from_checkpoint(path, name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_is_no_janus_pro_is_refused_in_a_line(folders: dict[str, Path], tmp_path: Path) -> None:
    state = tensors(folders["bin"])
    torch.save(state | {"vision_gen_dec_model.layer.weight": torch.ones(2)}, tmp_path / "flow.bin")
    assert "is JanusFlow, which draws by rectified flow, without tokens" in refused(tmp_path / "flow.bin")
    torch.save({"layers.0.weight": torch.ones(2, 2)}, tmp_path / "other.bin")
    assert "not a Janus-Pro checkpoint" in refused(tmp_path / "other.bin")
    assert "holds 2 layers of width 32, but --model janus-pro-1b has 24 of width 2048" in refused(
        folders["transformers"], "janus-pro-1b"
    )
    short = {key: value for key, value in state.items() if "layers.1.self_attn.k_proj" not in key}
    torch.save(short, tmp_path / "short.bin")
    assert "weights missing (layers.1.attention.wqkv.weight)" in refused(tmp_path / "short.bin")
    grouped = state | {"language_model.model.layers.0.self_attn.k_proj.weight": torch.ones(16, 32)}
    torch.save(grouped, tmp_path / "grouped.bin")
    assert "k_proj.weight is [16, 32], expected [32, 32]" in refused(tmp_path / "grouped.bin")

    earlier = tmp_path / "models--deepseek-ai--Janus-1.3B"
    earlier.mkdir()
    assert "is Janus, which was trained on other prompts: pass Janus-Pro" in refused(earlier)


def test_a_missing_shard_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    for path in folders["bin-shards"].iterdir():
        if "2-of-2" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "names the shard pytorch_model-2-of-2.bin, which is not beside it" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read (JSONDecodeError"),
        ("[]", "cannot be read (TypeError"),
        ('{"language_config": {}}', "cannot be read (KeyError: 'model_type')"),
        ('{"model_type": "llama"}', "is of a llama, expected multi_modality or janus"),
        ('{"model_type": "multi_modality", "language_config": {"num_attention_heads": 4}}', "num_attention_heads is 4"),
        (
            '{"model_type": "janus", "text_config": {"num_attention_heads": 2, "num_key_value_heads": 1}}',
            "num_key_value_heads is 1, and 2 in Janus-Pro",
        ),
        ('{"model_type": "janus", "text_config": {"rope_parameters": {"rope_theta": 5e5}}}', "rope_theta is 500000.0"),
        (
            '{"model_type": "multi_modality", "_name_or_path": "deepseek-ai/Janus-1.3B", "language_config": {}}',
            "is Janus's, which was trained on other prompts",
        ),
        (
            '{"model_type": "multi_modality", "language_config": {}, "vision_gen_enc_config": {}}',
            "is JanusFlow, which draws by rectified flow",
        ),
    ],
)
def test_another_models_configuration_is_refused(
    folders: dict[str, Path], tmp_path: Path, text: str, said: str
) -> None:
    torch.save(tensors(folders["bin"]), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(text)
    assert f"{tmp_path / 'config.json'}: {said}" in refused(tmp_path)
