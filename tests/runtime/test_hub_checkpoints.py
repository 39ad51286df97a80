"""`hub:owner/name/file` wherever a checkpoint is read, against a small server that answers as Hugging Face's does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")
import huggingface_hub
from hub_server import COMMIT, Hub, serving
from huggingface_hub import constants

from vapi_fast.models import catalog
from vapi_fast.runtime import hub as names
from vapi_fast.runtime.errors import CheckpointError, ConfigError

CONTENT = bytes(range(256)) * 40
OTHER = "f" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path, monkeypatch) as found:
        yield found


def again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process, which has looked nothing up yet."""
    for each in (names.files_of, names.located, names.fetched):
        each.cache_clear()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    again(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hub:a/b", ("a/b", "main", "")),
        ("hub:a/b/c.pt", ("a/b", "main", "c.pt")),
        ("hub:a/b@v1/c/d.pt", ("a/b", "v1", "c/d.pt")),
        *((f"hub:{each}", None) for each in ("", "a", "/a", "a/b/../c", "../b", "a/..", "a/b//c", "a/b/", "a/b@/c")),
        *((f"hub:{each}", None) for each in ("a/b@../c", "a/b/./c", "a/b\\c", "a/b/c\\..", "a/b/\x1b", "a/b@v1@v2")),
    ],
)
def test_names(source: str, expected: tuple[str, str, str] | None) -> None:
    if expected:
        assert names.parse(source) == expected
        assert str(names.parse(source)) == source
    else:
        with pytest.raises(ConfigError, match="expected hub:owner/name, hub:owner/name/FILE or hub:owner/name@REV"):
            names.parse(source)


