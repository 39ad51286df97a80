"""Images with captions: every layout, the order of classes' sets, features in their places, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")
import datasets
from captioned import GIVEN, KEPT, LAYOUTS, TEXTS, Numbered, jsonl, pictures, write, write_tar
from inputs import grey_png

from vapi_fast.data.caption_data import CaptionedData
from vapi_fast.data.caption_files import Captions
from vapi_fast.data.captions import clean_caption, has_words
from vapi_fast.data.dataset import ImageBatch, ImageData, described, difference
from vapi_fast.data.prompt_tokens import PromptTokens
from vapi_fast.runtime.errors import DataError

SIZE = 8


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def opened(source: Path, **options: object) -> CaptionedData:
    return CaptionedData(source, SIZE, **{"features": Numbered(), **options})


def values(images: torch.Tensor) -> list[int]:
    """The grey of each image, which says which it is."""
    return ((images.mean((1, 2, 3)) + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(tmp_path: Path, layout: str) -> None:
    """Those without words are left out and counted, and each image keeps its own caption and features."""
    data = opened(write(tmp_path, layout))
    assert [data.caption(i) for i in range(len(data))] == [TEXTS[v] for v in KEPT]
    assert [values(data.load(i)[0][None])[0] for i in range(len(data))] == KEPT
    about = data.summary()
    assert (about["images"], about["classes"], about["captions"]["left_out"]) == (9, {}, 3)
    assert f"9 images with captions, from {about['captions']['column']!r}; 3 without are left out" == described(
        about, 0
    )
    (batch,) = data.batches(9, 1, seed=0)
    assert sorted(batch.image_ids.tolist()) == list(range(9))
    assert batch.labels.tolist() == batch.image_ids.tolist()
    for row, (image, value) in enumerate(zip(batch.image_ids.tolist(), values(batch.images), strict=True)):
        assert value == KEPT[image]
        used = value % 5 + 1
        assert batch.mask[row].tolist() == [False] * (5 - used) + [True] * used
        assert batch.features[row].tolist() == [[0.0] * 3] * (5 - used) + [[float(value)] * 3] * used


def test_order_ranks_and_resuming_are_those_of_classes(tmp_path: Path) -> None:
    captions: list[str | None] = list(TEXTS)
    data = opened(write(tmp_path, "parquet", captions))
    labelled = tmp_path / "labelled.parquet"
    rows = {"image": [{"bytes": grey_png(v), "path": None} for v in range(12)], "label": [0] * 12}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(labelled)
    order = [batch.image_ids.tolist() for batch in ImageData(labelled, SIZE).batches(4, 6, seed=5)]
    whole = list(data.batches(4, 6, seed=5))
    assert [batch.image_ids.tolist() for batch in whole] == order
    ranks = [data.batches(4, 6, seed=5, start_step=2, rank=rank, world_size=2) for rank in range(2)]
    for expected, *parts in zip(whole[2:], *ranks, strict=True):
        for name in ImageBatch._fields:
            assert torch.equal(getattr(expected, name), torch.cat([getattr(part, name) for part in parts]))
    ids = [caption.line for caption in data.foreseen(8, 5)]
    assert ids == [i for batch in order[:2] for i in batch]
    assert sorted(caption.line for caption in data.foreseen(100, 5)) == list(range(12))


@pytest.mark.parametrize("cause", ["image", "features"])
def test_what_cannot_be_had_goes_to_the_next_image(tmp_path: Path, cause: str) -> None:
    source = write(tmp_path, "list", list(TEXTS))
    if cause == "image":
        (tmp_path / "set/4.png").write_bytes(b"")
    data = opened(source, features=Numbered(refused=(4,) if cause == "features" else ()))
    with pytest.warns(UserWarning, match=r"skipped unreadable image .*4\.png \(DataError: (zero bytes|no features)\)"):
        (batch,) = data.batches(12, 1, seed=0)
    assert sorted(batch.image_ids.tolist()) == sorted([*range(4), 5, *range(5, 12)])
    assert batch.features[:, -1, 0].tolist() == values(batch.images) == batch.image_ids.tolist()
    assert data.skipped == [str(tmp_path / "set/4.png")]


def test_of_several_captions_the_first_with_words_or_the_one_asked_for(tmp_path: Path) -> None:
    pictures(tmp_path / "a", 3)
    lines = [
        {"image_path": str(tmp_path / "a/0.png"), "text": ["", "two cups", "a cat"]},
        {"image_path": "a/1.png", "text": ["a dog"]},
        {"image_path": "a/2.png", "text": None, "title": "a lamp"},
    ]
    source = jsonl(tmp_path / "list.jsonl", lines)
    assert [opened(source).caption(i) for i in range(2)] == ["two cups", "a dog"]
    data = opened(source, caption_column="text:1")
    assert (len(data), data.caption(0), data.summary()["captions"]["left_out"]) == (1, "two cups", 2)
    with pytest.raises(DataError, match=r"none of the 3 images in .* has a caption in 'text:3'"):
        opened(source, caption_column="text:3")
    assert [opened(source, caption_column="title").caption(0)] == ["a lamp"]


def test_lists_of_captions_in_tables(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "captions": [datasets.Value("string")]})
    rows = {"image": [{"bytes": grey_png(v), "path": None} for v in range(3)]}
    rows["captions"] = [["a cup", "two cups"], [], [None, "a cat"]]
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    data = opened(tmp_path / "a.parquet")
    assert [data.caption(i) for i in range(len(data))] == ["a cup", "a cat"]
    assert opened(tmp_path / "a.parquet", caption_column="captions:1").caption(0) == "two cups"


def test_splits(tmp_path: Path) -> None:
    """Of files by their names, of an image folder by its folders'."""
    for split, count in (("train", 3), ("validation", 2)):
        pictures(tmp_path / "folder" / split, count)
        lines = [{"file_name": f"{v}.png", "text": f"a {split} cup"} for v in range(count)]
        jsonl(tmp_path / "folder" / split / "metadata.jsonl", lines)
        jsonl(tmp_path / "lists" / f"{split}.jsonl", [{**line, "image_path": "x"} for line in lines])
    for source in (tmp_path / "folder", tmp_path / "lists"):
        data, held_out = opened(source), opened(source, held_out=True)
        assert (data.split, len(data), data.caption(0)) == ("train", 3, "a train cup")
        assert (held_out.split, len(held_out), held_out.caption(0)) == ("validation", 2, "a validation cup")
        with pytest.raises(DataError, match="has no split 'test'; it has train, validation"):
            opened(source, split="test")
    assert values(opened(tmp_path / "folder").load(2)[0][None]) == [2]


