"""Readers given anything at all: they read it, or say in one line what is wrong, soon, and in little memory.

`VAPI_FAST_FUZZ_EXAMPLES=5000 pytest -s tests/test_fuzz.py` tries more than the few seconds here do.
"""

from __future__ import annotations

import contextlib
import datetime
import gzip
import io
import json
import os
import resource
import signal
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from vapi_fast.alignment.snapshots import verified_manifest
from vapi_fast.data.dataset import ImageData
from vapi_fast.data.image_sets import open_image_set, read_statistics
from vapi_fast.data.splits import read_class_index
from vapi_fast.generation.conditions import read_captions
from vapi_fast.generation.folder import read_manifest
from vapi_fast.runtime.checkpoint import load_state_dict
from vapi_fast.runtime.errors import Error

hypothesis = pytest.importorskip("hypothesis")
datasets = pytest.importorskip("datasets")
st = hypothesis.strategies

SHARE = int(os.environ.get("VAPI_FAST_FUZZ_EXAMPLES", "120")) / 250  # of each test's own number of examples
SECONDS = 60  # for one input, on a slow machine
MEMORY = 2**30  # that a test may add to the process
SIDE = 8

Reader = Callable[[Path], object]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """An AssertionError where the block takes more than SECONDS."""

    def late(*_: object) -> None:
        raise AssertionError(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_all(name: str, examples: int, strategy: Any, read: Callable[[Any], object], refusals: int = 1) -> None:
    """Hand `read` what `strategy` draws: it returns, or raises an error of ours that is one printable line."""
    outcomes: Counter[str] = Counter()

    @hypothesis.settings(
        max_examples=max(int(examples * SHARE), 1),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def check(drawn: Any) -> None:
        with soon(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read(drawn)
                outcomes["read"] += 1
                return
            except Error as error:
                said = str(error)
        outcomes["refused"] += 1
        assert said.isprintable()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
    print(f"\n{name}: {sum(outcomes.values())} inputs, {dict(outcomes)}")
    assert outcomes["refused"] >= refusals


def picture(form: str, mode: str = "RGB", side: int = SIDE) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, form)
    return file.getvalue()


def tar_bytes(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def saved(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def npz_bytes(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


WEIGHTS = {"norm.weight": torch.ones(4), "layers.0.wo.weight": torch.arange(6.0).view(2, 3)}
IMAGES = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
SAMPLE = [(tarfile.TarInfo("a.png"), picture("PNG")), (tarfile.TarInfo("a.cls"), b"0")]
CHECKPOINTS = [
    saved({"model": WEIGHTS, "steps": 3}),
    saved(WEIGHTS, _use_new_zipfile_serialization=False),
    safetensors_bytes(WEIGHTS),
]
ARRAYS = [npz_bytes(arr_0=IMAGES), npz_bytes(mu=np.zeros(3), sigma=np.eye(3)), npz_bytes(arr_0=IMAGES.astype(float))]
PICTURES = [picture(form) for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")]


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [{"bytes": picture("PNG"), "path": None}] * 2, "label": [0, 1]}), file)
    return file.getvalue()


@st.composite
def damaged(draw: Any, whole: list[bytes]) -> bytes:
    """One of the files, cut, overwritten, lengthened or spliced in a few places; or anything."""
    content = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(("byte", "cut", "insert", "zeros", "large", "splice", "drop")))
        if kind == "byte":
            content[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=9))
        elif kind == "zeros":
            content[place : place + 8] = bytes(8)
        elif kind == "large":
            content[place : place + 4] = b"\xff\xff\xff\x7f"
        elif kind == "splice":
            content[place:] = draw(st.sampled_from(whole))[place:]
        else:
            del content[place : place + draw(st.integers(1, 64))]
    return bytes(content)


def read_file(path: Path, read: Reader) -> Callable[[bytes], object]:
    def write_and_read(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return write_and_read


def read_images(path: Path) -> None:
    """As the commands do: all images by their rows, and a step's batch."""
    data = ImageData(path, SIDE, num_classes=9)
    for batch in data.batches(2, 2, seed=0):
        assert batch.images.isfinite().all()


def read_set(path: Path) -> None:
    read_statistics(path)
    images = open_image_set(path, SIDE)
    for batch in images.batches(0, min(len(images), 8), 3):
        assert batch.dtype == torch.uint8


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_checkpoints(name: str, tmp_path: Path) -> None:
    try_all(f"damaged {name}", 400, damaged(CHECKPOINTS), read_file(tmp_path / name, load_state_dict))


def test_arrays(tmp_path: Path) -> None:
    try_all("damaged .npz", 600, damaged(ARRAYS), read_file(tmp_path / "a.npz", read_set))


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_captions(name: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.zeros((3, 2, 4), np.float32))
    whole = [file.getvalue(), safetensors_bytes({"features": torch.zeros(3, 2, 4), "mask": torch.ones(3, 2)}), *ARRAYS]
    read = read_file(tmp_path / name, lambda path: read_captions(path, 2, 4))
    try_all(f"damaged captions, {name}", 200, damaged(whole), read)


def test_tars(tmp_path: Path) -> None:
    whole = [tar_bytes(SAMPLE), tar_bytes(SAMPLE * 2), gzip.compress(tar_bytes(SAMPLE))]
    try_all("damaged .tar", 60, damaged(whole), read_file(tmp_path / "a.tar", read_images))


def test_parquet(tmp_path: Path) -> None:
    try_all("damaged .parquet", 60, damaged([parquet_bytes()]), read_file(tmp_path / "a.parquet", read_images))


def test_saved_data_sets(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": picture("PNG"), "path": None}] * 2, "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "whole")
    names = ("state.json", "dataset_info.json", "data-00000-of-00001.arrow")
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in names}

    def read(drawn: tuple[str, bytes]) -> None:
        for name, content in (whole | dict([drawn])).items():
            (tmp_path / "set" / name).write_bytes(content)
        read_images(tmp_path / "set")

    (tmp_path / "set").mkdir()
    one = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), damaged([whole[name]])))
    try_all("damaged data set as saved", 150, one, read)


