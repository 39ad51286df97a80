"""Bad input: one clear line, exit code 2 for arguments and files, 1 for a failed run, no traceback, nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from vapi_fast import AlignConfig, cli, commands, tiny
from vapi_fast.alignment.optimizer import make_optimizer
from vapi_fast.alignment.snapshots import Snapshots
from vapi_fast.models import LlamaGen
from vapi_fast.runtime.checkpoint import load_state_dict
from vapi_fast.runtime.options import flags_of, options

PRESET = tiny.FILES


@pytest.fixture
def vapi_fast(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable:
    """Run `vapi-fast align …` in this process; returns (exit code, the error line)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vapi-fast", "align", *map(str, arguments)])
        try:
            code = cli.main()
        except SystemExit as usage:  # argparse's own
            code = int(usage.code)
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if "error:" in line]
        assert len(errors) == 1, lines
        assert not any("Traceback" in line for line in lines)
        return code, errors[0]

    return run


USAGE = [
    (["--model", "huge"], "invalid choice: 'huge'"),
    (["--model", "xxxl"], "--gpt-ckpt is required for --model xxxl: the hub has none for --image-size 384"),
    (["--model", "xxl", "--image-size", "256"], "for --model xxl: the hub has none for --image-size 256"),
    (["--model", "t2i-xl"], "--data is required for --model t2i-xl"),
    (["--model", "tiny", "--gpt-ckpt", "hub:a/../b"], "hub:a/../b: expected hub:owner/name"),
    (["--model", "tiny", "--steps", "0"], "--steps must be at least 1, got 0"),
    (["--model", "tiny", "--steps", "many"], "invalid int value: 'many'"),
    (["--model", "tiny", "--group-size", "1"], "--group-size must be at least 2"),
    (["--model", "tiny", "--batch-size", "-3"], "--batch-size must be between 1 and 10000000, got -3"),
    (["--model", "tiny", "--image-size", "30"], "--image-size must be a multiple of 4, got 30"),
    (["--model", "tiny", "--noise-prob", "1.5"], "--noise-prob must be between 0 and 1, got 1.5"),
    (["--model", "tiny", "--top-p", "nan"], "--top-p must be greater than 0 and at most 1, got nan"),
    (["--model", "tiny", "--temperature", "0"], "--temperature must be at least 1e-06, got 0.0"),
    (["--model", "tiny", "--dropout", "1"], "--dropout must be at least 0 and less than 1"),
    (["--model", "tiny", "--label-dropout", "1.1"], "--label-dropout must be between 0 and 1, got 1.1"),
    (["--model", "tiny", "--rollout-mode", "both"], "invalid choice: 'both'"),
    (["--model", "tiny", "--recipe", "va-phi"], "invalid choice: 'va-phi'"),
    (["--model", "tiny", "--reward", "clop:2"], "--reward clop:2: unknown, expected pixel, classifier, clip"),
    (["--model", "tiny", "--reward", "pixel:much"], "the weight of pixel must be a number, got 'much'"),
    (["--model", "tiny", "--recipe", "ste", "--method", "vapi"], "decodes tokens; --recipe ste sets --codes raw"),
    (["--model", "tiny", "--codes", "raw"], "--codes raw needs --method ste: --method vapi decodes tokens"),
    (["--model", "tiny", "--lr", "-1"], "--lr must be at least 0"),
    (["--model", "tiny", "--cfg-scale", "0.5"], "--cfg-scale must be at least 1"),
    (["--model", "tiny", "--prior", "kl", "--method", "ste"], "--prior kl needs --method vapi"),
    (["--model", "tiny", "--compare"], "--path both needs the published recipe: run benchmarks/e2e_align.py"),
    (
        ["--model", "tiny", "--mse-weight", "0", "--lpips-weight", "0", "--prior-weight", "0"],
        "nothing to optimise",
    ),
    (["--model", "tiny", "--resume", "--output-dir", "empty"], "holds no snapshots to go on from"),
    (["--model", "tiny", "--gpt-ckpt", "missing.pt"], "--gpt-ckpt missing.pt: no such file or folder"),
    (["--model", "tiny", "--data", "missing"], "--data missing: no such file or folder"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[message[:40] for _, message in USAGE])
def test_usage_errors(vapi_fast: Callable, arguments: list[str], message: str, tmp_path: Path) -> None:
    code, error = vapi_fast(*arguments)
    assert code == 2
    assert message in error
    assert list(tmp_path.iterdir()) == []  # nothing was written


def test_checkpoint_of_another_size(vapi_fast: Callable, tmp_path: Path) -> None:
    state = load_state_dict(PRESET.generator)
    torch.save({name: value for name, value in state.items() if "layers.5." not in name}, "five.pt")
    code, error = vapi_fast("--model", "tiny", "--gpt-ckpt", "five.pt", "--synthetic-data", "--output-dir", "out")
    assert code == 2
    assert "five.pt: holds 5 layers of width 192, but --model tiny has 6 of width 192" in error
    assert not (tmp_path / "out").exists()


def test_truncated_checkpoint(vapi_fast: Callable, tmp_path: Path) -> None:
    Path("cut.safetensors").write_bytes(PRESET.tokenizer.read_bytes()[:5000])
    code, error = vapi_fast("--model", "tiny", "--vq-ckpt", "cut.safetensors", "--synthetic-data")
    assert code == 2
    assert "cut.safetensors: cannot be read, truncated" in error


def test_swapped_checkpoints(vapi_fast: Callable) -> None:
    code, error = vapi_fast(
        *("--model", "tiny", "--vq-ckpt", PRESET.generator, "--gpt-ckpt", PRESET.tokenizer, "--synthetic-data")
    )
    assert code == 2
    assert "does not fit this VQTokenizer" in error


def save_images(folder: Path, classes: int) -> None:
    for label in range(classes):
        (folder / f"{label:02d}").mkdir(parents=True)
        Image.new("RGB", (32, 32), (20 * label, 90, 120)).save(folder / f"{label:02d}" / "a.png")


@pytest.mark.usefixtures("image_sets")
def test_labels_out_of_range(vapi_fast: Callable) -> None:
    save_images(Path("ten"), 10)
    code, error = vapi_fast("--model", "tiny", "--data", "ten", "--no-eval")
    assert code == 2
    assert "label" in error
    assert "9" in error


@pytest.mark.usefixtures("image_sets")
def test_empty_data(vapi_fast: Callable) -> None:
    Path("nothing").mkdir()
    code, error = vapi_fast("--model", "tiny", "--data", "nothing", "--no-eval")
    assert code == 2
    assert "nothing" in error


@pytest.mark.usefixtures("image_sets")
def test_nan_reward(vapi_fast: Callable, tmp_path: Path) -> None:
    """A tokenizer that decodes to infinity: stopped before the first optimizer step, the good weights kept."""
    state = load_state_dict(PRESET.tokenizer)
    state["decoder.conv_out.bias"] = torch.tensor([3e38, 0.0, 0.0])
    torch.save({"model": state}, "huge.pt")
    code, error = vapi_fast(
        *("--model", "tiny", "--vq-ckpt", "huge.pt", "--no-eval", "--batch-size", "4", "--output-dir", "out")
    )
    assert code == 1
    assert "step 1: mse is not finite (stage decode) for the images with ids" in error
    assert "the weights up to step 0 are in out/snapshots" in error
    kept = LlamaGen.from_name("tiny")
    step, _ = Snapshots(Path("out/snapshots")).restore(kept, make_optimizer(kept, AlignConfig(model="tiny")))
    assert step == 0
    for name, value in load_state_dict(PRESET.generator).items():
        assert torch.equal(kept.state_dict()[name], value.float()), name
    assert not Path("out/run.json").exists()


def test_finished_and_unfinished_runs_are_not_overwritten(vapi_fast: Callable) -> None:
    for name, message in (("run.json", "holds a finished run"), ("snapshots", "pass --resume to go on with it")):
        folder = Path("of-" + name.split(".")[0])
        file = folder / name if name == "run.json" else folder / name / "step-000001" / "manifest.json"
        file.parent.mkdir(parents=True)
        file.write_text("precious")
        code, error = vapi_fast("--model", "tiny", "--output-dir", folder)
        assert code == 2
        assert message in error
        assert file.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("progress.jsonl", lambda path: path.symlink_to("mine.txt"), "progress.jsonl is none that a run has written"),
        ("progress.jsonl", os.mkfifo, "progress.jsonl is none that a run has written"),
        ("tensorboard", Path.touch, "tensorboard is none that a run has written"),
        ("snapshots", Path.touch, "snapshots is none that a run has written"),
        ("aligned.pt", lambda path: path.symlink_to("nowhere"), "holds aligned.pt, which this run would write"),
    ],
)
def test_what_no_run_has_written_is_left_alone(
    name: str, make: Callable[[Path], object], message: str, vapi_fast: Callable
) -> None:
    Path("out").mkdir()
    make(Path("out") / name)
    code, error = vapi_fast("--model", "tiny", "--output-dir", "out")
    assert code == 2
    assert message in error
    assert os.path.lexists(Path("out") / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 and MASTER_ADDR is missing: start with torchrun, or unset"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x' in the environment, expected torchrun's number: unset it"),
    ],
)
def test_an_environment_that_is_not_torchruns(
    changes: dict[str, str], message: str, vapi_fast: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    code, error = vapi_fast("--model", "tiny", "--output-dir", "out")
    assert code == 2
    assert message in error


def test_damaged_state_is_refused(vapi_fast: Callable) -> None:
    Path("out/snapshots/step-000001").mkdir(parents=True)
    Path("out/snapshots/step-000001/manifest.json").write_bytes(b"half a file")
    code, error = vapi_fast("--model", "tiny", "--output-dir", "out", "--resume", "--synthetic-data")
    assert code == 2
    assert "out/snapshots" in error


def test_interrupted_run_says_how_to_go_on(vapi_fast: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from vapi_fast.alignment import loop

    small = (
        "--model",
        "tiny",
        "--synthetic-data",
        "--batch-size",
        "4",
        "--output-dir",
        "out",
        "--checkpoint-every",
        "1",
    )

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tqdm, "set_postfix", interrupt)
        assert vapi_fast(*small, "--steps", "3") == (1, "vapi-fast: error: interrupted; nothing was saved yet")
    code, error = vapi_fast(*small, "--steps", "3", "--resume")
    assert code == 2
    assert "holds no snapshots" in error

    def of_step(self: loop.GradientSource, step: int, *_: object) -> Callable:
        return interrupt if step else loop.accumulate_gradients

    with monkeypatch.context() as patch:
        patch.setattr(loop.GradientSource, "of_step", of_step)
        again = "go on from the last saved state with --resume --output-dir out"
        assert vapi_fast(*small, "--steps", "3") == (1, f"vapi-fast: error: interrupted; {again}")


def test_out_of_memory_says_which_flag_to_lower(vapi_fast: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(commands, "align", exhausted)
    assert vapi_fast("--model", "tiny") == (1, f"vapi-fast: error: {commands.OUT_OF_MEMORY}")
    assert "lower --micro-batch" in commands.OUT_OF_MEMORY


def test_flags_cover_the_config_and_defaults_are_its_own() -> None:
    import dataclasses

    fields = {field.name for field in dataclasses.fields(AlignConfig)}
    flags = {field.name for field in options(AlignConfig)}
    assert fields - flags == {"tokenizer", "clip_grad_norm", "clip_range"}


def test_paper_defaults() -> None:
    paper = AlignConfig(model="xxl", vq_ckpt=PRESET.tokenizer, gpt_ckpt=PRESET.generator, data=PRESET.train_images)
    assert (paper.image_size, paper.batch_size, paper.group_size, paper.steps) == (384, 128, 8, 100)
    assert (paper.lr, paper.weight_decay, paper.prior_weight, paper.clip_range) == (1e-6, 1e-4, 0.1, 0.2)
    assert (paper.mse_weight, paper.lpips_weight, paper.noise_prob) == (1.0, 1.0, 0.0)
    assert (paper.recipe, paper.rollout_mode, paper.dropout, paper.label_dropout) == ("va-pi", "eval", 0.1, 0.1)


def test_console_script_help() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "vapi_fast.cli", "align", "--help"], capture_output=True, text=True, check=True
    )
    for field in options(AlignConfig):
        assert flags_of(field)[0] in finished.stdout
    assert "--path" not in finished.stdout
