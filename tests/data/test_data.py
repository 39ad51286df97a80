from __future__ import annotations

import gc
import io
import os
import tarfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("datasets")
import datasets
from inputs import write_tar
from PIL import Image

from vapi_fast.data import center_crop
from vapi_fast.data.dataset import ImageBatch, ImageData, ahead
from vapi_fast.runtime.errors import DataError

SIZE = 8


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def solid(value: int, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    """A PNG filled with (value, 0, 255 - value), so that an image tells which one it is."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def value_of(image: torch.Tensor) -> int:
    assert image.dtype == torch.float32
    assert image.shape == (3, SIZE, SIZE)
    pixels = (image + 1) * 127.5
    assert torch.allclose(pixels[1], torch.zeros(SIZE, SIZE), atol=1e-4)
    assert torch.allclose(pixels[0] + pixels[2], torch.full((SIZE, SIZE), 255.0), atol=1e-3)
    return round(pixels[0].mean().item())


def write_folder(root: Path, count: int, classes: int = 3) -> Path:
    """Images of value 0 .. count - 1 in row order: class folders are filled one after the other."""
    per_class = -(-count // classes)
    for value in range(count):
        folder = root / f"class_{value // per_class}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{value:04d}.png").write_bytes(solid(value))
    return root


def file_of(root: Path, value: int) -> Path:
    return next(root.rglob(f"{value:04d}.png"))


def rows(count: int, start: int = 0) -> dict[str, list]:
    values = range(start, start + count)
    return {"image": [{"bytes": solid(v), "path": f"{v}.png"} for v in values], "label": [v % 3 for v in values]}


def image_ids(data: ImageData, *args, **kwargs) -> list[list[int]]:
    return [batch.image_ids.tolist() for batch in data.batches(*args, **kwargs)]


class TestSources:
    def check(self, data: ImageData, values: list[int], labels: list[int]) -> None:
        loaded = [data.load(i) for i in range(len(data))]
        assert [value_of(image) for image, _ in loaded] == values
        assert [label for _, label in loaded] == labels

    def test_image_folder_labels_follow_sorted_folder_names(self, tmp_path):
        root = tmp_path / "images"
        for value, name in enumerate(["b/x.png", "b/sub/y.PNG", "a10/z.png", "a9/w.png"]):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(solid(value))
        (root / "b/notes.txt").write_text("not an image")
        (root / "b/._x.png").write_bytes(b"left by an archiver")
        (root / ".hidden").mkdir()
        (root / "empty").mkdir()
        data = ImageData(root, SIZE)
        assert data.class_names == {0: "a10", 1: "a9", 2: "b"}
        self.check(data, [2, 3, 1, 0], [0, 1, 2, 2])

    def test_image_folder_with_splits(self, tmp_path):
        write_folder(tmp_path / "set/train", 6)
        write_folder(tmp_path / "set/val", 3)
        assert len(ImageData(tmp_path / "set", SIZE)) == 6
        assert len(ImageData(tmp_path / "set", SIZE, split="val")) == 3
        with pytest.raises(DataError, match=r"no split 'test'; it has train, val"):
            ImageData(tmp_path / "set", SIZE, split="test")

    def test_class_folder_named_like_a_split(self, tmp_path):
        for name in ("train", "zebra"):
            (tmp_path / "set" / name).mkdir(parents=True)
            (tmp_path / "set" / name / "0.png").write_bytes(solid(1))
        assert ImageData(tmp_path / "set", SIZE).class_names == {0: "train", 1: "zebra"}

    def test_saved_dataset(self, tmp_path):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
        saved = datasets.Dataset.from_dict(rows(5), features=features)
        saved.select([4, 0, 3]).save_to_disk(str(tmp_path / "one"))
        data = ImageData(tmp_path / "one", SIZE, num_classes=3)
        assert data.class_names == {0: "x", 1: "y", 2: "z"}
        self.check(data, [4, 0, 3], [1, 0, 0])
        both = datasets.DatasetDict({"train": saved, "test": saved.select(range(2))})
        both.save_to_disk(str(tmp_path / "both"))
        assert len(ImageData(tmp_path / "both", SIZE)) == 5
        assert len(ImageData(tmp_path / "both", SIZE, split="test")) == 2
        with pytest.raises(DataError, match=r"no split 'val'; it has train, test"):
            ImageData(tmp_path / "both", SIZE, split="val")

    def test_parquet_file_and_folder(self, tmp_path):
        folder = tmp_path / "parquet [a]"
        folder.mkdir()
        for name, count, start in (("train-00000", 3, 0), ("train-00001", 2, 3), ("validation-00000", 1, 9)):
            datasets.Dataset.from_dict(rows(count, start)).to_parquet(str(folder / f"{name}.parquet"))
        self.check(ImageData(folder / "train-00001.parquet", SIZE), [3, 4], [0, 1])
        self.check(ImageData(folder / "validation-00000.parquet", SIZE), [9], [0])
        self.check(ImageData(folder, SIZE), [0, 1, 2, 3, 4], [0, 1, 2, 0, 1])
        self.check(ImageData(folder, SIZE, split="validation"), [9], [0])

    def test_parquet_with_bare_bytes(self, tmp_path):
        pq.write_table(
            pa.table({"png": [solid(7), solid(8)], "cls": [1, 0], "text": ["a", "b"]}), tmp_path / "a.parquet"
        )
        self.check(ImageData(tmp_path / "a.parquet", SIZE), [7, 8], [1, 0])

    def test_changed_parquet_is_read_anew(self, tmp_path):
        path = tmp_path / "a.parquet"
        for value in (10, 20):
            datasets.Dataset.from_dict(rows(1, value)).to_parquet(str(path))
            os.utime(path, (value, value))
            assert value_of(ImageData(path, SIZE).load(0)[0]) == value

    def test_webdataset_tars(self, tmp_path, monkeypatch):
        folder = tmp_path / "tars"
        folder.mkdir()
        webp = io.BytesIO()
        Image.open(io.BytesIO(solid(3))).save(webp, "WEBP", lossless=True)
        first = {"s/a.png": solid(1), "s/a.cls": b"5", "s/a.json": b"{}", "s/b.cls": b" 2\n", "s/b.seg.png": solid(99)}
        write_tar(folder / "set-0000.tar", first | {"s/b.PNG": solid(2), "README": b"-", "s/._c.png": b"-"})
        write_tar(folder / "set-0001.tar", {"a.webp": webp.getvalue(), "a.cls": b"0"})
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a.webp").write_bytes(solid(77))  # a namesake outside the tar must not be read instead
        self.check(ImageData(folder, SIZE, num_classes=6), [1, 2, 3], [5, 2, 0])
        self.check(ImageData(folder / "set-0001.tar", SIZE), [3], [0])

    def test_changed_tar_is_read_anew(self, tmp_path):
        for value in (10, 20):
            write_tar(tmp_path / "a.tar", {"a.png": solid(value), "a.cls": b"%d" % value})
            os.utime(tmp_path / "a.tar", (value, value))
            image, label = ImageData(tmp_path / "a.tar", SIZE).load(0)
            assert (value_of(image), label) == (value, value)

    def test_tar_index_is_made_once(self, tmp_path, monkeypatch):
        write_tar(tmp_path / "a.tar", {"a.png": solid(1), "a.cls": b"0"})
        ImageData(tmp_path / "a.tar", SIZE)
        monkeypatch.setattr(tarfile, "open", None)
        self.check(ImageData(tmp_path / "a.tar", SIZE), [1], [0])

    def test_source_may_be_a_string_and_sees_new_images(self, tmp_path):
        root = write_folder(tmp_path / "set", 4)
        assert len(ImageData(str(root), SIZE)) == 4
        (root / "class_0/9999.png").write_bytes(solid(9))
        assert len(ImageData(str(root), SIZE)) == 5


class TestCrop:
    def crop(self, pixels: np.ndarray, size: int) -> np.ndarray:
        return np.asarray(center_crop(Image.fromarray(pixels), size))

    def test_right_size_is_unchanged(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        assert (self.crop(pixels, SIZE) == pixels).all()
        (tmp_path / "set/a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "set/a/0.png")
        image, _ = ImageData(tmp_path / "set", SIZE).load(0)
        expected = torch.from_numpy(pixels).permute(2, 0, 1).double() / 127.5 - 1
        torch.testing.assert_close(image.double(), expected, rtol=0, atol=1e-6)
        assert image.min() >= -1
        assert image.max() <= 1

    def test_equal_short_side_is_cut_in_the_middle(self):
        pixels = np.random.default_rng(1).integers(0, 256, (4, 9, 3), dtype=np.uint8)
        assert (self.crop(pixels, 4) == pixels[:, 2:6]).all()  # (9 - 4) // 2 = 2
        assert (self.crop(pixels.transpose(1, 0, 2).copy(), 4) == pixels.transpose(1, 0, 2)[2:6]).all()

    def test_halved_by_averaging_until_under_twice_the_size(self):
        pixels = np.random.default_rng(2).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        expected = pixels.astype(int)
        for _ in range(2):  # 24x16 -> 12x8 -> 6x4: the shorter side lands on 4; rows are rounded before columns
            expected = (expected[:, ::2] + expected[:, 1::2] + 1) // 2
            expected = (expected[::2] + expected[1::2] + 1) // 2
        assert (self.crop(pixels, 4) == expected[:, 1:5]).all()

    def test_odd_large_image_is_halved_then_resized_bicubically(self):
        pixels = np.random.default_rng(3).integers(0, 256, (21, 45, 3), dtype=np.uint8)
        halved = Image.fromarray(pixels).resize((22, 10), Image.Resampling.BOX)  # 10 < 2 * 8: once only
        resized = np.asarray(halved.resize((18, 8), Image.Resampling.BICUBIC))  # round(22 * 0.8) = 18
        assert (self.crop(pixels, 8) == resized[:, 5:13]).all()

    def test_small_image_is_enlarged(self):
        step = np.zeros((2, 2, 3), dtype=np.uint8)
        step[:, 1] = 255
        enlarged = self.crop(step, 8)
        assert enlarged.shape == (8, 8, 3)
        assert (enlarged == enlarged[:1]).all()  # constant down each column
        assert (np.diff(enlarged[0, :, 0].astype(int))[2:5] > 0).all()

    def test_endless_strip_is_refused(self):
        with pytest.raises(Image.DecompressionBombError, match="1x1000000"):
            center_crop(Image.new("RGB", (1, 1_000_000)), 64)


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("L", 100, (100, 100, 100)),
        ("LA", (50, 9), (50, 50, 50)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ],
)
def test_modes_become_rgb(tmp_path, mode, color, rgb):
    (tmp_path / "set/a").mkdir(parents=True)
    Image.new(mode, (SIZE, SIZE), color).save(tmp_path / "set/a/0.tiff")
    image, _ = ImageData(tmp_path / "set", SIZE).load(0)
    assert ((image[:, 3, 3] + 1) * 127.5).round().tolist() == list(rgb)


def test_palette_and_jpeg(tmp_path):
    (tmp_path / "set/a").mkdir(parents=True)
    palette = Image.new("P", (SIZE, SIZE), 1)
    palette.putpalette([0, 0, 0, 12, 34, 56])
    palette.save(tmp_path / "set/a/0.png")
    Image.new("L", (30, 20), 128).save(tmp_path / "set/a/1.jpeg")
    data = ImageData(tmp_path / "set", SIZE)
    assert ((data.load(0)[0][:, 0, 0] + 1) * 127.5).round().tolist() == [12, 34, 56]
    assert ((data.load(1)[0] + 1) * 127.5 - 128).abs().max() <= 1


class TestOrder:
    @pytest.fixture
    def data(self, tmp_path):
        return ImageData(write_folder(tmp_path / "set", 20), SIZE, num_classes=3)

    def test_batches_hold_the_images_they_name(self, data):
        for batch in data.batches(8, 3, seed=0):
            assert batch.images.shape == (8, 3, SIZE, SIZE)
            assert {t.dtype for t in batch[1:4]} == {torch.int64}
            assert batch[4:] == (None, None)  # captions'
            assert batch.sample_ids.tolist() == list(range(8))
            assert [value_of(image) for image in batch.images] == batch.image_ids.tolist()
            assert batch.labels.tolist() == [i // 7 for i in batch.image_ids.tolist()]

    def test_each_epoch_is_another_seeded_permutation(self, data):
        stream = [i for step in image_ids(data, 8, 10, seed=3) for i in step]
        epochs = [stream[start : start + 20] for start in range(0, 80, 20)]
        assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert epochs[2] == np.random.default_rng((3, 2)).permutation(20).tolist()
        assert stream != [i for step in image_ids(data, 8, 10, seed=4) for i in step]

    def test_batch_may_exceed_the_data_set(self, data):
        (step,) = image_ids(data, 50, 1, seed=0)
        assert sorted(step[:20]) == sorted(step[20:40]) == list(range(20))

    @pytest.mark.parametrize("world_size", [1, 2, 4])
    @pytest.mark.parametrize("start_step", [0, 3, 6])
    def test_ranks_and_resumed_runs_see_the_same_stream(self, data, world_size, start_step):
        whole = list(data.batches(8, 6, seed=5))
        ranks = [
            data.batches(8, 6, seed=5, start_step=start_step, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        steps = list(zip(*ranks, strict=True))
        assert len(steps) == 6 - start_step
        for expected, parts in zip(whole[start_step:], steps, strict=True):
            for name in expected._fields[:4]:
                assert torch.equal(getattr(expected, name), torch.cat([getattr(part, name) for part in parts]))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"batch_size": 6, "world_size": 4}, "batch_size 6 must be a positive multiple of the 4 ranks"),
            ({"batch_size": 0}, "batch_size 0"),
            ({"rank": 2, "world_size": 2}, r"rank must be in 0..1, got 2"),
            ({"start_step": 6}, r"start_step must be in 0..5 \(steps\), got 6"),
            ({"seed": -1}, "seed must not be negative"),
            ({"batch_size": 2.0}, r"batch_size must be a whole number, got 2\.0"),
            ({"steps": "5"}, "steps must be a whole number, got '5'"),
            ({"seed": None}, "seed must be a whole number, got None"),
            ({"rank": True}, "rank must be a whole number, got True"),
        ],
    )
    def test_impossible_arguments_are_refused_at_once(self, data, arguments, message):
        with pytest.raises(ValueError, match=message):
            data.batches(**{"batch_size": 8, "steps": 5, "seed": 0} | arguments)


class TestUnreadable:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(b"<html>not found</html>"),
            lambda path: path.write_bytes(path.read_bytes()[:-30]),
            lambda path: path.write_bytes(path.read_bytes()[:40] + b"\xff" * 20 + path.read_bytes()[60:]),
            lambda path: Image.new("1", (20_000, 20_000)).save(path),
            lambda path: Image.new("1", (1, 40_000_000)).save(path.with_suffix(".tif")) or path.unlink(),
            lambda path: path.unlink(),
        ],
        ids=["empty", "text", "truncated", "garbled", "bomb", "strip-under-another-suffix", "missing"],
    )
    @pytest.mark.parametrize("world_size", [1, 2])
    def test_slot_goes_to_the_next_readable_id(self, tmp_path, damage, world_size):
        root = write_folder(tmp_path / "set", 12)
        data = [ImageData(root, SIZE) for _ in range(world_size)]
        whole = image_ids(data[0], 12, 2, seed=1)
        damage(file_of(root, 11))
        expected = [[0 if i == 11 else i for i in step] for step in whole]
        with pytest.warns(UserWarning, match=r"skipped unreadable image .*0011\.png"):
            parts = [image_ids(d, 12, 2, seed=1, rank=r, world_size=world_size) for r, d in enumerate(data)]
        assert [[i for part in step for i in part] for step in zip(*parts, strict=True)] == expected
        seen = {path for d in data for path in d.skipped}
        assert seen == {str(root / "class_2/0011.png")}

    def test_is_counted_and_warned_of_once(self, tmp_path):
        root = write_folder(tmp_path / "set", 12)
        file_of(root, 4).write_bytes(b"-")
        data = ImageData(root, SIZE)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps = list(data.batches(12, 5, seed=0))
        assert len(caught) == len(data.skipped) == 1
        for batch in steps:
            assert batch.image_ids.tolist().count(5) == 2
            assert [value_of(image) for image in batch.images] == batch.image_ids.tolist()
            assert batch.labels.tolist() == [i // 4 for i in batch.image_ids.tolist()]

    def test_prefetched_images_do_not_count(self, tmp_path):
        root = write_folder(tmp_path / "set", 12)
        last = int(np.random.default_rng((0, 0)).permutation(12)[-1])
        file_of(root, last).write_bytes(b"-")
        data = ImageData(root, SIZE)
        batches = data.batches(4, 3, seed=0)
        next(batches)
        next(batches)
        assert data.skipped == []
        with pytest.warns(UserWarning, match="skipped"):
            next(batches)
        assert len(data.skipped) == 1
        batches.close()

    @pytest.mark.parametrize(
        ("count", "bad", "stops"), [(50, 1, False), (50, 2, True), (250, 2, False), (250, 3, True)]
    )
    def test_past_one_percent_the_run_stops(self, tmp_path, count, bad, stops):
        root = write_folder(tmp_path / "set", count)
        for value in range(0, 2 * bad, 2):
            file_of(root, value).write_bytes(b"-")
        data = ImageData(root, SIZE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not stops:
                assert len(image_ids(data, 25, count // 25, seed=0)) == count // 25
                assert len(data.skipped) == bad
                return
            with pytest.raises(DataError) as caught:
                image_ids(data, 25, count // 25, seed=0)
        read = data._read.sum()
        assert f"{bad} of the {read} images read so far" in str(caught.value)
        assert f"({bad / read:.1%}, allowed 1%): {data.skipped[0]}, " in str(caught.value)

    @pytest.mark.parametrize("count", [1, 2, 30])
    def test_nothing_readable_stops_the_run(self, tmp_path, count):
        root = write_folder(tmp_path / "set", count)
        for path in root.rglob("*.png"):
            path.write_bytes(b"-")
        with pytest.warns(UserWarning, match="skipped"), pytest.raises(DataError, match=r"are unreadable \(100\.0%"):
            image_ids(ImageData(root, SIZE), 4, 2, seed=0)

    def test_rows_and_tar_members_are_named(self, tmp_path):
        table = pa.table({"image": [solid(0), b"-", None], "label": [0, 0, 0]})
        pq.write_table(table, tmp_path / "a.parquet")
        data = ImageData(tmp_path / "a.parquet", SIZE)
        with pytest.raises(DataError, match=r"cannot read row 1 of .*a\.parquet: .*cannot identify"):
            data.load(1)
        with pytest.raises(DataError, match=r"cannot read row 2 of .*a\.parquet: the row has no image"):
            data.load(2)
        write_tar(tmp_path / "a.tar", {"x.png": b"-", "x.cls": b"0", "y.cls": b"0"})
        data = ImageData(tmp_path / "a.tar", SIZE)
        with pytest.raises(DataError, match=r"cannot read .*a\.tar/x\.png"):
            data.load(0)
        with pytest.raises(DataError, match=r"cannot read .*a\.tar/y: zero bytes"):
            data.load(1)

    def test_load_outside_the_set(self, tmp_path):
        data = ImageData(write_folder(tmp_path / "set", 3), SIZE)
        for image_id in (-1, 3):
            with pytest.raises(IndexError, match=rf"image id {image_id} is outside 0\.\.2"):
                data.load(image_id)


class TestErrors:
    def check(self, source: Path, message: str, **kwargs) -> None:
        with pytest.raises(DataError, match=message) as caught:
            ImageData(source, SIZE, **kwargs)
        assert "\n" not in str(caught.value)

    def test_missing_path(self, tmp_path):
        self.check(tmp_path / "nowhere", r"no such file or folder: .*nowhere \(expected one sub-folder")

    def test_unknown_layout(self, tmp_path):
        (tmp_path / "notes.txt").write_text("-")
        self.check(tmp_path / "notes.txt", "not a known kind of data")
        (tmp_path / "flat").mkdir()
        (tmp_path / "flat/0.png").write_bytes(solid(0))
        self.check(tmp_path / "flat", "holds no images in class sub-folders")

    def test_empty(self, tmp_path):
        (tmp_path / "set/a").mkdir(parents=True)
        self.check(tmp_path / "set", "holds no images")
        pq.write_table(
            pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), tmp_path / "a.parquet"
        )
        self.check(tmp_path / "a.parquet", "holds no images")
        write_tar(tmp_path / "a.tar", {"readme.txt": b"-"})
        self.check(tmp_path / "a.tar", "holds no images")
        datasets.Dataset.from_dict({"image": [], "label": []}).save_to_disk(str(tmp_path / "saved"))
        self.check(tmp_path / "saved", "holds no images")

    def test_empty_parquet_shard_among_others(self, tmp_path):
        (tmp_path / "set").mkdir()
        table = pa.table({"image": [solid(7)], "label": [0]})
        pq.write_table(table.slice(0, 0), tmp_path / "set/0.parquet")
        pq.write_table(table, tmp_path / "set/1.parquet")
        assert value_of(ImageData(tmp_path / "set", SIZE).load(0)[0]) == 7

    def test_damaged_files(self, tmp_path):
        datasets.Dataset.from_dict(rows(1)).save_to_disk(str(tmp_path / "saved"))
        (tmp_path / "saved/state.json").write_text("{")
        self.check(tmp_path / "saved", r"cannot read .*saved: ")
        (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
        self.check(tmp_path / "a.parquet", r"cannot read .*a\.parquet")
        path = write_tar(tmp_path / "a.tar", {"a.png": solid(0), "a.cls": b"0", "b.png": solid(1) * 99, "b.cls": b"0"})
        path.write_bytes(path.read_bytes()[:3000])
        self.check(path, r"cannot read .*a\.tar: unexpected end of data")
        path.write_bytes(b"-" * 2000)
        self.check(path, r"cannot read .*a\.tar")

    def test_columns(self, tmp_path):
        pq.write_table(pa.table({"picture": [solid(0)], "label": [0]}), tmp_path / "a.parquet")
        self.check(tmp_path / "a.parquet", r"has the columns picture, label; expected one of image, ")
        pq.write_table(pa.table({"image": [solid(0)], "class": [0]}), tmp_path / "b.parquet")
        self.check(tmp_path / "b.parquet", r"has the columns image, class; expected one of label, labels, cls")
        pq.write_table(pa.table({"image": [1.5], "label": [0]}), tmp_path / "c.parquet")
        self.check(tmp_path / "c.parquet", r"column 'image' of .*c\.parquet is .*, expected images")

    def test_labels(self, tmp_path):
        pq.write_table(pa.table({"image": [solid(0)] * 3, "label": [0, None, None]}), tmp_path / "a.parquet")
        self.check(tmp_path / "a.parquet", r"row 1 of .*a\.parquet has no label \(2 such")
        pq.write_table(pa.table({"image": [solid(0)], "label": ["cat"]}), tmp_path / "b.parquet")
        self.check(tmp_path / "b.parquet", "are of type string, expected integers")
        pq.write_table(pa.table({"image": [solid(0)] * 2, "label": [0, -1]}), tmp_path / "c.parquet")
        self.check(tmp_path / "c.parquet", r"label -1 of row 1 of .* is out of range: expected 0 and up")
        root = write_folder(tmp_path / "set", 9)
        assert len(ImageData(root, SIZE, num_classes=3)) == 9
        self.check(root, r"label 2 of .*class_2/0006\.png is out of range: expected 0\.\.1 \(3 such", num_classes=2)
        write_tar(tmp_path / "a.tar", {"a.png": solid(0), "a.cls": b"0", "b.png": solid(0)})
        self.check(tmp_path / "a.tar", r"a\.tar/b\.png has no label")
        write_tar(tmp_path / "b.tar", {"a.png": solid(0), "a.cls": b"cat"})
        self.check(tmp_path / "b.tar", r"b\.tar/a\.cls holds b'cat', expected a class number")

    def test_image_size(self, tmp_path):
        with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
            ImageData(tmp_path, 0)
        for size in ("32", 32.0, None, True):
            with pytest.raises(ValueError, match="image_size must be a whole number"):
                ImageData(tmp_path, size)

    def test_names_that_no_file_has(self):
        for source in ("p" * 5000, "a\0b"):
            self.check(source, "no such file or folder")


class TestBackground:
    @pytest.fixture
    def data(self, tmp_path):
        return ImageData(write_folder(tmp_path / "set", 20), SIZE)

    @staticmethod
    def decoders() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("vapi-fast-decode")]

    @pytest.mark.parametrize("end", [lambda batches: batches.close(), list, None], ids=["close", "exhaust", "drop"])
    def test_threads_end_with_the_iterator(self, data, end):
        batches = data.batches(4, 10, seed=0)
        next(batches)
        assert self.decoders()
        if end:
            end(batches)
        del batches
        gc.collect()
        assert self.decoders() == []

    def test_decodes_two_steps_ahead_and_no_more(self, data, monkeypatch):
        decoded = []
        original = ImageData._decode
        monkeypatch.setattr(ImageData, "_decode", lambda self, i: (decoded.append(i), original(self, i))[1])
        batches = data.batches(4, 10, seed=0)
        next(batches)
        deadline = time.monotonic() + 300
        while len(decoded) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(decoded) == 12
        batches.close()

    def test_failures_reach_the_consumer(self, data, monkeypatch):
        def fail(self, out, image_id):
            raise RuntimeError("a bug, not a bad image")

        monkeypatch.setattr(ImageData, "_decode_into", fail)
        with pytest.raises(RuntimeError, match="a bug, not a bad image"):
            next(data.batches(4, 10, seed=0))
        assert self.decoders() == []


def test_ahead_gives_the_same_batches_and_errors() -> None:
    made = []

    def batches(count):
        for step in range(count):
            made.append(step)
            if step == 3:
                raise DataError("the fourth is damaged")
            yield ImageBatch(*(torch.full((2,), step) for _ in range(4)))

    stream = ahead(batches(5), torch.device("cpu"))
    assert [int(next(stream).labels[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="fourth"):
        next(stream)
    assert [int(batch.images[0]) for batch in ahead(batches(2), torch.device("cpu"))] == [0, 1]
    made.clear()
    stream = ahead(batches(3), torch.device("cpu"))
    next(stream)
    stream.close()
    assert made in ([0], [0, 1])  # the next one was under way at most
