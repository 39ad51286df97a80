"""Resumable states of a run: written in the background, whole or not at all, by any number of processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from vapi_fast.alignment.config import saved_steps
from vapi_fast.runtime.checkpoint import read_regular
from vapi_fast.runtime.distributed import rank, world_size
from vapi_fast.runtime.errors import CheckpointError, warn
from vapi_fast.runtime.restricted import RestrictedPlanner, RestrictedReader

MANIFEST = "manifest.json"
LEFTOVER = re.compile(r"\.step-\d{6,18}\.(tmp|old)")
READ_SIZE = 1 << 24
READERS = 8  # threads that compute checksums: zlib works without the interpreter lock


class Snapshots:
    """Resumable states of a run in `directory`: folders `step-000050`, the newest whole one wins.

    Works for a plain model in one process and for an FSDP2 model in several. Those must all see `directory`, and call
    the same methods in the same order. What some number of processes saved, any other number can restore.

    Args:
        directory: made by the first `save`. Unfinished writing of an earlier run in it is removed.
        keep: how many states stay; older ones are deleted once a newer one is complete.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = keep
        # The writing thread talks over a group of its own: its messages never mix with the training's.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshots")
        self.writing: tuple[int, Future[None]] | None = None
        if rank() == 0:
            for leftover in directory.glob(".step-*"):
                if LEFTOVER.fullmatch(leftover.name):
                    shutil.rmtree(leftover, ignore_errors=True)
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is no mistake

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any]) -> None:
        """Copy the state after `step` steps to host memory, and return while it is being written.

        First waits for the state that is still being written, if any.

        Args:
            extra: what else `restore` has to return; JSON can hold it.
        """
        self.finish()
        stepped = any(optimizer.state.values())  # before its first step an optimizer has no state to save
        record = {"step": step, "world_size": world_size(), "stepped": stepped, "extra": extra}
        writer = AtomicWriter(self.directory / f"step-{step:06d}", json.dumps(record), self.keep)
        staged = writer.stage(state_of(model, optimizer, stepped))
        self.writing = step, self.thread.submit(self._write, staged, writer)

    def _write(self, staged: dict[str, Any], writer: AtomicWriter) -> None:
        try:
            dcp.save(staged, storage_writer=writer, process_group=self.group)
        except BaseException:  # dcp.save's own error is no Exception
            if rank() == 0:
                shutil.rmtree(writer.path, ignore_errors=True)  # now: a full disk needs the room
            raise

    def finish(self) -> None:
        """Wait for the state that is being written. If that failed, say why on standard error, and go on."""
        if self.writing is None:
            return
        (step, future), self.writing = self.writing, None
        error = future.exception()
        if error is not None and rank() == 0:
            stays = saved_steps(self.directory)
            warn(
                f"the state of step {step} could not be saved in {self.directory}: {reason(error)}; "
                + (f"the state of step {stays[-1]} stays" if stays else "there is no earlier one")
            )

    def restore(self, model: nn.Module, optimizer: Optimizer) -> tuple[int, dict[str, Any]] | None:
        """Load the newest whole state into `model` and `optimizer`; damaged ones are named on standard error.

        Bit for bit what was saved, for the same number of processes and for any other.

        Returns:
            The step and the `extra` that `save` was given; None if no state was ever saved.

        Raises:
            CheckpointError: every state is damaged, or the state is of another model.
        """
        found: list[Any] = [None, None]  # manifest, error
        if rank() == 0:
            try:
                found[0] = self.newest_whole()
            except (CheckpointError, OSError) as error:
                found[1] = str(error)
        if self.group is not None:
            dist.broadcast_object_list(found, src=0, group=self.group)
        manifest, error = found
        if error:
            raise CheckpointError(error)
        if manifest is None:
            return None
        folder = self.directory / f"step-{manifest['step']:06d}"
        state = state_of(model, optimizer, manifest["stepped"])
        try:
            reader = RestrictedReader(folder, manifest["files"])
            dcp.load(state, storage_reader=reader, planner=RestrictedPlanner(), process_group=self.group)
        except dcp.api.CheckpointException as error:
            raise CheckpointError(f"{folder}: does not fit this model and optimizer: {reason(error)}") from error
        set_model_state_dict(model, state["model"])
        if manifest["stepped"]:
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
        return manifest["step"], manifest["extra"]

    def newest_whole(self) -> dict[str, Any] | None:
        """The manifest of the newest whole state; None if there are no states at all."""
        steps = saved_steps(self.directory)
        for step in reversed(steps):
            folder = self.directory / f"step-{step:06d}"
            try:
                return verified_manifest(folder)
            except CheckpointError as error:
                warn(f"{error}; this state is not used")
        if steps:
            raise CheckpointError(f"{self.directory}: every saved state is damaged; start again in another folder")
        return None

    def clear(self) -> None:
        """Delete all states: the run has finished."""
        self.finish()
        if rank() == 0:
            with contextlib.suppress(OSError):  # never made, or not ours alone: the results are there
                for step in saved_steps(self.directory):
                    remove(self.directory / f"step-{step:06d}")
                self.directory.rmdir()


