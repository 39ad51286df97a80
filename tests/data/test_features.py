"""Captions' features: encoded once however often they are asked for, whoever asks; LlamaGen's folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inputs import text_encoder
from processes import PATIENCE, forkserver, free_port
from torch import Tensor

pytest.importorskip("datasets")

from vapi_fast.data import features as module
from vapi_fast.data.captions import Caption
from vapi_fast.data.features import CachedFeatures, FolderFeatures
from vapi_fast.data.text import TextEncoder
from vapi_fast.runtime.errors import ConfigError, DataError, Error

CPU = torch.device("cpu")
TOKENS, WIDTH = 12, 16
BATCH = 2  # of two processes
TEXTS = ["a red cup", "two dogs", "a cat on a table", "a blue cup on a red table", "Two dogs!", "a cup"]


def captions(texts: Sequence[str] = TEXTS) -> list[Caption]:
    return [Caption(text, "list", line) for line, text in enumerate(texts)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_encoder(tmp_path_factory.mktemp("encoder"), WIDTH)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cleaned captions that encoders have been given."""
    given: list[str] = []
    states = TextEncoder.states

    def noted(self: TextEncoder, texts: Sequence[str], *sizes: Any) -> Any:
        given.extend(texts)
        return states(self, texts, *sizes)

    monkeypatch.setattr(TextEncoder, "states", noted)
    return given


def check(source: CachedFeatures, encoder: Path, texts: Sequence[str] = TEXTS) -> None:
    """All of them are what the encoder gives each alone."""
    alone = TextEncoder(encoder, CPU)
    for caption in captions(texts):
        features, mask = alone.encode([caption.text], TOKENS)
        found = source.states(caption)
        assert found.dtype == torch.float32
        assert torch.allclose(found, features[mask], atol=1e-5)


def test_each_is_encoded_once(encoder: Path, encoded: list[str], tmp_path: Path) -> None:
    source = CachedFeatures(encoder, CPU, TOKENS, WIDTH, tmp_path)
    source.prepare([*captions(), *captions(["A RED CUP", *TEXTS])])
    assert sorted(encoded) == sorted(
        {"a red cup", "two dogs", "a cat on a table", "a blue cup on a red table", "two dogs!", "a cup"}
    )
    again = CachedFeatures(encoder, CPU, TOKENS, WIDTH, tmp_path)
    again.prepare(captions())
    for caption in captions():
        assert torch.equal(source.states(caption), again.states(caption))
    assert len(encoded) == 6
    check(again, encoder)


def test_other_encoders_and_lengths_are_kept_apart(encoder: Path, encoded: list[str], tmp_path: Path) -> None:
    CachedFeatures(encoder, CPU, TOKENS, WIDTH, tmp_path / "cache").prepare(captions(["a cup"]))
    CachedFeatures(encoder, CPU, TOKENS + 1, WIDTH, tmp_path / "cache").prepare(captions(["a cup"]))
    other = text_encoder(tmp_path / "other", WIDTH)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"cup"', '"cat2"'))
    CachedFeatures(other, CPU, TOKENS, WIDTH, tmp_path / "cache").prepare(captions(["a cup"]))
    assert encoded == ["a cup"] * 3


