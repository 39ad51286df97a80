"""Whole runs that are killed, stopped, starved of disk space or given damaged states end where undisturbed ones do."""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import PATIENCE, forkserver
from test_snapshots import truncate

import vapi_fast.alignment.loop
import vapi_fast.alignment.run
from vapi_fast import commands
from vapi_fast.alignment.snapshots import saved_steps
from vapi_fast.runtime.checkpoint import load_state_dict

STEPS = 24
SMALL = {"model": "tiny", "batch_size": 2, "group_size": 2, "steps": STEPS, "lr": 1e-3, "evaluate": False}
KILLS, TORN = 10, 2  # at least, and of them while a state was being written


def child(
    output: Path, log: Path, resume: bool, checkpoint_every: int, file_size: int | None, hold: int | None
) -> None:
    """`vapi-fast align` with its output in `log`; no file may grow beyond `file_size` bytes.

    Step `hold` (from 0) begins once there is a file `output`.go; meanwhile there is one `output`.held.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the state is what is tested; a GPU takes seconds to start
    torch.set_num_threads(1)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    align_step = vapi_fast.alignment.loop.align_step

    def held(trainer: Any, batch: Any, step: int, **options: Any) -> Any:
        if step == hold:
            output.with_suffix(".held").touch()
            while not output.with_suffix(".go").exists():
                time.sleep(0.001)
        return align_step(trainer, batch, step, **options)

    vapi_fast.alignment.loop.align_step = held
    flags = {"output_dir": output, "checkpoint_every": checkpoint_every} | ({"resume": True} if resume else {})
    sys.exit(commands.align_main(argparse.Namespace(**SMALL, **flags)))


class Alignment:
    """A run in `output`, taken up again by each `start`."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.snapshots = output / "snapshots"
        self.log = output.with_suffix(".log")
        self.held, self.go = output.with_suffix(".held"), output.with_suffix(".go")

    def start(self, checkpoint_every: int = 1, file_size: int | None = None, hold: int | None = None) -> None:
        for each in (self.held, self.go):
            each.unlink(missing_ok=True)
        resume = bool(saved_steps(self.snapshots))
        arguments = (self.output, self.log, resume, checkpoint_every, file_size, hold)
        self.process = forkserver.Process(target=child, args=arguments)
        self.process.start()

    def wait_for(self, seen: Callable[[], object]) -> bool:
        """Look every half millisecond until `seen`; False if the run has ended."""
        deadline = time.monotonic() + PATIENCE
        while not seen():
            assert time.monotonic() < deadline, self.log.read_text()
            if not self.process.is_alive():
                return False
            time.sleep(0.0005)
        return True

    def send(self, number: int) -> int:
        """Send a signal; returns the exit code (negative: ended by that signal)."""
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        return self.join()

    def terminate_held(self) -> int:
        """SIGTERM once the step to hold is reached, and only then let it begin; returns the exit code."""
        assert self.wait_for(self.held.exists)
        os.kill(self.process.pid, signal.SIGTERM)
        self.go.touch()
        return self.join()

    def join(self) -> int:
        self.process.join(PATIENCE)
        self.process.kill()
        return self.process.exitcode

    def complete(self, **kwargs: int) -> None:
        self.start(**kwargs)
        assert self.join() == 0, self.log.read_text()

    def half_written(self) -> list[Path]:
        return list(self.snapshots.glob(".step-*.tmp"))

    def nothing_half_written(self) -> bool:
        return not self.half_written()

    def result(self) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
        curves = json.loads((self.output / "run.json").read_text())["curves"]
        return load_state_dict(self.output / "aligned.pt"), curves


@pytest.fixture(scope="module")
def undisturbed(image_sets: None, tmp_path_factory: pytest.TempPathFactory) -> Alignment:
    run = Alignment(tmp_path_factory.mktemp("undisturbed") / "run")
    run.complete(checkpoint_every=STEPS)
    return run


