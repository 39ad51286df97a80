"""What the names in a folder say: classes, splits in any case, system folders, links and pipes, ids from a file."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vapi_fast.data.dataset import ImageData, described, difference
from vapi_fast.data.image_sets import open_image_set
from vapi_fast.data.splits import IMAGE_SUFFIXES, choose_split, read_class_index, split_of
from vapi_fast.runtime.errors import DataError

datasets = pytest.importorskip("datasets")


inputs = pytest.importorskip("inputs")
png, classes = inputs.grey_png, inputs.classes


def names(data: ImageData) -> list[str]:
    return list(data.class_names.values())


def test_classes_are_folders_with_images_and_never_the_systems(tmp_path: Path) -> None:
    classes(tmp_path, "cat", "dog")
    for system in ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information", ".cache"):
        classes(tmp_path, system)
    classes(tmp_path / "cat", "__MACOSX")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.txt").write_text("")
    data = ImageData(tmp_path, 8)
    assert (names(data), len(data)) == (["cat", "dog"], 4)


def test_numbers_are_in_numeric_order_where_all_names_are_numbers(tmp_path: Path) -> None:
    assert names(ImageData(classes(tmp_path / "a", "0", "1", "10", "2", "003"), 8)) == ["0", "1", "2", "003", "10"]
    assert names(ImageData(classes(tmp_path / "b", "1", "10", "2", "x"), 8)) == ["1", "10", "2", "x"]


def test_each_real_folder_once_and_regular_files_only(tmp_path: Path) -> None:
    classes(tmp_path / "set", "cat", "dog")
    for name in ("cat", "dog"):
        (tmp_path / "set" / name / "all").symlink_to("..")
        (tmp_path / "set" / name / "self").symlink_to(".")
    os.mkfifo(tmp_path / "set" / "cat" / "x.png")
    (tmp_path / "set" / "cat" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "set" / "cat" / "broken.png").symlink_to("nowhere")
    (tmp_path / "set" / "cat" / "folder.png").mkdir()
    classes(tmp_path, "elsewhere")
    (tmp_path / "set" / "elsewhere").symlink_to(tmp_path / "elsewhere")  # a class of its own
    data = ImageData(tmp_path / "set", 8)
    assert (names(data), len(data)) == (["cat", "dog", "elsewhere"], 6)


def paths(data: ImageData) -> dict[str, list[str]]:
    """Files by their class, relative to the set."""
    found: dict[str, list[str]] = {}
    for i in range(len(data)):
        name = str(Path(data._rows.name(i)).relative_to(data.source))
        found.setdefault(data.class_names[data.load(i)[1]], []).append(name)
    return found


def test_links_into_a_class_leave_it_its_images(tmp_path: Path) -> None:
    root = classes(tmp_path / "set", "a", "c", "d")
    classes(root / "c", "deep")
    classes(tmp_path, "outside", each=1)
    (root / "a" / "link").symlink_to("../c")
    (root / "a" / "other").symlink_to("../d/../c/deep")
    (root / "b").symlink_to("d")  # sorted before it
    (root / "a" / "more").symlink_to(tmp_path / "outside")
    (root / "z").symlink_to(tmp_path / "outside")  # a class of its own
    (root / "d" / "extra").symlink_to(tmp_path / "extra")
    classes(tmp_path, "extra", each=1)
    assert paths(ImageData(root, 8)) == {
        "a": ["a/0.png", "a/1.png"],
        "c": ["c/0.png", "c/1.png", "c/deep/0.png", "c/deep/1.png"],
        "d": ["d/0.png", "d/1.png", "d/extra/0.png"],
        "z": ["z/0.png"],
    }


def test_pictures_beside_class_folders_are_spoken_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = classes(tmp_path / "set", "cat", "dog", each=3)
    assert (len(ImageData(root, 8)), len(open_image_set(root, 8)), capsys.readouterr().err) == (6, 6, "")
    for i in range(5):
        (root / f"{i}.png").write_bytes(png())
    assert len(ImageData(root, 8)) == 6
    (said,) = capsys.readouterr().err.splitlines()
    assert "set: pictures beside its class folders (5) are not taken" in said
    assert len(open_image_set(root, 8)) == 5
    (said,) = capsys.readouterr().err.splitlines()
    assert "set: pictures directly in it (5) are taken, those of its folders are not" in said
    classes(tmp_path / "splits" / "train", "cat")
    for folder in ("splits", "splits/train"):
        (tmp_path / folder / "0.png").write_bytes(png())
    assert len(ImageData(tmp_path / "splits", 8)) == 2
    assert capsys.readouterr().err.count("folders (1) are not") == 2


FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}


def test_pictures_are_opened_as_what_their_suffixes_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS file is a program, and Pillow would have Ghostscript run it."""
    (tmp_path / "a").mkdir()
    for suffix in IMAGE_SUFFIXES:
        picture = Image.new("RGB", (8, 8), (128, 128, 128))
        picture.save(tmp_path / "a" / f"0{suffix}", FORMATS.get(suffix, suffix[1:].upper()))
    data = ImageData(tmp_path, 8)
    assert len(data) == len(IMAGE_SUFFIXES)
    assert {round(data.load(i)[0].mean().item(), 2) for i in range(len(data))} == {0.0}
    assert len(next(open_image_set(tmp_path / "a", 8).batches(0, 9, 9))) == 9
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: started.append(args))
    for form in ("EPS", "TGA", "PCX"):
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / "0.png", form)
        with pytest.raises(DataError, match=r"0\.png: .*cannot identify"):
            ImageData(tmp_path, 8).load(sorted(IMAGE_SUFFIXES).index(".png"))
        with pytest.raises(DataError, match=r"0\.png: .*cannot identify"):
            list(open_image_set(tmp_path / "a", 8).batches(0, 9, 9))
    assert started == []


