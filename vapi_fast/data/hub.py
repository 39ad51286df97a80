"""Data sets of Hugging Face's hub, `hub:owner/name[@revision][/configuration]`: the first rows are fetched once, and
are files from then on."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vapi_fast.data.dataset import reader
from vapi_fast.data.splits import choose_split
from vapi_fast.runtime.checkpoint import write_atomically
from vapi_fast.runtime.distributed import rank
from vapi_fast.runtime.errors import DataError, Error
from vapi_fast.runtime.hub import MAIN, HubName, answer, no_network, on_hub, parse, why
from vapi_fast.runtime.progress import progress_bar

if TYPE_CHECKING:
    import datasets

ROWS_A_FILE = 1000  # what a crash loses at most
COMPLETE = "complete"


def local_source(source: Path, split: str | None, held_out: bool, rows: int) -> tuple[Path, str | None]:
    """What to read and which split of it: of `hub:owner/name…` a folder of parquet with its first `rows` rows.

    A stream has no random access: the rows lie below torch.hub's folder, fetched once a machine, and what is drawn from
    them in which order is as for any file. Another number of rows is another set. Raises DataError where they cannot
    be fetched.
    """
    if not on_hub(source):
        return source, split
    name = parse(source)
    folder = folder_of(name, split, held_out, rows)
    if (folder / COMPLETE).exists():
        return folder, None
    reader()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait until all is there
        if not (folder / COMPLETE).exists():
            try:
                fetch(name, split, held_out, rows, folder)
            except (Error, MemoryError):
                raise
            except Exception as error:  # whatever the hub's client or a reader of its files raises
                if known := answer(error, name.repository, name.revision, "datasets/"):
                    raise DataError(f"--data {source}: {known}") from error
                raise DataError(
                    f"--data {source}: cannot be fetched ({why(error)}); "
                    + (
                        "fetch it elsewhere and pass its folder"
                        if no_network(error)
                        else "the same command goes on where it stopped"
                    )
                ) from error
    return folder, None


def is_here(source: Path, split: str | None, held_out: bool, rows: int) -> bool:
    """Whether nothing has to be fetched of it."""
    return not on_hub(source) or (folder_of(parse(source), split, held_out, rows) / COMPLETE).exists()


def folder_of(name: HubName, split: str | None, held_out: bool, rows: int) -> Path:
    which = re.sub(r"\W", "-", split or ("held-out" if held_out else "training"))
    stem = name.repository.replace("/", "--") + (f"@{name.revision}" if name.revision != MAIN else "")
    return Path(torch.hub.get_dir()) / "vapi-fast" / "hub" / stem / name.file.replace("/", "--") / f"{which}-{rows}"


def fetch(name: HubName, split: str | None, held_out: bool, rows: int, folder: Path) -> None:
    """Write the first rows as parquet files, those that are not there; images stay encoded."""
    import datasets

    ask(name)
    datasets.disable_progress_bars()  # one a file, beside ours
    revision = None if name.revision == MAIN else name.revision
    splits = datasets.load_dataset(name.repository, configuration_of(name), revision=revision, streaming=True)
    chosen = choose_split(list(splits), split, held_out, Path(str(name)))
    stream = splits[chosen]
    if stream.features is None:
        stream = stream._resolve_features()
    for column, feature in stream.features.items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    done = len(list(folder.glob("[!.]*.parquet"))) * ROWS_A_FILE
    coming = iter(stream.skip(done).take(max(rows - done, 0)))
    with progress_bar(rows, desc=str(name), unit="row", initial=done, disable=rank() > 0) as progress:
        for number in itertools.count(done // ROWS_A_FILE):
            part = list(itertools.islice(coming, ROWS_A_FILE))
            if not part:
                break
            table = datasets.Dataset.from_list(part, features=stream.features)
            write_table(folder / f"{chosen}-{number:05d}.parquet", table)
            progress.update(len(part))
    write_atomically(folder / COMPLETE, lambda temporary: temporary.write_text(f"{name} {chosen}\n", "utf-8"))


def configuration_of(name: HubName) -> str:
    """The one that is named, or the default; raises DataError where it is not there, or none is the default."""
    import datasets

    where = {"path": name.repository, "revision": None if name.revision == MAIN else name.revision}
    if not name.file and (default := datasets.get_dataset_default_config_name(**where)):
        return default
    found = datasets.get_dataset_config_names(**where)
    if name.file in found:
        return name.file
    said = f"no configuration {name.file!r}; it has" if name.file else "the configurations"
    raise DataError(f"--data {name}: {name.repository} has {said} {', '.join(found)}: add one, hub:owner/name/NAME")


def ask(name: HubName) -> None:
    """Whether the data set may be read, before its files are: `datasets` itself would not say what is to be done."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import EntryNotFoundError

    url = hf_hub_url(name.repository, "README.md", repo_type="dataset", revision=name.revision)
    with contextlib.suppress(EntryNotFoundError):
        get_hf_file_metadata(url)


def write_table(path: Path, table: datasets.Dataset) -> None:
    write_atomically(path, lambda temporary: table.to_parquet(temporary))
