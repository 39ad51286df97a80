"""Files that make up a set together: whose split they are, that they agree, and that none is read short."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vapi_fast.data import image_files
from vapi_fast.data.dataset import ImageData
from vapi_fast.runtime.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


png = pytest.importorskip("inputs").grey_png


def tar_of(*values: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for value in values:
            for name, content in ((f"{value}.png", png(value)), (f"{value}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def rows(*labels: int) -> dict[str, list]:
    return {"image": [{"bytes": png(i), "path": None} for i in range(len(labels))], "label": list(labels)}


def write_shards(folder: Path, *names: str) -> Path:
    """Tars or parquet files of 1, 2, 4, … images in the order of the names: their sum tells which were read."""
    folder.mkdir()
    for number, name in enumerate(names):
        if name.endswith(".tar"):
            (folder / name).write_bytes(tar_of(*range(2**number)))
        else:
            pq.write_table(pa.table(rows(*[0] * 2**number)), folder / name)
    return folder


def values(data: ImageData) -> list[int]:
    return [round((data.load(i)[0].mean().item() + 1) * 127.5) for i in range(len(data))]


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_shards_without_a_split_word_are_training_images(tmp_path: Path, suffix: str) -> None:
    names = [f"part-000.{suffix}", f"part-001.{suffix}", f"test.{suffix}"]
    folder = write_shards(tmp_path / "set", *names)
    data = ImageData(folder, 8)
    assert (len(data), data.split) == (3, "train")
    data = ImageData(folder, 8, held_out=True)
    assert (len(data), data.split) == (4, "test")
    assert len(ImageData(folder, 8, split="training")) == 3
    with pytest.raises(DataError, match="no split 'val'; it has test, train"):
        ImageData(folder, 8, split="val")
    more = write_shards(tmp_path / "more", *names, f"train-000.{suffix}")
    with pytest.raises(
        DataError, match=rf"part-000.{suffix} says no split, and train-000.{suffix} beside it says train"
    ):
        ImageData(more, 8)
    assert len(ImageData(more, 8, held_out=True)) == 4


def test_a_split_of_what_has_none_is_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", "a.tar", "b.tar")
    tables = write_shards(tmp_path / "tables", "a.parquet", "val.parquet")
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    (tmp_path / "classes" / "cat" / "0.png").write_bytes(png())
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows(0, 0), features=features).save_to_disk(tmp_path / "saved")
    for source in (shards, shards / "a.tar", tables / "a.parquet", tmp_path / "classes", tmp_path / "saved"):
        data = ImageData(source, 8)
        assert data.split is None
        with pytest.raises(DataError, match=r"has no split 'train', nor any other: leave out --split"):
            ImageData(source, 8, split="train")
    named = tables / "val.parquet"
    assert (len(ImageData(named, 8)), len(ImageData(named, 8, split="validation"))) == (2, 2)
    with pytest.raises(DataError, match="has no split 'train'; it has validation"):
        ImageData(named, 8, split="train")
    named = datasets.Dataset.from_dict(rows(0, 0), features=features, split="test")
    named.save_to_disk(tmp_path / "named")
    assert len(ImageData(tmp_path / "named", 8, split="test")) == 2
    with pytest.raises(DataError, match="has no split 'train'; it has test"):
        ImageData(tmp_path / "named", 8, split="train")


def test_a_tar_with_a_hole_or_another_behind_it_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.tar", tar_of(*range(6))
    path.write_bytes(whole)
    assert values(ImageData(path, 8)) == list(range(6))
    hole = bytearray(whole)
    hole[2048:4096] = bytes(2048)  # two members from the third on
    tail = whole[:2048].ljust(image_files.LARGEST_PADDING + 2048 + 20_000, b"\0")  # of a preallocated file
    for damaged in (bytes(hole), whole + tar_of(7), whole + bytes(3 << 20) + b"x", tail):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.tar ends at byte \d+, and \d+ bytes follow: .*download it again"):
            ImageData(path, 8)
    path.write_bytes(whole.rstrip(b"\0").ljust(len(whole) // 512 * 512 + image_files.LARGEST_PADDING, b"\0"))
    assert len(ImageData(path, 8)) == 6  # as `tar --blocking-factor 2048` fills it up


def test_shards_that_number_their_classes_differently_are_refused(tmp_path: Path) -> None:
    def write(name: str, classes: list[str] | None, *labels: int) -> None:
        label = datasets.ClassLabel(names=classes) if classes else datasets.Value("int64")
        features = datasets.Features({"image": datasets.Image(), "label": label})
        datasets.Dataset.from_dict(rows(*labels), features=features).to_parquet(tmp_path / name)

    write("train-0.parquet", ["cat", "dog"], 0, 1)
    write("train-1.parquet", ["cat", "dog"], 1, 1)
    write("train-2.parquet", None, 0)
    data = ImageData(tmp_path, 8)
    assert data.class_names == {0: "cat", 1: "dog"}
    assert [data.load(i)[1] for i in range(5)] == [0, 1, 1, 1, 0]
    write("train-1.parquet", ["dog", "cat"], 1, 1)
    with pytest.raises(DataError, match=r"train-1\.parquet and train-0\.parquet beside it number .*'label'"):
        ImageData(tmp_path, 8)


@pytest.mark.parametrize("place", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json", "elsewhere"])
def test_a_pipe_in_a_saved_data_set_does_not_hang(tmp_path: Path, place: str) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    one = datasets.Dataset.from_dict(rows(0, 0), features=features)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "set")
    train = tmp_path / "set" / "train"
    if place == "elsewhere":
        state = json.loads((train / "state.json").read_text())
        state["_data_files"][0]["filename"] = str(tmp_path / place)
        (train / "state.json").write_text(json.dumps(state))
    else:
        (train / place).unlink()
    os.mkfifo(train / place if place != "elsewhere" else tmp_path / place)
    with pytest.raises(DataError, match=rf"{place} is not a regular file"):
        ImageData(tmp_path / "set", 8)


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_a_shard_that_is_no_file_is_not_passed_over(tmp_path: Path, suffix: str) -> None:
    folder = write_shards(tmp_path / "set", f"a.{suffix}")
    (folder / f"folder.{suffix}").mkdir()
    assert len(ImageData(folder, 8)) == 1
    for make in (os.mkfifo, lambda path: path.symlink_to("gone"), lambda path: path.symlink_to("/dev/zero")):
        make(folder / f"b.{suffix}")
        with pytest.raises(DataError, match=rf"b\.{suffix} is not a regular file, or a link that leads nowhere"):
            ImageData(folder, 8)
        (folder / f"b.{suffix}").unlink()