def test_pictures(tmp_path: Path) -> None:
    (tmp_path / "set" / "cat").mkdir(parents=True)
    for place, read in (
        (tmp_path / "set" / "cat" / "a.png", lambda _: read_images(tmp_path / "set")),
        (tmp_path / "a.png", lambda _: read_set(tmp_path)),
    ):
        try_all(f"damaged picture, {place.parent.name}", 150, damaged(PICTURES), read_file(place, read))


TEXTS = [
    json.dumps({"configuration": {"num": 3}, "files": {}, "batch_size": 2, "images": [{"file": "a.png"}] * 3}).encode(),
    json.dumps({"crc32": 1, "state": {"step": 1, "world_size": 1, "stepped": True, "extra": {}, "files": {}}}).encode(),
    json.dumps({"weight_map": {"norm.weight": "a.bin"}}).encode(),
    json.dumps({"n01440764": 0, "cat": 1}).encode(),
    json.dumps({"0": ["n01440764", "tench"]}).encode(),
    b"cat 0\ndog 1\n",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"batch_size": 1e999, "images": "abc", "configuration": {"num": NaN}, "files": {}}',
]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("manifest.json", lambda path: read_manifest(path.parent)),
        ("manifest.json", lambda path: open_image_set(path.parent, SIDE)),
        ("manifest.json", lambda path: verified_manifest(path.parent)),
        ("a.index.json", lambda path: load_state_dict(path.parent)),
        ("index", read_class_index),
    ],
    ids=["samples", "images", "snapshot", "shards", "class index"],
)
def test_texts(name: str, read: Reader, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "step-000001"
    folder.mkdir()
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("manifest.json"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | KEYS, inner, max_size=4),
    ).map(lambda value: json.dumps(value).encode())
    said = f"damaged {request.node.callspec.id}"
    try_all(said, 300, damaged(TEXTS) | anything | st.binary(max_size=40), read_file(folder / name, read))