def assert_same_end(run: Alignment, undisturbed: Alignment) -> None:
    """Every weight and every metric of every step, bit for bit."""
    (weights, curves), (expected, expected_curves) = run.result(), undisturbed.result()
    assert weights.keys() == expected.keys()
    assert not [name for name in weights if not torch.equal(weights[name], expected[name])]
    assert curves == expected_curves
    assert len(curves["loss"]) == STEPS


def stop_early(run: Alignment) -> int:
    """Start, send SIGTERM while the fifth step begins; returns the step after which the run stopped."""
    run.start(hold=4)
    assert run.terminate_held() == 1
    newest = saved_steps(run.snapshots)[-1]
    last = run.log.read_text().splitlines()[-1]
    assert (
        last
        == f"vapi-fast: error: stopped by SIGTERM after step {newest}; go on with --resume --output-dir {run.output}"
    )
    assert newest == 6  # the sixth learnt of it, and its figures say so
    return newest


def test_killed_ten_times(tmp_path: Path, undisturbed: Alignment) -> None:
    """kill -9 at random times, every second one while a state is being written."""
    rng = random.Random(0)
    runs = [Alignment(tmp_path / "run-0")]
    kills = torn = 0
    while kills < KILLS or torn < TORN:
        run = runs[-1]
        run.start()
        if writing := bool(kills % 2):
            run.wait_for(run.nothing_half_written)  # what the kill before left is gone
            run.wait_for(run.half_written)
            time.sleep(rng.uniform(0, 0.03))
        else:
            time.sleep(rng.uniform(0, 1.5))
        code = run.send(signal.SIGKILL)
        if (run.output / "run.json").exists():  # it was faster than the signal
            runs.append(Alignment(tmp_path / f"run-{len(runs)}"))
            continue
        assert code == -signal.SIGKILL, run.log.read_text()
        kills += 1
        torn += writing and bool(run.half_written())
    print(f"{kills} kills, {torn} while a state was being written, {len(runs)} runs")
    if not (runs[-1].output / "run.json").exists():
        runs[-1].complete()
    for run in runs:
        assert_same_end(run, undisturbed)


def test_sigterm_saves_the_state(tmp_path: Path, undisturbed: Alignment) -> None:
    """At the end of the step that it comes in, whether a state is due or not."""
    run = Alignment(tmp_path / "run")
    run.start(checkpoint_every=STEPS, hold=3)
    assert run.terminate_held() == 1
    (step,) = saved_steps(run.snapshots)
    assert f"stopped by SIGTERM after step {step}; go on with --resume --output-dir {run.output}" in run.log.read_text()
    assert step == 6
    run.complete()
    assert_same_end(run, undisturbed)
    assert not run.snapshots.exists()


def test_full_disk_during_a_save(tmp_path: Path, undisturbed: Alignment) -> None:
    """The run goes on with a warning; killed then, it resumes from the last state that fitted, and can still end."""
    run = Alignment(tmp_path / "run")
    before = stop_early(run)
    warning = (
        f"could not be saved in {run.snapshots}: File too large; the state of step {before} stays"  # RLIMIT's ENOSPC
    )
    small = 20_000_000  # bytes: more than the weights, less than weights and optimizer state
    run.start(file_size=small, hold=before + 2)
    assert run.wait_for(run.held.exists)
    assert run.wait_for(lambda: warning in run.log.read_text())  # the state is written behind the steps
    assert run.send(signal.SIGKILL) == -signal.SIGKILL
    assert saved_steps(run.snapshots)[-1] == before
    run.complete(file_size=small)
    assert warning in run.log.read_text()
    assert_same_end(run, undisturbed)


def test_truncated_newest_state(tmp_path: Path, undisturbed: Alignment) -> None:
    run = Alignment(tmp_path / "run")
    newest = stop_early(run)
    damaged = run.snapshots / f"step-{newest:06d}" / "__0_0.distcp"
    truncate(damaged)
    run.complete()
    assert f"vapi-fast: warning: {damaged} is truncated" in run.log.read_text()
    assert_same_end(run, undisturbed)
