"""Tests that start processes: how long one may take, when one is gone, and ports that nobody else is given."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

PATIENCE = 900  # seconds: ends what hangs, and nothing that a slow machine is still at

forkserver = multiprocessing.get_context("forkserver")
# Imported once for all, what a run imports as it needs it included.
forkserver.set_forkserver_preload(
    [
        "pytest",
        "torch.distributed.fsdp",
        "torch.utils.tensorboard",
        "vapi_fast.alignment.charts",
        "vapi_fast.alignment.run",
        "vapi_fast.data.image_files",
    ]
)


COMMANDS = """
import sys
import torch.distributed as dist
from vapi_fast import cli
dist.init_process_group("gloo")  # once: a command by itself joins and leaves
for line in sys.argv[1:]:
    sys.argv = ["vapi-fast", *line.split()]
    if status := cli.main():
        sys.exit(status)
dist.destroy_process_group()  # whose threads may abort a process that ends with them
"""


def on_two_ranks(folder: Path, *lines: str) -> str:
    """What commands of vapi-fast print, a line of flags each, that two processes run in turn."""
    script = folder / "commands.py"
    script.write_text(COMMANDS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script), *lines]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def wait_until(happened: Callable[[], object]) -> None:
    """However slow the machine, but not for ever."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def free_port() -> int:
    """One that a server may take some seconds later: the system gives those from 32768 on to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as found:
            if found.connect_ex(("127.0.0.1", port)):
                return port


def become(rank: int, world_size: int, port: int) -> None:
    """What torchrun would say to this process, on one thread."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"})


def on_ranks(function: Callable[..., None], world_size: int, *arguments: object) -> None:
    """Run it in so many processes; it gets its rank, their number, a port, and the arguments."""
    port = free_port()
    ranks = [
        forkserver.Process(target=function, args=(rank, world_size, port, *arguments)) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE)
        assert process.exitcode == 0
