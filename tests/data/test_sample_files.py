"""Samples that an interrupted run left: what is cut is drawn again, what is wrong is named, what is another's stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vapi_fast.data.sample_files import NpzFiles, PngFiles, remove_leftovers
from vapi_fast.runtime.errors import DataError


def pixels(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1], lambda content: content[:20]])
def test_a_picture_that_is_cut_is_missing(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    files = PngFiles(tmp_path, 4)
    files.add([0, 1, 2, 3], pixels(0, 1, 2, 3))
    files.flush()
    assert files.missing().tolist() == []
    path = tmp_path / "images" / "000002.png"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert files.missing().tolist() == [2]
    files.add([2], pixels(2))
    files.finish()
    assert path.read_bytes() == whole


def test_parts_are_merged_and_what_is_anothers_stays(tmp_path: Path) -> None:
    files = NpzFiles(tmp_path, 4)
    files.add([3, 0], pixels(3, 0))
    (tmp_path / "parts" / "mine.safetensors").write_bytes(b"a note")
    assert files.missing().tolist() == [1, 2]
    with pytest.raises(DataError, match="parts lacks some of the 4 samples"):
        files.finish()
    files.add([1, 2], pixels(1, 2))
    files.finish()
    assert np.load(tmp_path / "samples.npz")["arr_0"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["mine.safetensors"]
    (tmp_path / "parts" / "mine.safetensors").unlink()
    files.finish()
    assert not (tmp_path / "parts").exists()


IMAGES = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"ids": torch.tensor([0, 4]), "images": IMAGES}, "its ids are not whole numbers of 0 to 3"),
        ({"ids": torch.tensor([-1, 0]), "images": IMAGES}, "its ids are not"),
        ({"ids": torch.tensor([0.0, 1.0]), "images": IMAGES}, "its ids are not"),
        ({"ids": torch.tensor([True, False]), "images": IMAGES}, "its ids are not"),
        ({"ids": torch.tensor([[0, 1]]), "images": IMAGES}, "its ids are not"),
        ({"ids": torch.tensor([0, 1, 2]), "images": IMAGES}, r"3 ids, and images U8 \[2, 8, 8, 3\]"),
        ({"ids": torch.tensor([0, 1]), "images": IMAGES.float()}, r"2 ids, and images F32"),
        ({"ids": torch.tensor([0, 1]), "images": IMAGES[:, :4].contiguous()}, r"\[2, 4, 8, 3\] beside others of"),
        ({"ids": torch.tensor([0, 1]), "images": IMAGES[0]}, r"\[8, 8, 3\]"),
        ({"ids": torch.tensor([0, 1])}, "does not contain tensor images"),
    ],
)
def test_a_part_of_anything_else_is_named(tmp_path: Path, part: dict[str, Tensor], message: str) -> None:
    files = NpzFiles(tmp_path, 4)
    files.add([0, 1, 2, 3], pixels(0, 1, 2, 3))
    save_file(part, tmp_path / "parts" / "000002.safetensors")
    for read in (files.missing, files.finish):
        with pytest.raises(
            DataError, match=rf"parts/000002\.safetensors is damaged \(.*{message}.*: delete it"
        ) as told:
            read()
        assert str(told.value).isprintable()
    assert not (tmp_path / "samples.npz").exists()


def test_a_part_that_is_a_pipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    os.mkfifo(tmp_path / "parts" / "000000.safetensors")
    with pytest.raises(DataError, match=r"000000\.safetensors is damaged \(not a regular file\)"):
        NpzFiles(tmp_path, 4).missing()


def test_leftovers_are_ours_alone(tmp_path: Path) -> None:
    ours = [
        ".manifest.json.ab_12xyz.tmp.json",
        ".samples.npz.x1.tmp.npz",
        ".contact_sheet.png.x1.tmp.png",
        "images/.000003.png.x1.tmp.png",
        "parts/.1000003.safetensors.x1.tmp.safetensors",
    ]
    others = [".notes.tmp", ".000003.x1.tmp.png", ".vimrc.tmp~", "images/.mine.png.x1.tmp.png", "000001.png"]
    for folder in ("images", "parts"):
        (tmp_path / "out" / folder).mkdir(parents=True)
    for name in ours + others:
        (tmp_path / "out" / name).write_bytes(b"half")
    remove_leftovers(tmp_path / "out")
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == set(others)


def test_nothing_is_deleted_through_a_link(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    kept = [elsewhere / ".000003.png.x1.tmp.png", elsewhere / "000000.safetensors"]
    (out / "images").symlink_to(elsewhere)
    (out / "parts").symlink_to(elsewhere)
    (out / ".000004.png.x1.tmp.png").symlink_to(kept[0])
    kept[0].write_bytes(b"half")
    save_file({"ids": torch.tensor([0, 1]), "images": IMAGES}, kept[1])
    remove_leftovers(out)
    NpzFiles(out, 2).finish()
    assert (out / "samples.npz").exists()
    assert all(path.exists() for path in (*kept, out / ".000004.png.x1.tmp.png"))
