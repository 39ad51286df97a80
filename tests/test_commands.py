"""The commands: flags reach the configuration, results are printed, failures are one line and an exit status."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser

from vapi_fast import cli, commands
from vapi_fast.generation.folder import Sampler
from vapi_fast.runtime.errors import CaptureError, ConfigError

Run = Callable[..., int]


@pytest.fixture
def run() -> Run:
    def call(name: str, *arguments: object) -> int:
        parser = argparse.ArgumentParser()
        cli.add_command_flags(parser, name)
        return getattr(commands, f"{name}_main")(parser.parse_args([str(argument) for argument in arguments]))

    return call


@pytest.mark.usefixtures("image_sets")
def test_generate_and_evaluate(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    draw = ("generate", "--model", "tiny", "--num", 5, "--class-ids", "1,4-5", "--format", "npz", "--out", out)
    assert run(*draw) == 0
    assert np.load(out / "samples.npz")["arr_0"].shape == (5, 32, 32, 3)
    assert "5/5" in capsys.readouterr().err
    assert run("evaluate", "--model", "tiny", "--samples", out, "--output", tmp_path / "scores.json") == 0
    printed = capsys.readouterr()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"FID              {scores['fid']:.2f}" in printed.out
    assert "not comparable with published figures" in printed.out
    assert "vapi-fast: warning: FID from 5 samples of 128 features" in printed.err
    assert "UserWarning" not in printed.err
    before = (tmp_path / "scores.json").read_bytes()
    assert run("evaluate", "--model", "tiny", "--samples", out, "--output", tmp_path / "scores.json") == 2
    assert (tmp_path / "scores.json").read_bytes() == before


def test_every_field_has_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("generate", "evaluate", "geneval", "encode-captions"):
        parser = argparse.ArgumentParser()
        cli.add_command_flags(parser, name)
        flags = {action.dest for action in parser._actions} - {"help"}
        assert flags == {field.name for field in dataclasses.fields(cli.COMMANDS[name].config)}


def test_torchrun_leaves_the_flags_alone() -> None:
    """torchrun's parser takes what abbreviates one of its own options, even after the script's name."""
    torchrun = get_args_parser()
    for name in ("generate", "evaluate", "geneval", "encode-captions"):
        parser = argparse.ArgumentParser()
        cli.add_command_flags(parser, name)
        for action in parser._actions:
            name = max(action.option_strings, key=len)  # --num-images, as --num abbreviates --numa-binding
            if name != "--help":
                assert torchrun.parse_args(["script.py", name, "1"]).training_script_args == [name, "1"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("generate", "--model", "tiny", "--out", "OUT", "--class-ids", "9"), 2, "unknown class 9"),
        (("generate", "--model", "tiny", "--out", "OUT", "--cfg-scale", "0.9"), 2, "--cfg-scale must be at least 1"),
        (("generate", "--model", "tiny", "--out", "OUT", "--gpt-ckpt", __file__), 2, "cannot be read"),
        (("evaluate", "--samples", __file__), 2, "--reference is required"),
    ],
)
def test_a_failure_is_one_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple, status: int, message: str
) -> None:
    out = tmp_path / "out"
    assert run(*(out if argument == "OUT" else argument for argument in arguments)) == status
    printed = capsys.readouterr()
    assert printed.err.startswith("vapi-fast: error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert printed.out == ""
    assert not out.exists()


@pytest.mark.usefixtures("image_sets")
def test_what_is_no_image_set_is_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--model", "tiny", "--samples", __file__) == 2
    error = capsys.readouterr().err
    assert error.startswith("vapi-fast: error: ")
    assert error.count("\n") == 1
    assert "expected one sub-folder of images per class" in error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory\nlong story"), "out of GPU memory: lower --batch-size"),
        (KeyboardInterrupt(), "interrupted; the same command goes on where it stopped"),
        (
            OSError(28, "No space left on device", "a.png"),
            "a.png could not be written: No space left on device; the results take up to 0.20 MB and ",
        ),
        (CaptureError("decode([16, 64]) cannot be recorded: no\nadvice"), "decode([16, 64]) cannot be recorded: no"),
    ],
)
def test_a_run_that_breaks_off_says_what_to_do(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    message: str,
) -> None:
    def fail(self: Sampler, ids: torch.Tensor) -> None:
        raise error

    monkeypatch.setattr(Sampler, "draw", fail)
    assert run("generate", "--model", "tiny", "--num", 2, "--out", tmp_path / "out") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"vapi-fast: error: {message}")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("a\x1b[31m\nb \x07"), "a\\x1b[31m b \\x07"),
        (MemoryError(), "out of memory: this machine has too little; choose smaller sizes"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: DefaultCPUAllocator:"),
        (RuntimeError("Storage size calculation overflowed with sizes=[9]"), "out of memory: Storage size calculation"),
        (OSError(28, "No space left on device", "a.pt"), "[Errno 28] No space left on device: 'a.pt'"),
    ],
)
def test_an_error_is_one_line_without_control_characters(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> None:
        raise error

    assert commands.run_command(failing, str, "") == (2 if isinstance(error, ConfigError) else 1)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"vapi-fast: error: {line}")
    assert said.isprintable()


def test_an_error_of_ours_is_not_hidden() -> None:
    def failing() -> None:
        raise RuntimeError("a mistake in the package")

    with pytest.raises(RuntimeError, match="a mistake"):
        commands.run_command(failing, str, "")
