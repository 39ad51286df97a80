"""With torch, triton and numpy alone: the main job on random weights and made-up images, and one line for the rest."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from processes import PATIENCE

import vapi_fast
from vapi_fast import kernels

E2E = Path(__file__).parents[1] / "benchmarks" / "e2e_align.py"
SMALL = ("--model", "tiny", "--random-init", "--batch-size", "2", "--group-size", "2")
NOT_THERE = ("datasets", "pyarrow", "PIL", "tqdm", "tensorboard", "matplotlib", "safetensors", "torchmetrics", "pynvml")


def with_requirements(names: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """The distributions, and what they themselves require here."""
    wanted, seen = [Requirement(name) for name in names], set()
    while wanted:
        requirement = wanted.pop()
        if str(requirement) not in seen:
            seen.add(str(requirement))
            found = importlib.metadata.distribution(requirement.name)
            yield found
            extras = {"", *requirement.extras}  # PyTorch requires cuda-toolkit[cublas, …]
            for needed in map(Requirement, found.requires or ()):
                if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                    wanted.append(needed)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to the three packages, to what they require, and to this one: all that Python then finds."""
    folder = tmp_path_factory.mktemp("bare")
    for distribution in with_requirements(["torch", "triton", "numpy"]):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).is_symlink():  # `nvidia` is the folder of many
                (folder / top).symlink_to(distribution.locate_file(top))
    package = folder / "vapi_fast"
    package.mkdir()
    for path in Path(vapi_fast.__file__).parent.iterdir():
        (package / path.name).symlink_to(path)
    if not (package / "kernels").exists():  # an editable install has it elsewhere
        (package / "kernels").symlink_to(Path(kernels.__file__).parent)
    return folder


def python(bare: Path, *arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python without its site-packages, in `folder`, on the CPU."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON"))}
    command = [sys.executable, "-S", "-s", *map(str, arguments)]
    environment |= {"PYTHONPATH": str(bare), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder or bare, env=environment, timeout=PATIENCE
    )


def test_the_main_job(bare: Path, tmp_path: Path) -> None:
    """By torchrun, beside the published recipe: the record and the weights are there, what is missing is said once."""
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=1",
        "--no-python",
        sys.executable,
        "-S",
    )
    job = (E2E, *SMALL, "--synthetic-data", "--path", "both", "--steps", "3", "--output-dir", "out")
    finished = python(bare, *torchrun, *job, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    said = "not installed: tensorboard, matplotlib, tqdm: no curves, charts or progress bar"
    assert [line for line in lines if "not installed" in line] == [said]
    assert lines[-1] == "results in out: aligned.pt, progress.jsonl, run.json"
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert len(record["reward"]) == 3
    assert record["comparison"]["gradient_relative_error"] < 1e-2
    weights = torch.load(tmp_path / "out" / "aligned.pt")
    assert weights["tok_embeddings.weight"].shape == (512, 192)
    assert "aligning (vapi): step 1/3, reward=" in finished.stderr
    assert "images_per_s=" in finished.stderr
    assert finished.stderr.rstrip().splitlines()[-1].startswith("aligning (vapi): step 3/3, ")
    assert finished.stderr.rstrip().endswith(" 0 s left")


def test_the_functions(bare: Path, tmp_path: Path) -> None:
    """`align` from Python, in a process that can import all that this test says needs no more."""
    script = f"""
import importlib.util
assert not [name for name in {NOT_THERE} if importlib.util.find_spec(name)]
import vapi_fast.alignment.reward, vapi_fast.alignment.step, vapi_fast.data.dataset, vapi_fast.models.frozen
import vapi_fast.generation.sequences, vapi_fast.patch
small = dict(steps=1, batch_size=2, group_size=2, output_dir="out")
record = vapi_fast.align(vapi_fast.AlignConfig(model="tiny", random_init=True, synthetic_data=True, **small))
assert record["images_per_second"] > 0
"""
    finished = python(bare, "-c", script, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"aligned.pt", "progress.jsonl", "run.json"}


MISSING = {
    "align --model tiny --steps 1": (2, "reading images needs datasets and pillow", "datasets pillow"),
    "align --model tiny --synthetic-data": (2, "tokenizer.safetensors needs safetensors", "safetensors"),
    "generate --model tiny --num 1 --out out": (
        2,
        "vapi-fast generate needs pillow and safetensors",
        "pillow safetensors",
    ),
    "evaluate --model tiny --samples .": (2, "vapi-fast evaluate needs pillow", "pillow"),
    "geneval --samples .": (2, "vapi-fast geneval needs pillow", "pillow"),
}


def test_a_missing_package_is_one_line(bare: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from vapi_fast import cli
for command in {list(MISSING)}:
    sys.argv = ["vapi-fast", *command.split()]
    print(cli.main())
"""
    finished = python(bare, "-c", script, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    codes, lines = finished.stdout.splitlines(), finished.stderr.splitlines()
    for code, line, expected in zip(codes, lines, MISSING.values(), strict=True):
        assert int(code) == expected[0]
        assert line.startswith("vapi-fast: error: ")
        assert line.endswith(f"{expected[1]}, not installed here: pip install {expected[2]}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        "-c 'import vapi_fast'",
        "-m vapi_fast.cli --help",
        "-m vapi_fast.cli align --help",
        "-m vapi_fast.cli generate --help",
        "-m vapi_fast.cli evaluate --help",
        "-m vapi_fast.cli geneval --help",
        f"{E2E} --help",
    ],
)
def test_help_imports_no_torch(arguments: str) -> None:
    """Which modules a command imported, Python tells itself; that is also where its seconds are."""
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", *shlex.split(arguments)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert finished.returncode == 0, finished.stderr
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "vapi_fast" in imported
    assert not imported & {"torch", "triton", "numpy", *NOT_THERE}