KEYS = st.sampled_from(
    ("configuration", "files", "batch_size", "images", "num", "weight_map", "state", "crc32", "step")
)
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "bool", "complex64", "uint8", "float8_e4m3fn")
NAMES = st.sampled_from(("model", "module", "ema", "state_dict", "module.a", "_orig_mod.a", "a", "freqs_cis", "args"))


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    value = torch.full(shape, draw(st.floats(width=32))).to(getattr(torch, draw(st.sampled_from(DTYPES))))
    kind = draw(st.sampled_from(("plain", "plain", "meta", "expanded", "transposed", "parameter")))
    if kind == "meta":
        return value.to("meta")
    if kind == "expanded":
        return value[None].expand(1_000_000, *shape)
    if kind == "parameter":
        return torch.nn.Parameter(value, requires_grad=False)
    return value.T.contiguous().T if kind == "transposed" and value.ndim == 2 else value


def test_what_a_checkpoint_may_hold(tmp_path: Path) -> None:
    values = st.none() | st.integers() | st.text(max_size=3) | tensors()
    content = st.recursive(
        values,
        lambda inner: st.dictionaries(NAMES | st.text(max_size=3) | st.integers(), inner, max_size=4),
        max_leaves=6,
    )
    one = st.dictionaries(NAMES, tensors(), min_size=1, max_size=3)
    content = content | one | st.builds(lambda key, state: {key: state}, NAMES, one)
    for averaged in (False, True):
        read = read_file(tmp_path / "a.pt", lambda path, averaged=averaged: load_state_dict(path, averaged=averaged))
        try_all(f"checkpoints of anything, averaged {averaged}", 200, content.map(saved), read)


SHAPES = st.lists(st.integers(-2, 9) | st.sampled_from((2**31, 2**62)), max_size=4).map(tuple)
USUAL = st.sampled_from(((6, 8, 8, 3), (4, 2, 3, 3), (3,), (3, 3), (1,), (1, 1)))
DESCRIPTIONS = ("|O", "<U3", "<c16", "<M8[s]", "|V4", "x", "", [("a", "<f8")])
JUNK = ("(" * 5000, "{" * 300, "{'descr': '|u1', 'shape': (3,)}", "9" * 5000)


