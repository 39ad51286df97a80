"""Checkpoints of Hugging Face's hub by name, `hub:owner/name[@revision][/file]`: fetched once a machine.

They lie in the hub's own cache, where its other clients find them too, and from where they find theirs. Nothing here
imports torch, nor `huggingface_hub` before a name is looked up.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vapi_fast.runtime.errors import CheckpointError, ConfigError, one_line
from vapi_fast.runtime.packages import require

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/([^\\]+))?", re.ASCII)
NETWORK = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAIN = "main"
CONSOLIDATED = ("consolidated.pth", "consolidated.00.pth", "model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
# What is read, or passed on, beside a checkpoint that a repository's name alone means.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
NO_NETWORK = {"TransportError", "ConnectionError", "Timeout", "LocalEntryNotFoundError"}  # of whichever HTTP client
HASHED_BYTES = 1 << 24  # at a time
SHOWN = 5  # files of a repository


class HubName(NamedTuple):
    """What `hub:owner/name[@revision][/file]` names; `file` is empty where the repository's only one is meant."""

    repository: str
    revision: str
    file: str

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return f"hub:{self.repository}{revision}{'/' * bool(self.file)}{self.file}"


class Located(NamedTuple):
    """A file: here already, or where the hub has it."""

    name: HubName
    here: Path | None
    about: HfFileMetadata | None = None


class UnreachableError(CheckpointError):
    """Not on this machine, and the hub cannot be asked. `url`: of what is missing; `reason`: why not, in a line."""

    def __init__(self, name: HubName, reason: str) -> None:
        self.url, self.reason = address(name), reason
        super().__init__(
            f"{name} is not on this machine, and the hub cannot be reached ({reason}): fetch {self.url} elsewhere, and "
            "pass the file's path in its place"
        )


def on_hub(path: str | Path) -> bool:
    """Whether it is `hub:owner/name…`, of Hugging Face's hub."""
    return str(path).startswith("hub:")


def parse(source: str | Path) -> HubName:
    """The parts of a name; raises ConfigError for one that is none, or that would lead out of the repository."""
    found = NAME.fullmatch(str(source))
    parts = [part for group in (found.groups() if found else ()) if group for part in group.split("/")]
    if not found or {"", ".", ".."} & set(parts) or ".." in (found[2] or "") or not str(source).isprintable():
        raise ConfigError(f"{source}: expected hub:owner/name, hub:owner/name/FILE or hub:owner/name@REVISION/FILE")
    return HubName(found[1], found[2] or MAIN, found[3] or "")


def local_path(path: str | Path) -> Path:
    """A checkpoint's path on this machine: of one on the hub that of its copy, fetched if need be.

    Of a repository with an index of shards it is their folder. By the repository's name alone its `COMPANIONS` come
    with it. Raises CheckpointError where it cannot be fetched.
    """
    return fetched(str(path), *place()) if on_hub(path) else Path(path)


def record(path: str | Path) -> dict[str, str | None]:
    """Which file a name of the hub has led to: repository, commit and name; sha256 where it is one of the large ones.

    Raises CheckpointError as `local_path` does.
    """
    found, name = local_path(path), parse(path)
    _, commit, *parts = found.parts[found.parts.index(folder_name(name)) + 1 :]
    content = Path(os.readlink(found)).name if found.is_symlink() else ""
    return {
        "repository": name.repository,
        "commit": commit,
        "file": "/".join(parts),
        "sha256": content if SHA256.fullmatch(content) else None,
    }


def look_up(sources: Mapping[str, Path], others: Mapping[str, str], otherwise: str = "") -> None:
    """See that the checkpoints that flags name can be had, before one of them is downloaded.

    Args:
        sources: names of the hub, by flag.
        others: addresses of what else is missing, by flag and what it takes; said where the hub cannot be reached.
        otherwise: what else to pass or to do then.

    Raises:
        CheckpointError: one cannot be had; without a network one line names all that are missing.
    """
    missing: dict[str, UnreachableError] = {}
    for flag, source in sources.items():
        try:
            located(str(source), *place())
        except UnreachableError as error:
            missing[flag] = error
    if missing:
        needed = {f"{flag} FILE": error.url for flag, error in missing.items()} | others
        raise CheckpointError(
            f"the hub cannot be reached ({next(iter(missing.values())).reason}): on a machine that is online fetch "
            f"{', '.join(needed.values())}; then pass {' '.join(needed)}{otherwise}"
        )