class AtomicWriter(dcp.FileSystemWriter):
    """Writes a state under a hidden name; a manifest and the real name come last, when all ranks have written."""

    def __init__(self, folder: Path, record: str, keep: int) -> None:
        super().__init__(hidden(folder, "tmp"))
        self.folder = folder
        self.record = record
        self.keep = keep

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:  # the causes do not travel to the other ranks, the reason does
            raise OSError(reason(error)) from error

    def finish(self, metadata: Any, results: Any) -> None:
        """Called on rank 0 alone, between two collectives of dcp.save: an error here is an error everywhere."""
        super().finish(metadata, results)
        temporary = Path(self.path)
        names = sorted(path.name for path in temporary.iterdir())
        written = {each.storage_data.relative_path for of_rank in results for each in of_rank}
        if not written <= set(names):
            raise OSError(
                "what other processes have written is not there: --output-dir must be a folder all of them see"
            )
        files = dict(zip(names, fingerprints(temporary, names), strict=True))
        if None in files.values():
            raise OSError("what was just written cannot be read back")
        manifest = json.loads(self.record) | {"files": files}
        with (temporary / MANIFEST).open("w") as file:
            json.dump({"crc32": checksum_of(manifest), "state": manifest}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(temporary)
        if self.folder.exists():  # damaged, or the run has come by this step again
            remove(self.folder)
        os.rename(temporary, self.folder)
        sync_folder(self.folder.parent)
        # Newer ones were found damaged when the run was resumed. One too many does no harm.
        with contextlib.suppress(OSError):
            steps = saved_steps(self.folder.parent)
            kept = [step for step in steps if step <= manifest["step"]][-self.keep :]
            for step in set(steps) - set(kept):
                remove(self.folder.parent / f"step-{step:06d}")


def state_of(model: nn.Module, optimizer: Optimizer, stepped: bool) -> dict[str, Any]:
    """Weights and optimizer state by parameter name: what dcp can split otherwise among other numbers of ranks.

    Of an optimizer that has not stepped yet, torch makes up a state by a step with zero gradients: good to load into.
    """
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if stepped:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state


def verified_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a state, all of whose files are as they were written; CheckpointError names one that is not."""
    try:
        content = json.loads(read_regular(folder / MANIFEST))
        manifest = content["state"]
        whole = content["crc32"] == checksum_of(manifest) and is_manifest(manifest, folder)
    except FileNotFoundError:
        raise CheckpointError(f"{folder / MANIFEST} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{folder / MANIFEST} is damaged")
    files = manifest["files"]
    for name, expected, found in zip(files, files.values(), fingerprints(folder, list(files)), strict=True):
        if found is None:
            raise CheckpointError(f"{folder / name} is missing or cannot be read")
        if found[0] != expected[0]:
            raise CheckpointError(f"{folder / name} is truncated: {found[0]} of {expected[0]} bytes")
        if found != expected:
            raise CheckpointError(f"{folder / name} is damaged: its checksum is not the one it was written with")
    return manifest


def is_manifest(manifest: dict[str, Any], folder: Path) -> bool:
    """Whether it says what a manifest has to, of the folder that it lies in and of files in it."""
    kinds = {"step": int, "world_size": int, "stepped": bool, "extra": dict, "files": dict}
    return (
        all(isinstance(manifest[name], kind) for name, kind in kinds.items())
        and folder.name == f"step-{manifest['step']:06d}"
        and all(
            Path(name).name == name
            and "\0" not in name
            and isinstance(each, list)
            and list(map(type, each)) == [int, int]
            for name, each in manifest["files"].items()
        )
    )


def fingerprints(folder: Path, names: list[str]) -> list[list[int] | None]:
    """Size in bytes and CRC-32 of each file; None for one that cannot be read."""
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda name: fingerprint(folder / name), names))


def fingerprint(path: Path) -> list[int] | None:
    size = crc = 0
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with path.open("rb") as file:
            while chunk := file.read(READ_SIZE):
                size += len(chunk)
                crc = zlib.crc32(chunk, crc)
    except OSError:
        return None
    return [size, crc]


def checksum_of(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def remove(folder: Path) -> None:
    """Delete a state; killed in the middle, it leaves nothing under a state's name."""
    doomed = hidden(folder, "old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def hidden(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """In one line, the operating system's reason if it gave one."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return (str(error) or type(error).__name__).splitlines()[0]
