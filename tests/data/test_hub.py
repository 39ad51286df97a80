"""`hub:owner/name`, against a small server that answers as Hugging Face's does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("datasets")
import datasets
from captioned import TEXTS, Numbered, write
from hub_server import Hub, serving, with_data
from huggingface_hub import constants
from inputs import grey_png

from vapi_fast.data import hub
from vapi_fast.data.caption_data import CaptionedData
from vapi_fast.data.dataset import ImageData
from vapi_fast.data.hub import local_source
from vapi_fast.runtime.errors import DataError

FOLDER = "datasets/owner/set"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path, monkeypatch) as found:
        with_data(found, tmp_path, monkeypatch)
        (found.folder / FOLDER).mkdir(parents=True)
        yield found


def values(data: ImageData | CaptionedData) -> list[int]:
    return [round((float(data.load(i)[0].mean()) + 1) * 127.5) for i in range(len(data))]


def labelled(path: Path, count: int, start: int = 0) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": grey_png(start + v), "path": f"{v}.png"} for v in range(count)]
    datasets.Dataset.from_dict({"image": images, "label": [v % 2 for v in range(count)]}, features=features).to_parquet(
        path
    )


def test_the_first_rows_are_fetched_once(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are files from then on: a second start asks for nothing, one that was interrupted for the rest."""
    labelled(server.folder / FOLDER / "train-00000-of-00001.parquet", 11)
    labelled(server.folder / FOLDER / "validation-00000-of-00001.parquet", 3, start=100)
    monkeypatch.setattr(hub, "ROWS_A_FILE", 3)
    write_table = hub.write_table

    def once(path: Path, table: object) -> None:
        if path.name == "train-00001.parquet":
            raise KeyboardInterrupt
        write_table(path, table)

    source = Path("hub:owner/set")
    monkeypatch.setattr(hub, "write_table", once)
    with pytest.raises(KeyboardInterrupt):
        local_source(source, None, False, 8)
    monkeypatch.setattr(hub, "write_table", write_table)
    folder, split = local_source(source, None, False, 8)
    data = ImageData(folder, 8, split=split)
    assert values(data) == list(range(8))
    assert [data.load(i)[1] for i in range(8)] == [0, 1] * 4
    assert data.class_names == {0: "cat", 1: "dog"}
    assert [path.name for path in sorted(folder.glob("*.parquet"))] == [f"train-0000{n}.parquet" for n in range(3)]
    held_out, split = local_source(source, None, True, 8)
    assert values(ImageData(held_out, 8, split=split)) == [100, 101, 102]
    server.asked.clear()
    assert local_source(source, None, False, 8) == (folder, None)
    assert local_source(source, None, True, 8) == (held_out, None)
    assert server.asked == []
    with pytest.raises(DataError, match="hub:owner/set has no split 'test'; it has train, validation"):
        local_source(source, "test", False, 8)


def test_captions_stream_too(server: Hub, tmp_path: Path) -> None:
    write(server.folder / FOLDER, "json-tar", list(TEXTS))
    folder, split = local_source(Path("hub:owner/set"), None, False, 5)
    data = CaptionedData(folder, 8, features=Numbered(), split=split)
    assert [data.caption(i) for i in range(len(data))] == TEXTS[:5]
    assert values(data) == list(range(5))
    assert data.summary()["captions"]["column"] == "json.caption"


def test_what_cannot_be_fetched_is_told(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="--data hub:owner/none: the hub has no owner/none, or a private one"):
        local_source(Path("hub:owner/none"), None, False, 8)
    with pytest.raises(DataError, match="--data hub:owner/set@v2: owner/set has no revision v2: pass another"):
        local_source(Path("hub:owner/set@v2"), None, False, 8)
    assert local_source(tmp_path, "val", False, 8) == (tmp_path, "val")
    server.gated.add(FOLDER)
    page = f"{server.endpoint}/{FOLDER}"
    with pytest.raises(DataError, match=f"--data hub:owner/set: accept its terms at {page}, then run `hf auth login`"):
        local_source(Path("hub:owner/set"), None, False, 8)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reason = r"cannot be fetched \(offline mode is on: HF_HUB_OFFLINE\); fetch it elsewhere and pass its folder"
    with pytest.raises(DataError, match=reason):
        local_source(Path("hub:owner/set"), None, False, 8)


def test_a_revision_is_another_set(server: Hub) -> None:
    labelled(server.folder / FOLDER / "train-00000-of-00001.parquet", 3)
    main, _ = local_source(Path("hub:owner/set"), None, False, 2)
    server.revisions["v1"] = server.revisions["main"]
    pinned, _ = local_source(Path("hub:owner/set@v1"), None, False, 2)
    assert pinned != main
    assert values(ImageData(pinned, 8)) == [0, 1]


def test_a_set_of_several_configurations(server: Hub) -> None:
    """Each is a set of its own; which one is meant has to be said where its card has no default."""
    for repository, default in (("set", ""), ("flagged", "  default: true\n")):
        card = "---\nconfigs:\n"
        (server.folder / "datasets/owner" / repository).mkdir(exist_ok=True)
        for start, name in ((0, "cats"), (100, "dogs")):
            labelled(server.folder / "datasets/owner" / repository / f"{name}.parquet", 3, start)
            card += f"- config_name: {name}\n  data_files: {name}.parquet\n"
        server.put(f"datasets/owner/{repository}/README.md", f"{card}{default}---\n".encode())
    found = [local_source(Path(f"hub:owner/{name}"), None, False, 2)[0] for name in ("set/cats", "set/dogs", "flagged")]
    assert [values(ImageData(folder, 8)) for folder in found] == [[0, 1], [100, 101], [100, 101]]
    with pytest.raises(DataError, match="--data hub:owner/set: owner/set has the configurations cats, dogs: add one"):
        local_source(Path("hub:owner/set"), None, False, 2)
    with pytest.raises(DataError, match="owner/set has no configuration 'birds'; it has cats, dogs: add one"):
        local_source(Path("hub:owner/set/birds"), None, False, 2)