def place() -> tuple[str, str]:
    """The hub's address, and the folder of its cache."""
    require(CheckpointError, "what comes from Hugging Face's hub", "huggingface_hub")
    from huggingface_hub import constants

    return constants.ENDPOINT, constants.HF_HUB_CACHE


def folder_name(name: HubName) -> str:
    return f"models--{name.repository.replace('/', '--')}"


def address(name: HubName) -> str:
    """Where a browser finds it."""
    page = f"{place()[0]}/{name.repository}"
    return f"{page}/resolve/{name.revision}/{name.file}" if name.file else f"{page}/tree/{name.revision}"


@functools.cache
def fetched(source: str, endpoint: str, cache: str) -> Path:
    """As `local_path`, of a name; what was found once is the same for the rest of the process."""
    first, name = located(source, endpoint, cache), parse(source)
    path = fetch(first)
    if not name.file:
        for file in {*COMPANIONS} & {*files_of(name, endpoint, cache)}:
            fetch(located(str(name._replace(file=file)), endpoint, cache))
    if not path.name.endswith(INDEX):
        return path
    try:
        shards = sorted({str(shard) for shard in json.loads(path.read_bytes())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source}: its {path.name} is no index of weights ({type(error).__name__})") from error
    folder = first.name.file.rpartition("/")[0]
    for shard in shards:
        beside = first.name._replace(file=f"{folder}/{shard}".lstrip("/"))
        fetch(located(str(parse(beside)), endpoint, cache))
    return path.parent


@functools.cache
def located(source: str, endpoint: str, cache: str) -> Located:
    """Looked up, in the cache first for a pinned commit, else at the hub first. Raises CheckpointError."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    name = parse(source)
    if not name.file:
        name = name._replace(file=only_checkpoint(name, files_of(name, endpoint, cache)))

    def cached(revision: str) -> Path | None:
        found = try_to_load_from_cache(name.repository, name.file, revision=revision, cache_dir=cache)
        return Path(found) if isinstance(found, str) else None

    here = cached(name.revision)
    if here and COMMIT.fullmatch(name.revision):
        return Located(name, here)
    try:
        about = get_hf_file_metadata(hf_hub_url(name.repository, name.file, revision=name.revision))
    except Exception as error:
        if here and (no_network(error) or type(error).__name__ == "HfHubHTTPError"):  # the latter: too busy, say
            return Located(name, here)
        raise refused(error, name) from error
    return Located(name, cached(about.commit_hash) if about.commit_hash else None, about)


@functools.cache
def files_of(name: HubName, endpoint: str, cache: str) -> list[str]:
    """A revision's files, without those in folders; of the cache, where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name.repository, revision=name.revision)
    except Exception as error:
        if not no_network(error) or not (files := cached_files(name, cache)):
            raise refused(error, name) from error
    return sorted(file for file in files if "/" not in file)


def only_checkpoint(name: HubName, files: list[str]) -> str:
    """The file that a repository's name alone means: an index of shards, one of a usual name, or the only one."""
    indices = [file for file in files if file.endswith(INDEX)]
    usual = [file for file in CONSOLIDATED if file in files]
    weights = [file for file in files if file.endswith(SUFFIXES)]
    for found in (indices, usual, weights if len(weights) == 1 else ()):
        if found:
            return found[0]
    named = ", ".join(weights[:SHOWN]) + ", …" * (len(weights) > SHOWN) if weights else "none"
    raise CheckpointError(f"{name}: which of its checkpoints ({named}) is meant? pass {name}/FILE")


def cached_files(name: HubName, cache: str) -> list[str]:
    """Names of a revision's files in the cache; without those in folders."""
    folder, commit = Path(cache) / folder_name(name), name.revision
    if not COMMIT.fullmatch(commit):
        reference = folder / "refs" / commit
        commit = reference.read_text("utf-8").strip() if reference.is_file() else ""
    snapshot = folder / "snapshots" / commit
    return [path.name for path in snapshot.iterdir()] if COMMIT.fullmatch(commit) and snapshot.is_dir() else []


def to_fetch(network: str) -> str:
    """Where the hub has what other packages read by this name; empty where it is in the cache, or a path."""
    name = HubName(network, MAIN, "")
    if os.path.exists(network) or not NETWORK.fullmatch(network):
        return ""
    return "" if any(file.endswith((*SUFFIXES, INDEX)) for file in cached_files(name, place()[1])) else address(name)


def see(network: str) -> None:
    """See that `to_fetch` could be: the packages themselves would try for minutes. Raises CheckpointError."""
    if not to_fetch(network):
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(network, "config.json"))
    except Exception as error:  # whatever else it is, the package says it
        if no_network(error):
            raise CheckpointError(f"not on this machine, and the hub cannot be reached: {why(error)}") from error