@pytest.mark.parametrize(
    "spelling", [("Train", "Val"), ("train", "validation"), ("TRAINING", "valid"), ("train", "test")]
)
def test_splits_in_any_case(tmp_path: Path, spelling: tuple[str, str]) -> None:
    for split, each in zip(spelling, (3, 1), strict=True):
        classes(tmp_path / split, "cat", "dog", each=each)
    classes(tmp_path, "__MACOSX")
    assert len(ImageData(tmp_path, 8)) == 6
    held_out = ImageData(tmp_path, 8, held_out=True)
    assert (len(held_out), held_out.split) == (2, spelling[1])
    for wanted in (spelling[1], spelling[1].upper()):
        assert len(ImageData(tmp_path, 8, split=wanted)) == 2
    assert len(ImageData(tmp_path, 8, split="train", held_out=True)) == 6
    with pytest.raises(DataError, match=f"no split 'extra'; it has {', '.join(sorted(spelling))}"):
        ImageData(tmp_path, 8, split="extra")


def test_the_only_split_is_taken_and_of_several_one_is_asked_for(tmp_path: Path) -> None:
    for i in range(2):
        table = pa.table({"image": [{"bytes": png(), "path": "x.png"}] * 3, "label": [0] * 3})
        pq.write_table(table, tmp_path / f"validation-0000{i}-of-00002.parquet")
    for held_out in (False, True):
        data = ImageData(tmp_path, 8, held_out=held_out)
        assert (len(data), data.split) == (6, "validation")
    with pytest.raises(DataError, match=r"has the splits val, test: choose one with --split"):
        choose_split(["val", "test"], None, False, tmp_path)
    assert choose_split(["test", "val"], None, True, tmp_path) == "val"
    assert choose_split(["train", "extra"], None, True, tmp_path) == "train"
    assert split_of("imagenet-VAL_0.tar") == "validation"
    assert split_of("trainer.tar") == ""


def test_saved_with_a_format_and_shards_whose_columns_differ(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}
    for form in ("arrow", "numpy", "torch"):
        datasets.Dataset.from_dict(rows, features=features).with_format(form).save_to_disk(tmp_path / form)
        image, label = ImageData(tmp_path / form, 8).load(3)
        assert (image.mean().item(), label) == (pytest.approx(3 / 127.5 - 1), 1)
    shards = tmp_path / "shards"
    shards.mkdir()
    one = {"image": [{"bytes": png(), "path": None}] * 2, "label": [0, 1]}
    pq.write_table(pa.table(one | {"id": [1, 2]}), shards / "a.parquet")
    pq.write_table(pa.table(one | {"id": ["x", "y"], "more": [0.5, 1.0]}), shards / "b.parquet")
    assert len(ImageData(shards, 8)) == 4
    pq.write_table(pa.table({"image": one["image"], "caption": ["x", "y"]}), shards / "c.parquet")
    with pytest.raises(DataError, match=r"c.parquet has no column 'label', which a.parquet beside it has"):
        ImageData(shards, 8)