def test_fetched_once_and_found_by_the_hubs_other_clients(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hub.put("owner/model/a.pt", CONTENT)
    path = names.local_path("hub:owner/model/a.pt")
    assert path.read_bytes() == CONTENT
    assert names.record("hub:owner/model/a.pt") == {
        "repository": "owner/model",
        "commit": COMMIT,
        "file": "a.pt",
        "sha256": digest,
    }
    assert huggingface_hub.hf_hub_download("owner/model", "a.pt", local_files_only=True) == str(path)
    again(monkeypatch)
    hub.asked.clear()
    assert names.local_path(Path("hub:owner/model/a.pt")) == path
    assert [method for method, _ in hub.asked] == ["HEAD"]  # whether `main` is another commit by now
    hub.asked.clear()
    assert names.local_path(f"hub:owner/model@{COMMIT}/a.pt") == path  # a commit is what it is
    assert hub.asked == []
    assert hub.ranges == [None]


def test_a_download_goes_on_where_it_stopped(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.put("owner/model/a.pt", CONTENT)
    hub.cut = 4321
    with pytest.raises(CheckpointError, match=r"a\.pt: the download has broken off .* goes on where it stopped"):
        names.local_path("hub:owner/model/a.pt")
    hub.down = False
    again(monkeypatch)
    assert names.local_path("hub:owner/model/a.pt").read_bytes() == CONTENT
    assert hub.ranges == [None, "bytes=4000-"]
    blobs = names.local_path("hub:owner/model/a.pt").resolve().parent
    assert not list(blobs.glob("*.incomplete"))


def test_of_several_at_once_one_downloads(hub: Hub) -> None:
    """Ranks are processes; the lock is one of open files, so that threads show it too."""
    hub.put("owner/model/a.pt", CONTENT)
    looked_up = names.located("hub:owner/model/a.pt", *names.place())
    assert looked_up.here is None
    with ThreadPoolExecutor(4) as ranks:
        paths = set(ranks.map(names.fetch, [looked_up] * 4))
    assert [path.read_bytes() for path in paths] == [CONTENT]
    assert hub.ranges == [None]


def test_what_arrives_damaged_is_not_kept(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hub.put("owner/model/a.pt", CONTENT)
    hub.damaged = True
    with pytest.raises(CheckpointError, match=rf"has arrived damaged, its sha256 is \w+, the hub's {digest}: start"):
        names.local_path("hub:owner/model/a.pt")
    hub.damaged = False
    assert names.local_path("hub:owner/model/a.pt").read_bytes() == CONTENT
    assert hub.ranges == [None, None]


def test_a_pinned_commit_is_what_is_read(hub: Hub) -> None:
    hub.put("owner/model/a.pt", CONTENT)
    hub.revisions["v1"] = OTHER
    assert names.record("hub:owner/model@v1/a.pt")["commit"] == OTHER
    assert names.record(f"hub:owner/model@{OTHER}/a.pt")["commit"] == OTHER
    with pytest.raises(CheckpointError, match=r"owner/model has no revision v2: pass another, or leave @v2 out"):
        names.local_path("hub:owner/model@v2/a.pt")


def test_a_repository_by_its_name_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("owner/one/config.json", b"{}")
    hub.put("owner/one/tokenizer.json", b"[]")
    hub.put("owner/one/picture.png", b"other")
    hub.put("owner/one/a.pt", CONTENT)
    one = names.local_path("hub:owner/one")
    assert one.name == "a.pt"
    assert sorted(path.name for path in one.parent.iterdir()) == ["a.pt", "config.json", "tokenizer.json"]
    hub.put("owner/usual/pytorch_model.bin", CONTENT)
    hub.put("owner/usual/optimizer.pt", b"1")
    assert names.local_path("hub:owner/usual").name == "pytorch_model.bin"
    hub.put("owner/two/a.pt", CONTENT)
    hub.put("owner/two/b.pt", b"1")
    with pytest.raises(CheckpointError, match=r"which of its checkpoints \(a\.pt, b\.pt\) is meant\? pass hub:owner/t"):
        names.local_path("hub:owner/two")
    shards = {"x": "model-1.safetensors", "y": "model-2.safetensors", "z": "model-1.safetensors"}
    hub.put("owner/shards/model.safetensors.index.json", json.dumps({"weight_map": shards}).encode())
    for number in (1, 2, 3):
        hub.put(f"owner/shards/model-{number}.safetensors", bytes([number]))
    folder = names.local_path("hub:owner/shards")
    assert sorted(path.name for path in folder.iterdir()) == [
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
    ]
    offline(monkeypatch)
    assert names.local_path("hub:owner/shards") == folder
    assert names.local_path("hub:owner/one").name == "a.pt"
    hub.put("owner/out/model.safetensors.index.json", json.dumps({"weight_map": {"x": "../../x"}}).encode())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match=r"hub:owner/out/\.\./\.\./x: expected hub:owner/name"):
        names.local_path("hub:owner/out")


def test_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("owner/model/a.pt", CONTENT)
    path = names.local_path("hub:owner/model/a.pt")
    offline(monkeypatch)
    hub.asked.clear()
    assert names.local_path("hub:owner/model/a.pt") == path
    with pytest.raises(CheckpointError) as missing:
        names.local_path("hub:owner/model/b.pt")
    assert str(missing.value) == (
        "hub:owner/model/b.pt is not on this machine, and the hub cannot be reached (offline mode is on: "
        f"HF_HUB_OFFLINE): fetch {hub.endpoint}/owner/model/resolve/main/b.pt elsewhere, and pass the file's path in "
        "its place"
    )
    with pytest.raises(CheckpointError) as missing:
        names.look_up(
            {
                "--a": Path("hub:owner/model/a.pt"),
                "--b": Path("hub:owner/model/b.pt"),
                "--c": Path("hub:owner/model@v1/c.pt"),
            },
            {"--d FOLDER": "https://elsewhere/d"},
            "; or --nothing",
        )
    assert str(missing.value) == (
        "the hub cannot be reached (offline mode is on: HF_HUB_OFFLINE): on a machine that is online fetch "
        f"{hub.endpoint}/owner/model/resolve/main/b.pt, {hub.endpoint}/owner/model/resolve/v1/c.pt, "
        "https://elsewhere/d; then pass --b FILE --c FILE --d FOLDER; or --nothing"
    )
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert names.local_path("hub:owner/model/a.pt") == path
    with pytest.raises(CheckpointError, match=r"b\.pt is not on this machine, and the hub cannot be reached \("):
        names.local_path("hub:owner/model/b.pt")


def test_what_the_hub_refuses(hub: Hub) -> None:
    hub.put("owner/model/a.pt", CONTENT)
    with pytest.raises(CheckpointError, match=rf"there is no such file, see {hub.endpoint}/owner/model/tree/main"):
        names.local_path("hub:owner/model/b.pt")
    with pytest.raises(CheckpointError, match="the hub has no owner/none, or a private one: check the name, or run `h"):
        names.local_path("hub:owner/none/a.pt")
    hub.gated.add("owner/model")
    with pytest.raises(CheckpointError, match=rf"accept its terms at {hub.endpoint}/owner/model, then run `hf auth lo"):
        names.local_path("hub:owner/model/a.pt")
    hub.gated.clear()
    hub.down = True
    with pytest.raises(CheckpointError, match=r"cannot be fetched \(.*503.*\): try again later, or pass a file"):
        names.local_path("hub:owner/model/a.pt")


def test_no_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("owner/model/a.pt", CONTENT)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(names.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"cannot hold it \(0\.00 GB to come, .*\): make room, or set HF_HUB"):
        names.local_path("hub:owner/model/a.pt")
    assert hub.ranges == []


def test_files_of_the_catalog_are_names_of_pinned_commits() -> None:
    named = {
        str(value)
        for command in ("align", "generate")
        for name, entry in catalog.CATALOG.items()
        for side in (None, *entry.generators)
        for field, value in entry.preset(command, image_size=side).items()
        if field in ("gpt_ckpt", "vq_ckpt") and names.on_hub(str(value))
    }
    assert {os.path.basename(name) for name in named} >= {
        *("vq_ds16_c2i.pt", "c2i_B_256.pt", "c2i_B_384.pt", "c2i_L_256.pt", "c2i_L_384.pt", "c2i_XL_384.pt"),
        *("c2i_XXL_384.pt", "c2i_3B_384.pt", "vq_ds16_t2i.pt", "t2i_XL_stage1_256.pt", "t2i_XL_stage2_512.pt"),
    }
    for name in map(names.parse, named):
        assert names.COMMIT.fullmatch(name.revision), name
        assert name.file or name.repository in ("deepseek-ai/Janus-Pro-1B", "deepseek-ai/Janus-Pro-7B")
