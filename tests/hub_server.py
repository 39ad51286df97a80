"""A small server that speaks the protocol of Hugging Face's hub, as far as files and their listings go."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".pt", ".pth", ".bin", ".safetensors")  # kept elsewhere by their sha256, as Git LFS has them


class Hub(ThreadingHTTPServer):
    """The folders below `folder` as repositories: `owner/name`, and `datasets/owner/name` for data.

    Large files are redirected to an address below `/cdn/` of another host, as the hub's own are.

    Attributes:
        asked: method and path of all requests.
        ranges: the parts of large files that were asked for; None is a whole one.
        revisions: commits by what names them.
        gated: repositories whose terms nobody has accepted.
        cut: where the next answer with a large file breaks off, if it does; the server is down from then on.
        damaged: whether what large files hold is other than what they are kept by.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.asked: list[tuple[str, str]] = []
        self.ranges: list[str | None] = []
        self.revisions = {"main": COMMIT}
        self.gated: set[str] = set()
        self.cut: int | None = None
        self.down = False
        self.damaged = False

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, path: str, content: bytes) -> str:
        """A file of a repository; returns its sha256."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return hashlib.sha256(content).hexdigest()


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *message: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str) -> None:
        self.answer(status, X_Error_Code=code)

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        if self.server.down:
            return self.answer(503)
        if path.startswith("/cdn/"):
            return self.large(path.removeprefix("/cdn/"))
        about = path.startswith("/api/")
        parts = path.removeprefix("/api/").removeprefix("/").removeprefix("models/").split("/")
        length = 3 if parts[0] == "datasets" else 2
        repository, rest = "/".join(parts[:length]), parts[length:]
        if repository in self.server.gated:
            return self.error(403, "GatedRepo")
        if not (self.server.folder / repository).is_dir():
            return self.error(401, "RepoNotFound")
        if about:
            return self.listing(repository, rest)
        commit = self.server.revisions.get(rest[1], rest[1]) if rest[:1] == ["resolve"] else ""
        if commit not in self.server.revisions.values():
            return self.error(404, "RevisionNotFound")
        return self.file(repository, "/".join(rest[2:]), commit)

    def listing(self, repository: str, rest: list[str]) -> None:
        folder = self.server.folder / repository
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        listed = [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": "0" * 40}
            for path in paths
        ]
        if rest[:1] == ["tree"] and len(rest) > 2:  # there are no folders
            return self.error(404, "EntryNotFound")
        if rest[:1] in (["tree"], ["paths-info"]):
            wanted = unquote(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
            files = [each for each in listed if rest[0] == "tree" or str(each["path"]) in wanted]
            return self.answer(200, json.dumps(files).encode(), Content_Type="application/json")
        siblings = [{"rfilename": each["path"]} for each in listed]
        about = {"id": repository.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings}
        about |= {"private": False, "disabled": False}
        return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")

    def file(self, repository: str, name: str, commit: str) -> None:
        path = self.server.folder / repository / name
        if not path.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = path.read_bytes()
        if not name.endswith(LARGE) or repository.startswith("datasets/"):
            return self.content(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)
        digest = hashlib.sha256(content).hexdigest()
        linked = {"X_Linked_Etag": f'"{digest}"', "X_Linked_Size": str(len(content)), "X_Repo_Commit": commit}
        return self.answer(302, Location=f"http://localhost:{self.server.server_port}/cdn/{digest}", **linked)

    def large(self, digest: str) -> None:
        contents = (path.read_bytes() for path in self.server.folder.rglob("*") if path.is_file())
        content = next(each for each in contents if hashlib.sha256(each).hexdigest() == digest)
        self.server.ranges.append(self.headers.get("Range"))
        if self.server.cut is not None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: self.server.cut])
            self.server.cut, self.server.down = None, True
            self.close_connection = True
            return None
        return self.content(bytes(255 - byte for byte in content) if self.server.damaged else content)

    def content(self, content: bytes, **headers: str) -> None:
        status, headers = 200, {"Accept_Ranges": "bytes", **headers}
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last or len(content) - 1), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{end}/{len(content)}"
            content, status = content[int(first) : end + 1], 206
        self.answer(status, content, **headers)

    do_GET = do_HEAD = do_POST = respond


@contextlib.contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of the repositories in `folder / "hub"`, that `huggingface_hub` asks, with an empty cache beside it."""
    (folder / "hub").mkdir()
    with Hub(folder / "hub") as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        redirect(constants, hub.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub-cache"))
        yield hub
        hub.shutdown()
        thread.join()


def redirect(package: object, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT would, which is read when the packages are first imported."""
    for name in ("HF_ENDPOINT", "ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HUB_DATASETS_URL"):
        if (value := getattr(package, name, None)) is not None:
            monkeypatch.setattr(package, name, value.replace("https://huggingface.co", endpoint))


def with_data(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the package `datasets` ask that hub too, and keep what it and ours fetch below `folder`."""
    import datasets
    import torch

    redirect(datasets.config, hub.endpoint, monkeypatch)
    monkeypatch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # which asks another machine
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "torch"))
