"""`hub:owner/name`, against a small server that answers as Hugging Face's does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

pytest.importorskip("datasets")
import datasets
import huggingface_hub
from captioned import TEXTS, Numbered, write
from inputs import grey_png

from vapi_fast.data import hub
from vapi_fast.data.caption_data import CaptionedData
from vapi_fast.data.dataset import ImageData
from vapi_fast.data.hub import local_source
from vapi_fast.runtime.errors import DataError

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The files of a folder as the data set `owner/set`; `asked` has the paths of all requests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.asked: list[str] = []


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *message: object) -> None:
        pass

    def listed(self) -> list[dict[str, object]]:
        files = [path for path in sorted(self.server.folder.rglob("*")) if path.is_file()]
        return [
            {
                "type": "file",
                "path": str(path.relative_to(self.server.folder)),
                "size": path.stat().st_size,
                "oid": "0" * 40,
            }
            for path in files
        ]

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": SHA, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if path.startswith("/api/datasets/owner/set"):
            rest = path.removeprefix("/api/datasets/owner/set").strip("/").split("/")
            if rest[0] == "tree" and len(rest) > 2:  # there are no folders
                return self.answer(404, b"", X_Error_Code="EntryNotFound")
            if rest[0] in ("tree", "paths-info"):
                wanted = unquote(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
                files = [each for each in self.listed() if rest[0] == "tree" or str(each["path"]) in wanted]
                return self.answer(200, json.dumps(files).encode(), Content_Type="application/json")
            siblings = [{"rfilename": each["path"]} for each in self.listed()]
            about = {"id": "owner/set", "sha": SHA, "siblings": siblings, "private": False, "disabled": False}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        resolved = f"/datasets/owner/set/resolve/{SHA}/"
        file = self.server.folder / path.removeprefix(resolved)
        if not path.startswith(resolved) or not file.is_file():
            found = path.startswith(("/datasets/owner/set", "/api/datasets/owner/set"))
            return self.answer(404, b"", X_Error_Code="EntryNotFound" if found else "RepoNotFound")
        content, status, headers = file.read_bytes(), 200, {"ETag": '"0"', "Accept_Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            last = min(int(last or len(content) - 1), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[int(first) : last + 1], 206
        return self.answer(status, content, **headers)

    do_GET = do_HEAD = do_POST = respond


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "hub").mkdir()
    with Hub(tmp_path / "hub") as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{found.server_port}"
        # As HF_ENDPOINT would, which is read when these packages are first imported.
        for place in (datasets.config, huggingface_hub.constants):
            for name in ("HF_ENDPOINT", "ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HUB_DATASETS_URL"):
                if (value := getattr(place, name, None)) is not None:
                    monkeypatch.setattr(place, name, value.replace("https://huggingface.co", endpoint))
        monkeypatch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # which asks another machine
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
        yield found
        found.shutdown()
        thread.join()


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
    labelled(server.folder / "train-00000-of-00001.parquet", 11)
    labelled(server.folder / "validation-00000-of-00001.parquet", 3, start=100)
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
    write(server.folder, "json-tar", list(TEXTS))
    folder, split = local_source(Path("hub:owner/set"), None, False, 5)
    data = CaptionedData(folder, 8, features=Numbered(), split=split)
    assert [data.caption(i) for i in range(len(data))] == TEXTS[:5]
    assert values(data) == list(range(5))
    assert data.summary()["captions"]["column"] == "json.caption"


def test_what_cannot_be_fetched_is_told(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data hub:owner/none: cannot be fetched"):
        local_source(Path("hub:owner/none"), None, False, 8)
    with pytest.raises(DataError, match="--data hub:x/y/z: expected hub:owner/name"):
        local_source(Path("hub:x/y/z"), None, False, 8)
    assert local_source(tmp_path, "val", False, 8) == (tmp_path, "val")