def test_a_crash_costs_a_file_at_most(
    encoder: Path, encoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", 2)
    save, saved = CachedFeatures._save, []

    def fail_at_third(self: CachedFeatures, found: dict[str, Tensor]) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.extend([save(self, found)])

    monkeypatch.setattr(CachedFeatures, "_save", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        CachedFeatures(encoder, CPU, TOKENS, WIDTH, tmp_path).prepare(captions())
    monkeypatch.setattr(CachedFeatures, "_save", save)
    encoded.clear()
    source = CachedFeatures(encoder, CPU, TOKENS, WIDTH, tmp_path)
    source.prepare(captions())
    assert len(encoded) == 2
    check(source, encoder)


def test_a_damaged_file_is_made_again(
    encoder: Path,
    encoded: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "SHARD", 3)
    CachedFeatures(encoder, CPU, TOKENS, WIDTH, tmp_path).prepare(captions())
    first, second = sorted(tmp_path.glob("*/*.safetensors"))
    first.write_bytes(first.read_bytes()[:-40])
    being_written = second.with_name(f".{second.name}.x.tmp.safetensors")
    being_written.write_bytes(b"not whole")
    encoded.clear()
    source = CachedFeatures(encoder, CPU, TOKENS, WIDTH, tmp_path)
    source.prepare(captions())
    assert len(encoded) == 3
    assert f"warning: {first}: damaged" in capsys.readouterr().err
    assert being_written.exists()
    check(source, encoder)


def test_long_captions_are_cut(encoder: Path, tmp_path: Path) -> None:
    source = CachedFeatures(encoder, CPU, TOKENS, WIDTH, tmp_path)
    (long,) = captions(["a red cup " * 1000])
    source.prepare([long])
    assert source.states(long).shape == (TOKENS, WIDTH)
    check(source, encoder, [long.text])


def test_a_caption_that_was_not_foreseen_is_encoded_when_it_comes(
    encoder: Path, encoded: list[str], tmp_path: Path
) -> None:
    source = CachedFeatures(encoder, CPU, TOKENS, WIDTH, tmp_path)
    (caption,) = captions(["a cat"])
    assert torch.equal(source.states(caption), source.states(caption))
    assert encoded == ["a cat"]
    check(source, encoder, ["a cat"])
    with pytest.raises(DataError, match="a caption has no words"):
        source.states(Caption("漢字", "list", 1))


def test_what_does_not_fit_is_told(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"--text-encoder {encoder}: its states are 16 wide, this checkpoint takes 24"
    ):
        CachedFeatures(encoder, CPU, TOKENS, 24, tmp_path).prepare(captions())
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match=r"could not be written to .*; pass a --caption-cache with room"):
        CachedFeatures(encoder, CPU, TOKENS, WIDTH, tmp_path / "file").prepare(captions())


def encode_and_note(number: int, port: int, encoder: Path, cache: Path, out: Path) -> None:
    """One of two processes: ranks of a run where there is a port, else each by itself."""
    from vapi_fast.runtime.distributed import process_group

    torch.set_num_threads(1)
    if port:
        ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"})
    states, given = TextEncoder.states, []
    TextEncoder.states = lambda self, texts, *sizes: (given.extend(texts), states(self, texts, *sizes))[1]
    module.CAPTION_BATCH = BATCH
    with process_group():
        source = CachedFeatures(encoder, CPU, TOKENS, WIDTH, cache)
        source.prepare(captions())
        count = len(given)
        torch.save((count, [source.states(caption) for caption in captions()]), out / f"{number}.pt")
        assert len(given) == count


@pytest.mark.parametrize("ranks", [True, False])
def test_two_processes_at_once(encoder: Path, tmp_path: Path, ranks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks share the work, batch by batch as one process has it, and two runs do not disturb each other."""
    port = free_port() if ranks else 0
    arguments = (port, encoder, tmp_path / "cache", tmp_path)
    both = [forkserver.Process(target=encode_and_note, args=(number, *arguments)) for number in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(PATIENCE)
        assert process.exitcode == 0
    (count, one), (other_count, other) = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    if ranks:
        assert (count, other_count) == (4, 2)
        monkeypatch.setattr(module, "CAPTION_BATCH", BATCH)
        by_one = CachedFeatures(encoder, CPU, TOKENS, WIDTH, tmp_path / "of one")
        by_one.prepare(captions())
        assert all(torch.equal(by_one.states(caption), states) for caption, states in zip(captions(), one, strict=True))
    alone = TextEncoder(encoder, CPU)
    for caption, *found in zip(captions(), one, other, strict=True):
        features, mask = alone.encode([caption.text], TOKENS)
        for states in found:
            assert torch.allclose(states, features[mask], atol=1e-5)


def test_llamagens_folders(tmp_path: Path) -> None:
    """With a share of the images' features from the folder of short captions, the same ones each time."""
    for name, value in (("long", 1.0), ("short", 2.0)):
        (tmp_path / name / "list").mkdir(parents=True)
        for line in range(200):
            np.save(tmp_path / name / "list" / f"{line}.npy", np.full((1, line % 5 + 1, 4), value + line, np.float32))
    source = FolderFeatures(tmp_path / "long", 5, 4)
    source.prepare(captions())
    assert torch.equal(source.states(Caption("", "list", 7)), torch.full((3, 4), 8.0))
    mixed = FolderFeatures(tmp_path / "long", 5, 4, tmp_path / "short", 0.3)
    drawn = [[float(mixed.states(Caption("", "list", line))[0, 0]) - line for line in range(200)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {1.0, 2.0}
    assert 35 < drawn[0].count(2.0) < 85
    for share, value in ((0.0, 1.0), (1.0, 2.0)):
        source = FolderFeatures(tmp_path / "long", 5, 4, tmp_path / "short", share)
        assert {float(source.states(Caption("", "list", line))[0, 0]) - line for line in range(20)} == {value}
    (tmp_path / "short/list/0.npy").unlink()
    with pytest.raises(DataError, match=r"short/list/0\.npy: no features of this caption; vapi-fast encode-captions"):
        FolderFeatures(tmp_path / "long", 5, 4, tmp_path / "short", 1.0).prepare(captions())


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 3, 5), np.float32), r"is float32 \[1, 3, 5\], this checkpoint takes float32 \[1, 1 to 5, 4\]"),
        (np.zeros((1, 6, 4), np.float32), r"is float32 \[1, 6, 4\], this checkpoint"),
        (np.zeros((1, 0, 4), np.float32), r"is float32 \[1, 0, 4\], this checkpoint"),
        (np.zeros((2, 3, 4), np.float32), r"is float32 \[2, 3, 4\], this checkpoint"),
        (np.zeros((1, 3, 4), np.int64), r"is int64 \[1, 3, 4\], this checkpoint"),
        (np.full((1, 3, 4), np.nan, np.float32), "has values that are not finite"),
        (np.array([None]), "cannot be read as a .npy array"),
    ],
)
def test_features_that_do_not_fit_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    (tmp_path / "list").mkdir()
    np.save(tmp_path / "list/0.npy", array)
    with pytest.raises(DataError, match=message):
        FolderFeatures(tmp_path, 5, 4).prepare(captions())
