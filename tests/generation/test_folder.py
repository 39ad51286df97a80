"""A folder of samples has one owner, restarts give the same bytes, and of a full disk it is said what was to fit."""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_samples import config, contents

import vapi_fast.alignment.run
from vapi_fast import cli, commands, tiny
from vapi_fast.generation import folder
from vapi_fast.generation.folder import Sampler, draw_samples
from vapi_fast.runtime.checkpoint import identity, load_state_dict, save_generator
from vapi_fast.runtime.errors import CheckpointError, ConfigError

SLOW = """
import sys, time
from pathlib import Path
from vapi_fast.generation import folder
from vapi_fast.generation.config import GenerateConfig
draw = folder.Sampler.draw
def slowly(self, ids):
    print("drawing", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.05)
    return draw(self, ids)
folder.Sampler.draw = slowly
folder.draw_samples(GenerateConfig(
    out=sys.argv[1], model="tiny", num=6, batch_size=4, class_ids=(0, 3, 8, 3), seed=5, cfg_scale=1.5))
"""


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes inside the block, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def run(name: str, *line: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_command_flags(parser, name)
    return getattr(commands, f"{name}_main")(parser.parse_args(list(map(str, line))))


def test_of_two_at_once_one_works_and_the_other_is_told(tmp_path: Path) -> None:
    draw_samples(config(tmp_path / "alone"))
    out, go = tmp_path / "out", tmp_path / "go"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(out), str(go)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "drawing\n"
        with pytest.raises(ConfigError, match=f"out is being written to by process {process.pid} on .*: wait for it"):
            draw_samples(config(out))
        go.touch()
        assert process.wait(600) == 0
    finally:
        process.kill()
        process.stdout.close()
    assert contents(out) == contents(tmp_path / "alone")


def test_a_restart_takes_the_batch_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of another number of rows round otherwise, and what fits on another machine is another number."""
    monkeypatch.setattr(folder, "batch_that_fits", lambda *_: 4)
    draw_samples(config(tmp_path / "whole", batch_size=None))
    assert json.loads((tmp_path / "whole" / "manifest.json").read_text())["batch_size"] == 4
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for name in ("000001.png", "000004.png"):
        (tmp_path / "part" / "images" / name).unlink()
    monkeypatch.setattr(folder, "batch_that_fits", lambda *_: 5)
    drawn = []
    draw = Sampler.draw
    monkeypatch.setattr(Sampler, "draw", lambda self, ids: drawn.append(self.batch_size) or draw(self, ids))
    draw_samples(config(tmp_path / "part", batch_size=None))
    assert drawn == [4]
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_an_image_is_the_same_in_a_set_of_any_size(tmp_path: Path) -> None:
    draw_samples(config(tmp_path / "six"))
    draw_samples(config(tmp_path / "two", num=2))
    for name in ("000000.png", "000001.png"):
        assert (tmp_path / "two/images" / name).read_bytes() == (tmp_path / "six/images" / name).read_bytes()


def test_a_compared_generator_is_gone_when_the_draws_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU its weights and cache would take the draws' memory."""
    loaded: list[weakref.ref[Sampler]] = []
    alive: list[int] = []
    load, draw = Sampler.load, Sampler.draw

    def remembered(*arguments: object) -> Sampler:
        sampler = load(*arguments)
        loaded.append(weakref.ref(sampler))
        return sampler

    def counted(self: Sampler, ids: torch.Tensor) -> torch.Tensor:
        gc.collect()
        alive.append(sum(each() is not None for each in loaded))
        return draw(self, ids)

    monkeypatch.setattr(Sampler, "load", remembered)
    monkeypatch.setattr(Sampler, "draw", counted)
    draw_samples(config(tmp_path / "out", num=2, compare_ckpt=tiny.FILES.generator))
    assert len(loaded) == 2
    assert alive == [1]


def test_a_checkpoint_in_shards_is_known_by_all_of_them(tmp_path: Path) -> None:
    state = load_state_dict(tiny.FILES.generator)
    index = {key: f"{number % 2}.safetensors" for number, key in enumerate(sorted(state))}
    for name in set(index.values()):
        save_file({key: value.contiguous() for key, value in state.items() if index[key] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    before = identity(tmp_path)
    assert before["bytes"] > tiny.FILES.generator.stat().st_size
    (tmp_path / "README.md").write_text("no part of it")
    assert identity(tmp_path) == before
    second = bytearray((tmp_path / "1.safetensors").read_bytes())
    second[-1] ^= 1
    (tmp_path / "1.safetensors").write_bytes(second)
    assert identity(tmp_path)["blake2b"] != before["blake2b"]
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the shard 1\.safetensors, which is not beside it"):
        identity(tmp_path)


@pytest.mark.parametrize(
    ("form", "file", "megabytes"), [("png", "contact_sheet.png", 0.22), ("npz", "parts/000000.safetensors", 0.23)]
)
def test_a_full_disk(
    form: str, file: str, megabytes: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the file and the room that it takes; the same command then ends as if nothing had been."""
    line = ["--model", "tiny", "--num", 6, "--batch-size", 4, "--class-ids", "0,3,8,3", "--format", form, "--out"]
    out = tmp_path / "out"
    with largest_file(10_000):
        assert run("generate", *line, out) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"vapi-fast: error: {out / file} could not be written: ")
    assert "File too large" in error
    assert f"; the results take up to {megabytes} MB and " in error
    assert error.endswith("make room: the same command goes on where it stopped")
    assert list(out.rglob(".*")) == []
    assert run("generate", *line, out) == 0
    assert run("generate", *line, tmp_path / "undisturbed") == 0
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_scores_that_cannot_be_kept_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_samples(config(tmp_path / "samples"))
    with largest_file(10):
        line = ("--model", "tiny", "--samples", tmp_path / "samples", "--output", tmp_path / "scores.json")
        assert run("evaluate", *line) == 1
    printed = capsys.readouterr()
    assert "FID              " in printed.out
    error = printed.err.splitlines()[-1]
    assert error.startswith(f"vapi-fast: error: {tmp_path / 'scores.json'} could not be written: File too large")
    assert error.endswith("the scores stand above")
    assert {path.name for path in tmp_path.iterdir()} == {"samples"}


def test_weights_that_do_not_fit_are_in_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("--model", "tiny", "--steps", 2, "--no-eval", "--batch-size", 2, "--group-size", 2, "--output-dir")
    out = tmp_path / "out"

    def without_room(path: Path, state: dict[str, torch.Tensor]) -> None:
        with largest_file(1_000_000):
            save_generator(path, state)

    monkeypatch.setattr(vapi_fast.models.transformer, "save_generator", without_room)
    assert run("align", *line, out) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"vapi-fast: error: {out / 'aligned.pt'} could not be written: 11 MB did not fit; the results"
    )
    assert f"MB are free there; go on with --resume --output-dir {out}" in error
    assert not (out / "aligned.pt").exists()
    monkeypatch.undo()
    assert run("align", *line, out, "--resume") == 0
    assert run("align", *line, tmp_path / "undisturbed") == 0
    one, other = (load_state_dict(each / "aligned.pt") for each in (out, tmp_path / "undisturbed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
