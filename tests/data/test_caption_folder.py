"""`vapi-fast encode-captions`: LlamaGen's layout, finished where it stopped, and read back."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import text_encoder

pytest.importorskip("datasets")
from captioned import GIVEN, KEPT, TEXTS, jsonl, write

from vapi_fast import cli, commands
from vapi_fast.data.caption_data import CaptionedData
from vapi_fast.data.features import FolderFeatures
from vapi_fast.data.text import TextEncoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_encoder(tmp_path_factory.mktemp("encoder"))


def encode(data: Path, out: Path, encoder: Path, *more: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_command_flags(parser, "encode-captions")
    line = ["--data", data, "--out", out, "--text-encoder", encoder, "--batch-size", 4, *more]
    return commands.MAINS["encode-captions"](parser.parse_args([str(each) for each in line]))


@pytest.mark.parametrize("layout", ["list", "parquet"])
def test_what_is_written_is_what_is_read(
    encoder: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the lines' numbers, those without a caption left out; a second start makes what is missing alone."""
    source, out = write(tmp_path, layout), tmp_path / "out"
    assert encode(source, out, encoder) == 0
    assert f"9 captions of {source} encoded into {out}, 0 were there, 3 lines without" in capsys.readouterr().out
    stem = "part" if layout == "list" else "set"
    written = {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    assert set(written) == {f"{stem}/{line}.npy" for line in KEPT}
    features, mask = TextEncoder(encoder, CPU).encode([TEXTS[line] for line in KEPT], 120)
    for line, row, used in zip(KEPT, features, mask, strict=True):
        values = np.load(out / stem / f"{line}.npy")
        assert values.dtype == np.float32
        assert values.shape[0] == 1
        assert torch.allclose(torch.from_numpy(values[0]), row[used], atol=1e-5)
    (out / stem / "4.npy").unlink()
    assert encode(source, out, encoder) == 0
    assert "1 captions" in (said := capsys.readouterr().out)
    assert "8 were there" in said
    after = {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    assert {name for name in written if after[name] != written[name]} == {f"{stem}/4.npy"}
    data = CaptionedData(source, 8, features=FolderFeatures(out, 120, 16))
    (batch,) = data.batches(9, 1, seed=0)
    order = batch.image_ids
    assert torch.allclose(batch.features, features[order], atol=1e-5)
    assert torch.equal(batch.mask, mask[order])


def test_lists_of_captions_alone(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "long.jsonl", ({"text": [text, "a cat"]} for text in GIVEN[:3]))
    assert encode(source, tmp_path / "out", encoder, "--caption-column", "text:1", "--tokens", 3) == 0
    assert [np.load(tmp_path / "out/long" / f"{line}.npy").shape for line in range(3)] == [(1, 3, 16)] * 3
    capsys.readouterr()
    for other in ((), ("--caption-column", "text:1"), ("--caption-column", "text:1", "--tokens", 4)):
        assert encode(source, tmp_path / "out", encoder, *other) == 2
        assert "holds features of another --text-encoder, --caption-column or --tokens" in capsys.readouterr().err


def test_a_list_with_other_captions_is_not_taken_for_the_one_that_is_there(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for name in ("a", "b"):  # lists of several names share a folder
        assert encode(jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} cup"}]), out, encoder) == 0
    capsys.readouterr()
    edited = jsonl(tmp_path / "a.jsonl", [{"text": "a cat"}])
    assert encode(edited, out, encoder) == 2
    assert f"--out {out} holds features of other captions under a: choose another folder" in capsys.readouterr().err
    assert encode(jsonl(tmp_path / "b.jsonl", [{"text": "b cup"}]), out, encoder) == 0
    assert "1 were there" in capsys.readouterr().out


def test_input_that_cannot_be_used(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    source = jsonl(tmp_path / "a.jsonl", [{"title": "a cup"}])
    for out, message in ((tmp_path / "file", "is a file: pass a folder"), (tmp_path / "out", "has no captions")):
        assert encode(source, out, encoder) == 2
        assert message in capsys.readouterr().err
    assert encode(source, tmp_path / "out", tmp_path, "--caption-column", "title") == 2
    assert f"--text-encoder {tmp_path}: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
