"""A worker ends with the torchrun that started it, whatever ends that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from processes import gone, wait_until

WORKER = """
import os, sys, time
from vapi_fast.runtime.distributed import process_group
with process_group():
    print(os.getpid(), flush=True)
    time.sleep(3600)
"""
PARENT = """
import os, subprocess, sys
os.environ["TORCHELASTIC_RUN_ID"] = "none"
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_worker_ends_with_torchrun() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, WORKER], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    assert not gone(worker)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: gone(worker))
