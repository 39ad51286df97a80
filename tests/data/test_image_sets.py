"""What is to be scored and is no file, or a file of another kind, is said to be that."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vapi_fast.data.image_sets import open_image_set, read_statistics
from vapi_fast.runtime.errors import DataError

pytest.importorskip("datasets")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), r"a\.npz: a folder, expected an \.npz file"),
        (os.mkfifo, r"a\.npz: not a regular file, expected"),
        (lambda path: path.symlink_to("gone"), r"a\.npz: no such file, expected"),
    ],
)
def test_what_is_named_npz_and_is_none(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "a.npz")
    assert read_statistics(tmp_path / "a.npz") is None
    with pytest.raises(DataError, match=message):
        open_image_set(tmp_path / "a.npz", 8)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_manifest_that_is_no_file_is_damaged(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "000000.png")
    make(tmp_path / "manifest.json")
    with pytest.raises(DataError, match=r"manifest\.json is damaged .*not a regular file"):
        open_image_set(tmp_path, 8)


@pytest.mark.parametrize("name", ["p" * 5000, "p" * 5000 + ".npz"])
def test_names_that_no_file_has(name: str) -> None:
    assert read_statistics(Path(name)) is None
    with pytest.raises(DataError, match="no such file"):
        open_image_set(Path(name), 8)


def test_the_odd_picture_is_named_whichever_is_read_first(tmp_path: Path) -> None:
    """Decoded in threads and read in parts by the ranks: the size that counts is the first picture's."""
    for size, name in ((32, "a"), (16, "b"), (32, "c")):
        Image.new("RGB", (size, size)).save(tmp_path / f"{name}.png")
    images = open_image_set(tmp_path, 32)
    with pytest.raises(DataError, match=r"b\.png is 16x16 pixels, others are 32x32"):
        list(images.batches(1, 3, 1))
    assert [batch.shape for batch in images.batches(2, 3, 1)] == [(1, 3, 32, 32)]