def test_features_of_one_split_are_not_those_of_another(tmp_path: Path) -> None:
    """By their places in a folder of features: of an image folder's splits, and of a table's."""
    for split in ("train", "validation"):
        pictures(tmp_path / "folder" / split, 1)
        jsonl(tmp_path / "folder" / split / "metadata.jsonl", [{"file_name": "0.png", "text": "a cup"}])
        write(tmp_path / "table", "parquet", ["a cup"]).rename(tmp_path / "table" / f"{split}.parquet")
    for source, stem in ((tmp_path / "folder", "metadata"), (tmp_path / "table", "table")):
        for held_out, split in ((False, "train"), (True, "validation")):
            (caption,) = Captions(source, None, held_out, None).captions
            assert caption == ("a cup", f"{stem}-{split}", 0)


def test_lists_of_one_name_are_refused(tmp_path: Path) -> None:
    for part in (1, 2):
        jsonl(tmp_path / "lists" / f"x.{part}.jsonl", [{"image_path": "x", "text": "a cup"}])
    with pytest.raises(DataError, match=r"x\.1\.jsonl and .*x\.2\.jsonl are both x to a folder of features"):
        opened(tmp_path / "lists")


class Prompts(Numbered):
    def takes(self, caption: str) -> bool:
        return PromptTokens.takes(self, caption)


