"""A folder that one run writes into: claimed before anything is, and given up with the process, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from vapi_fast.runtime.distributed import gather_objects, rank
from vapi_fast.runtime.errors import ConfigError, Error, warn

LOCK = ".lock"
HOLDER = b"process "  # what a lock begins with
UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


@contextlib.contextmanager
def owned(folder: Path, flag: str) -> Iterator[None]:
    """`folder` is this run's alone inside the `with` block; made if need be, and gone again if nothing was written.

    The lock is the operating system's: it ends with the process. All ranks call this, and rank 0 holds it.
    Raises ConfigError where another process has the folder, or it cannot be made; `flag` names it.
    """
    made: list[Path] = []
    descriptor = error = None
    if rank() == 0:
        try:
            made = make(folder)
            descriptor = lock(folder, flag)
        except ConfigError as refused:
            error = str(refused)
        except OSError as failed:
            error = f"{flag} {folder}: {failed.strerror or failed}; pass a folder that can be written to"
    try:
        if error := next(filter(None, gather_objects(error)), None):
            raise ConfigError(error)
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(folder / LOCK)):
                    (folder / LOCK).unlink()
            os.close(descriptor)
        for each in reversed(made):
            with contextlib.suppress(OSError):  # not empty: something was written
                each.rmdir()


def make(folder: Path) -> list[Path]:
    """Make the folder and those above it; returns the new ones, from the top."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def lock(folder: Path, flag: str) -> int:
    """An open descriptor that holds the folder's lock; raises ConfigError where another process does."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode) or os.pread(descriptor, len(HOLDER), 0) not in (
                b"",
                HOLDER,
            ):
                raise ConfigError(f"{flag} {folder}: its {LOCK} is no run's: choose another folder")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ConfigError:
            os.close(descriptor)
            raise
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise ConfigError(
                f"{flag} {folder} is being written to by {holder or 'another process'}: wait for it, or choose another "
                "folder"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
            warn(f"{folder}: its file system has no locks: see to it that no other run writes there")
            return descriptor
        # The one before may have given it up, and its file away, between the two calls.
        if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            os.truncate(descriptor, 0)
            os.write(descriptor, HOLDER + f"{os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)


def not_written(failed: OSError, folder: Path, advice: str, needed: int) -> Error:
    """What to tell of a file that could not be written: which, why, how much room it takes and has, and how to go on.

    Args:
        needed: bytes that all of the folder's files take at most.
    """
    room = ""
    with contextlib.suppress(OSError):
        room = f" and {shutil.disk_usage(folder).free / 1e6:.2f} MB are free there"
    return Error(
        f"{failed.filename or folder} could not be written: {failed.strerror or failed}; the results take up to "
        f"{needed / 1e6:.2f} MB{room}; {advice}"
    )