@st.composite
def arrays(draw: Any) -> bytes:
    """An `.npz` file that is sound but for what its arrays say of themselves, or hold."""
    file = io.BytesIO()
    keys = draw(st.sampled_from((["arr_0"], ["mu", "sigma"], ["arr_0", "mu", "sigma", "mu_s"])))
    with zipfile.ZipFile(file, "w", draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))) as archive:
        for key in keys:
            usual = draw(st.booleans())
            said = {
                "descr": {"arr_0": "|u1"}.get(key, "<f8") if usual else draw(st.sampled_from(DESCRIPTIONS)),
                "fortran_order": draw(st.sampled_from((False, False, False, True, 1))),
                "shape": draw(USUAL) if usual else draw(SHAPES | st.just(3)),
            }
            header = repr(said) if draw(st.integers(0, 9)) else draw(st.text(max_size=30) | st.sampled_from(JUNK))
            encoded = header.encode("latin1", "replace").ljust(61) + b"\n"
            version = draw(st.sampled_from((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\7\1")))
            size = len(encoded).to_bytes(2 if version[0] == 1 else 4, "little")
            values = bytes(int(np.prod(said["shape"])) * (1 if key == "arr_0" else 8)) if usual else draw(st.binary())
            archive.writestr(f"{key}.npy", b"\x93NUMPY" + version + size + encoded + values)
    return file.getvalue()


def test_what_an_array_may_say(tmp_path: Path) -> None:
    try_all(".npz of any headers", 400, arrays(), read_file(tmp_path / "a.npz", read_set))


@st.composite
def tars(draw: Any) -> bytes:
    """A sound tar whose members may be anything."""
    members = list(SAMPLE) if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 4))):
        member = tarfile.TarInfo(
            draw(st.sampled_from(("b.png", "b.cls", "b.json", "../b.png", "d/c.cls", ".cls", "é\n")))
        )
        kinds = (tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE)
        member.type, member.linkname = draw(st.sampled_from(kinds)), "/etc/passwd"
        contents = (b"", b"0", b"8", b"9", b"-1", b"x", b"1" * 30, picture("PNG"), picture("PNG")[:40])
        members.append((member, draw(st.sampled_from(contents)) if member.isreg() else b""))
    content = bytearray(tar_bytes(members))
    for _ in range(draw(st.integers(0, 1))):
        first = draw(st.integers(0, len(content) // tarfile.BLOCKSIZE)) * tarfile.BLOCKSIZE
        hole = draw(st.integers(1, 4)) * tarfile.BLOCKSIZE
        content[first : first + hole] = bytes(len(content[first : first + hole]))
    behind = (b"", bytes(tarfile.BLOCKSIZE), b"x", bytes(3000) + b"x", tar_bytes(SAMPLE), bytes(2 << 20))
    return bytes(content) + draw(st.sampled_from(behind))


def test_what_a_tar_may_hold(tmp_path: Path) -> None:
    try_all(".tar of any members", 50, tars(), read_file(tmp_path / "a.tar", read_images))


@st.composite
def tables(draw: Any) -> bytes:
    """A sound parquet file whose columns may be of any type."""
    rows = draw(st.integers(0, 3))
    whole = {"bytes": picture("PNG"), "path": None}
    column = st.sampled_from(
        (
            [whole] * rows,
            [whole["bytes"]] * rows,
            [None] * rows,
            [{"bytes": None, "path": "/etc/passwd"}] * rows,
            [{"bytes": b"x"}] * rows,
            [[whole]] * rows,
            ["text"] * rows,
            [0] * rows,
            [8.0] * rows,
            [-1] * rows,
            [2**40] * rows,
            [[0]] * rows,
            [True] * rows,
            [datetime.date(2026, 11, 28)] * rows,
        )
    )
    names = draw(st.lists(st.sampled_from(("image", "label", "png", "cls", "text", "image\n", "labels")), unique=True))
    sound = {"image": [whole] * rows, "label": [0] * rows} if draw(st.booleans()) else {}
    file = io.BytesIO()
    pq.write_table(pa.table({name: draw(column) for name in names} | sound), file)
    return file.getvalue()


def test_what_a_table_may_hold(tmp_path: Path) -> None:
    try_all(".parquet of any columns", 60, tables(), read_file(tmp_path / "a.parquet", read_images))


@st.composite
def trees(draw: Any) -> list[tuple[str, str]]:
    """Paths below a folder, and what lies there."""
    names = st.sampled_from(
        (
            "cat",
            "dog",
            "Train",
            "val",
            "__MACOSX",
            ".hidden",
            "10",
            "9",
            "a\nb",
            "é",
            "\udcff",
            "0.png",
            "a.JPG",
            "x.txt",
        )
    )
    paths = st.lists(names, min_size=1, max_size=3).map("/".join)
    kinds = st.sampled_from(
        (
            "picture",
            "picture",
            "cut",
            "empty",
            "pipe",
            "folder",
            "up",
            "gone",
            "device",
            "itself",
            "class",
            "in a class",
        )
    )
    sound = [("cat/0.png", "picture"), ("dog/0.png", "picture")] if draw(st.booleans()) else []
    return sound + draw(st.lists(st.tuples(paths, kinds), max_size=4, unique_by=lambda each: each[0]))


def test_what_a_folder_may_hold(tmp_path: Path) -> None:
    count = iter(range(10**9))

    def read(tree: list[tuple[str, str]]) -> None:
        root = tmp_path / f"tree-{next(count)}"
        root.mkdir()
        for name, kind in tree:
            path = root / name
            with contextlib.suppress(OSError):  # there is no such folder in this tree
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind in ("picture", "cut", "empty"):
                    content = picture("PNG")
                    path.write_bytes({"picture": content, "cut": content[:50], "empty": b""}[kind])
                elif kind == "pipe":
                    os.mkfifo(path)
                elif kind == "folder":
                    path.mkdir()
                else:
                    links = {"up": "..", "gone": "nowhere", "device": "/dev/zero", "itself": path.name}
                    classes = {"class": root / "dog", "in a class": root / "dog" / "10"}
                    path.symlink_to((links | classes)[kind])
        with contextlib.suppress(Error):
            read_set(root)
        read_images(root)
        if ("dog/0.png", "picture") in tree:
            data = ImageData(root, SIDE)
            rows = [i for i in range(len(data)) if data._rows.name(i) == str(root / "dog" / "0.png")]
            assert [data.class_names[data._labels[i]] for i in rows] in ([], ["dog"])  # []: it is of another split

    try_all("folders of anything", 200, trees(), read)