def test_prompts_are_taken_in_any_writing(tmp_path: Path) -> None:
    """Cleaning, as for T5, would leave nothing of the first two."""
    source = write(tmp_path, "list", ["一只猫", "<cup>", " ", "a cup"])
    found = CaptionedData(source, 8, features=Prompts())
    assert [found.caption(i) for i in range(len(found))] == ["一只猫", "<cup>", "a cup"]
    assert [opened(source).caption(i) for i in range(len(opened(source)))] == ["a cup"]


def test_a_tar_may_hold_a_text_beside_its_json(tmp_path: Path) -> None:
    members = {"a.jpg": grey_png(1), "a.json": b'{"sha": 1}', "a.txt": b"a cup", "b.json": b'{"caption": "a cat"}'}
    source = write_tar(tmp_path / "a.tar", members | {"b.webp": grey_png(2), "b.cls": b"no number"})
    assert [opened(source).caption(i) for i in range(2)] == ["a cup", "a cat"]
    write_tar(source, {"a.jpg": grey_png(1), "a.json": b"{"})
    with pytest.raises(DataError, match=r"a\.json: is not JSON"):
        opened(source)


def test_two_sets_are_told_apart(tmp_path: Path) -> None:
    one, same, other = (
        opened(write(tmp_path / name, "list", captions)).summary()
        for name, captions in (("a", GIVEN), ("b", GIVEN), ("c", ["a cup", *TEXTS[1:]]))
    )
    assert difference(one, same) == ""
    assert difference(one, other) == "it had 9 with other captions than the 12 now have"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [{"image_path": "a.png", "title": "a cup"}],
            "has no captions: looked for caption or text or .* image_path, title",
        ),
        ([{"image_path": "a.png", "text": [""]}], "none of the 1 images in .* has a caption in 'text' of which"),
        ([{"text": "a cup"}], "names no images: expected file_name or image_path beside the captions"),
        ([{"image_path": "a.png", "text": "a cup"}, 3], "line 2 is no JSON object with a path and a caption"),
        ([], r"list\.jsonl has no lines"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(jsonl(tmp_path / "list.jsonl", lines))


def test_sets_without_captions_are_refused(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": grey_png(1), "path": None}], "label": [0], "text": [7]}
    features = datasets.Features(
        {"image": datasets.Image()} | dict.fromkeys(("label", "text"), datasets.Value("int64"))
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'text' of .* is int64, expected text or lists of text"):
        opened(tmp_path / "a.parquet")
    table.remove_columns("text").to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no captions: looked for title among image, label"):
        opened(tmp_path / "a.parquet", caption_column="title")
    pictures(tmp_path / "set/cat", 1)
    with pytest.raises(
        DataError, match=r"set has no captions \(expected a save_to_disk folder, \*\.parquet, WebDataset"
    ):
        opened(tmp_path / "set")
    with pytest.raises(DataError, match=r"no such file or folder: .*nothing"):
        opened(tmp_path / "nothing")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, find = write(tmp_path, "list"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ftfy" else find(name))
    with pytest.raises(DataError, match="reading captions needs ftfy, not installed here: pip install ftfy"):
        opened(source)


def test_which_captions_have_words() -> None:
    """Told without cleaning most of them, and as cleaning would."""
    parts = [
        "free",
        "shipping",
        "click for more",
        "png",
        "cat",
        "of",
        "<b>",
        "</b>",
        "%20",
        "&amp;",
        "漢",
        "12x4",
        "a.com",
    ]
    parts += ["download free", "page 12", "@me", "#123", "jc6640", "x.jpg", ".", "-", "'", "worldwide", "images", "\t"]
    draw = np.random.default_rng(0)
    plain = 0
    for _ in range(400):
        caption = " ".join(draw.choice(parts, draw.integers(1, 5)))
        assert has_words(caption) == bool(clean_caption(caption)), caption
        plain += has_words(caption)
    assert 50 < plain < 390
    assert not has_words(" ")