def test_a_tar_cut_anywhere_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "whole.tar", "w") as archive:
        for i in range(3):
            for name, content in ((f"{i}.png", png(i)), (f"{i}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    whole = (tmp_path / "whole.tar").read_bytes()
    assert len(ImageData(tmp_path / "whole.tar", 8)) == 3
    (tmp_path / "padded.tar").write_bytes(whole + bytes(5 * 512))
    assert len(ImageData(tmp_path / "padded.tar", 8)) == 3
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
    for cut in [*range(100, end, 311), 512, 1024, end]:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cut\.tar"):
            ImageData(tmp_path / "cut.tar", 8)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.json", json.dumps({"n1": 4, "n2": 7, "n3": 0})),
        ("a.json", json.dumps({"4": ["n1", "tench"], "7": ["n2", "goldfish"], "0": ["n3", "shark"]})),
        ("a.json", json.dumps({"4": "n1", "7": "n2", "0": "n3"})),
        ("a.txt", "n1 4\nn2 7\nn3 0\n"),
        ("a.txt", "n3\na\nb\nc\nn1\nd\ne\nn2\n"),
        ("a.json", json.dumps(["n3", "a", "b", "c", "n1", "d", "e", "n2"])),
        ("a.json", "\ufeff" + json.dumps({"n1": 4, "n2": 7, "n3": 0})),
        ("a.txt", "\ufeffn1 4\nn2  7\nn3\t0\n"),
    ],
)
def test_ids_from_a_class_index(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    data = ImageData(classes(tmp_path / "set", "n2", "n1"), 8, num_classes=9, class_index=tmp_path / file)
    assert data.class_names == {4: "n1", 7: "n2"}
    assert [data.load(i)[1] for i in range(4)] == [4, 4, 7, 7]
    assert data.summary()["classes"] == {"4": {"name": "n1", "images": 2}, "7": {"name": "n2", "images": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "expected names of classes and their ids"),
        ('{"a": null}', "expected names of classes"),
        ('{"a": -1}', "has the id -1"),
        ('{"a": 1e3}', "expected names of classes"),
        ('{"a": 99999999999}', "taken or none"),
        ("a 1\na 2", "'a' has the id 2, which is taken"),
        ('{"cat": 0, "dog": 1, "cat": 2}', "'cat' is there twice"),
        ('{"0": ["cat"], "0": ["dog"]}', "'0' is there twice"),
        ("", "holds no names"),
        ("\0\1", "has no id for 2 of the 2 classes"),
        ("cat 0", "has no id for 1 of the 2 classes in .*: dog"),
        ("cat 0\ndog 9", "label 9 of .* is out of range"),
    ],
)
def test_a_bad_class_index_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "index").write_text(text)
    root = classes(tmp_path / "set", "cat", "dog")
    with pytest.raises(DataError, match=message) as refused:
        ImageData(root, 8, num_classes=9, class_index=tmp_path / "index")
    assert "\n" not in str(refused.value)


def test_names_of_several_words(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("tench\ngreat white shark\n\n  tiger shark 7 \nn01440764 tench, Tinca tinca 9\n")
    assert read_class_index(tmp_path / "index") == {
        "tench": 0,
        "great white shark": 1,
        "tiger shark": 7,
        "n01440764 tench, Tinca tinca": 9,
        "n01440764": 9,
    }
    root = classes(tmp_path / "set", "great white shark", "tiger shark", "n01440764")
    found = ImageData(root, 8, class_index=tmp_path / "index").class_names
    assert found == {1: "great white shark", 9: "n01440764", 7: "tiger shark"}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe: expected .*not a regular file"):
        read_class_index(tmp_path / "pipe")


def test_a_class_index_needs_names(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": png(), "path": None}], "label": [0]}), tmp_path / "a.parquet")
    (tmp_path / "index").write_text("cat")
    assert read_class_index(tmp_path / "index") == {"cat": 0}
    with pytest.raises(DataError, match=r"needs names of classes, and the labels of .* are numbers"):
        ImageData(tmp_path / "a.parquet", 8, class_index=tmp_path / "index")


def test_what_a_set_is_made_of_and_what_tells_two_apart(tmp_path: Path) -> None:
    before = ImageData(classes(tmp_path, "cat", "dog"), 8).summary()
    assert described(before, 2) == "4 images in 2 classes: cat=0, dog=1"
    assert "the generator has 9 classes, these images 2" in described(before, 9).splitlines()[1]
    assert difference(before, ImageData(tmp_path, 8).summary()) == ""
    classes(tmp_path, "bird", each=1)
    now = ImageData(tmp_path, 8).summary()
    assert difference(before, now) == "class 0 had 2 images of cat, now it has 1 images of bird"
    (tmp_path / "bird" / "0.png").unlink()
    (tmp_path / "cat" / "more.png").write_bytes(png())
    assert (
        difference(before, ImageData(tmp_path, 8).summary())
        == "class 0 had 2 images of cat, now it has 3 images of cat"
    )


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes(tmp_path, "cat")

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "cat")

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"cannot read .*Permission denied"):
        ImageData(tmp_path, 8)


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(tmp_path / "a" / "0.png")
    assert ImageData(tmp_path, 8).load(0)[0].unique().tolist() == [pytest.approx(128 / 127.5 - 1, rel=1e-3)]