def fetch(file: Located) -> Path:
    """Where it is on this machine, once it is there; of several processes one downloads, the others wait."""
    if file.here:
        return file.here
    from huggingface_hub import hf_hub_download

    name, about = file.name, file.about
    cache = Path(place()[1])
    try:
        if SHA256.fullmatch(about.etag or ""):  # a large file: the hub's own client would begin it anew
            blob = cache / folder_name(name) / "blobs" / about.etag
            blob.parent.mkdir(parents=True, exist_ok=True)
            with open(blob.with_name(f"{blob.name}.vapi-fast.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not blob.exists():
                    download(name, about, blob)
        return Path(hf_hub_download(name.repository, name.file, revision=name.revision, cache_dir=cache))
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise CheckpointError(
                f"{name}: {cache} cannot hold it ({error.strerror}): make room, or set HF_HUB_CACHE to a folder that "
                "has some; the same command goes on where it stopped"
            ) from error
        raise broken_off(name, error) from error
    except Exception as error:  # whatever the HTTP client raises
        raise broken_off(name, error) from error


def download(name: HubName, about: HfFileMetadata, blob: Path) -> None:
    """Fetch a file to where its cache has it, from where an earlier attempt stopped, and hold it to its sha256."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = blob.with_name(f"{blob.name}.vapi-fast.incomplete")
    done = part.stat().st_size if part.exists() else 0
    if about.size and done > about.size:
        part.unlink()
        done = 0
    free = shutil.disk_usage(blob.parent).free
    if about.size and free < about.size - done:
        raise OSError(errno.ENOSPC, f"{(about.size - done) / 1e9:.2f} GB to come, and {free / 1e9:.2f} GB are free")
    url = hf_hub_url(name.repository, name.file, revision=about.commit_hash)
    with part.open("ab") as file:
        http_get(
            url,
            file,
            resume_size=done,
            headers=build_hf_headers(),
            expected_size=about.size,
            displayed_filename=Path(name.file).name,
        )
    if (found := sha256(part)) != blob.name:
        part.unlink()
        raise CheckpointError(f"{name}: has arrived damaged, its sha256 is {found}, the hub's {blob.name}: start again")
    os.replace(part, blob)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()


def broken_off(name: HubName, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name}: the download has broken off ({why(error)}); the same command goes on where it stopped"
    )


def refused(error: Exception, name: HubName) -> CheckpointError:
    """Why the hub does not give it, and what to do."""
    if no_network(error):
        return UnreachableError(name, why(error))
    if known := answer(error, name.repository, name.revision):
        return CheckpointError(f"{name}: {known}")
    if any(type(each).__name__.endswith("EntryNotFoundError") for each in chain(error)):
        return CheckpointError(f"{name}: there is no such file, see {address(name._replace(file=''))}")
    return CheckpointError(f"{name}: cannot be fetched ({why(error)}): try again later, or pass a file")


def answer(error: Exception, repository: str, revision: str, folder: str = "") -> str:
    """What an answer of the hub's means that concerns the repository, and what to do; empty for any other.

    folder: `datasets/`, of one of data.
    """
    kinds = {type(each).__name__ for each in chain(error)}
    if "GatedRepoError" in kinds:
        return f"accept its terms at {place()[0]}/{folder}{repository}, then run `hf auth login` here as the same user"
    if "RepositoryNotFoundError" in kinds:
        return f"the hub has no {repository}, or a private one: check the name, or run `hf auth login` here"
    if "RevisionNotFoundError" in kinds:
        return f"{repository} has no revision {revision}: pass another, or leave @{revision} out"
    return ""


def no_network(error: Exception) -> bool:
    """Whether the hub was not reached, be it by the user's wish; the clients' errors differ with their versions."""
    return any(NO_NETWORK & {kind.__name__ for kind in type(each).__mro__} for each in chain(error))


def chain(error: BaseException | None) -> list[BaseException]:
    """An error and its causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def why(error: Exception) -> str:
    if any(type(each).__name__ == "OfflineModeIsEnabled" for each in chain(error)):
        return "offline mode is on: HF_HUB_OFFLINE"
    return one_line(str(error).strip())[:200] or type(error).__name__
