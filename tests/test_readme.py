"""README.md and docs/: commands run, as they stand but for sizes; flags, defaults, messages and links are true."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ablation
import flag_tables
import numpy as np
import pytest
import readme
import torch
from PIL import Image
from processes import free_port
from public_models import LPIPS, Transformer, VQModel, randomised

import vapi_fast
from vapi_fast import AlignConfig, tiny
from vapi_fast.alignment import memory
from vapi_fast.data.dataset import ImageData
from vapi_fast.models.catalog import CATALOG
from vapi_fast.models.families import generator_config
from vapi_fast.runtime.checkpoint import load_state_dict

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
README = PAGES["README.md"]
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
PROGRAMS = ("torchrun ", "vapi-fast ", "python ", "pytest ", "bash ", "cmake ")
INLINE = sorted(
    {code for text in PAGES.values() for code in re.findall(r"`([^`\n]+)`", text) if code.startswith(PROGRAMS)}
)
INLINE = [code for code in INLINE if not any(code in block for block in BLOCKS)]
IMAGES = 20

# What makes a command small: of two equal flags the last counts.
ADDED = {
    "e2e_align.py": "--steps 2 --batch-size 4 --micro-batch 2 --eval-samples 20",
    "vapi-fast generate": f"--num-images {IMAGES}",
    "pytest benchmarks/": "-k 'mse and forward' -p no:cacheprovider",
}
REPLACED = {
    "--model xxl": "--model tiny",
    "--nproc_per_node=8": "--nproc_per_node=2",
    "--nnodes=4": "--nnodes=1",
    "--save-size 256": "--save-size 32",
    "cmake -B build": f"cmake -S {ROOT} -B build -DPython3_EXECUTABLE={sys.executable} -DARCHITECTURES=sm_90",
}
# For a GPU, of many minutes, or no whole commands: what is added here, and the exit code and output then.
STARTED = {
    "bash benchmarks/tools/check_kernels.sh 3.4.0 3.6.0": (" --help", 0, "VERSION ..., versions of triton"),
    "bash benchmarks/gpu_check.sh DIR": ("", 1, "no CUDA device: nothing was run"),
    "python benchmarks/readme.py benchmarks/results/NAME.json": ("", 1, "readme.py: error: benchmarks/results/NAME"),
    "python benchmarks/forms.py benchmarks/results/NAME.json": ("", 2, "forms.py: error: benchmarks/results/NAME"),
    "python -m vapi_fast.tiny.build_text": (" --help", 0, "Rebuild the text presets' files from nothing"),
    "python -m vapi_fast.tiny.build": (" --help", 0, "Rebuild the tiny preset from nothing"),
    "python benchmarks/ablation.py": (" --help", 0, "The paper's ablations in miniature, each beside the controls"),
    "python benchmarks/ablation.py --table controls": (" --help", 0, "noise,steps,group"),
    "python -m vapi_fast.kernels.check": (" --help", 0, "--arch"),  # in full in kernels/test_check.py
    "pytest benchmarks/ --benchmark-only": (" --collect-only -q", 0, "test_operation[mse forward]"),
    "vapi-fast encode-captions": (" --help", 0, "--caption-column"),
    "vapi-fast align": (" --help", 0, "--model"),
    "vapi-fast geneval --samples DIR": ("", 2, "--samples DIR: no such file or folder"),
    "torchrun … benchmarks/e2e_align.py": (" --help", 0, "--model"),
    "torchrun … --no-python vapi-fast align": (" --help", 0, "--model"),
}


@pytest.fixture(scope="module")
def folder(image_sets: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the scripts of this checkout, and the files that the pages name, of the tiny preset."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    torch.save(load_state_dict(tiny.FILES.tokenizer), folder / "vq_ds16_c2i.pt")
    for name in ("c2i_XXL_384.pt", "aligned.pt"):
        torch.save(load_state_dict(tiny.FILES.generator), folder / name)
    preset = ImageData(tiny.FILES.train_images, tiny.IMAGE_SIZE)
    pixels = [((preset.load(index)[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for index in range(IMAGES)]
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", np.stack(pixels))
    for index, image in enumerate(pixels):
        path = folder / "imagenet" / "train" / f"class-{index % tiny.CLASSES}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def run(command: str, folder: Path) -> tuple[int, str]:
    """Exit code and output of a command, made small."""
    for old, new in (REPLACED | {"HOST:29500": f"127.0.0.1:{free_port()}", " … ": " "}).items():
        command = command.replace(old, new)
    command += "".join(f" {flags}" for program, flags in ADDED.items() if program in command)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables.pop("TRITON_INTERPRET", None)
    ended = subprocess.run(["bash", "-c", command], cwd=folder, env=variables, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.partition("\n")[0][:60])
def test_commands_of_a_block(block: str, folder: Path) -> None:
    """Installing apart, which is what `.ci/run` begins with; it runs the block of the tests as well."""
    for command in block.replace("\\\n", " ").splitlines():
        if "pip install" in command or "<!-- tests -->\n```bash\n" + block in README:
            continue
        code, output = run(command, folder)
        assert code == 0, f"{command}\n{output[-3000:]}"


def test_ci_installs_as_the_page_says() -> None:
    assert "sed -n '/<!-- tests -->/" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in (line for block in BLOCKS for line in block.splitlines() if "pip install" in line):
        assert re.fullmatch(
            r"python3 -m venv \.venv && (\. \.venv/bin/activate && |\.venv/bin/)pip install -e ('\.\[test,dev\]'|\.)",
            command,
        )


@pytest.mark.parametrize("command", INLINE)
def test_commands_in_the_text(command: str, folder: Path) -> None:
    if command.startswith("cmake") and not shutil.which("cmake"):
        pytest.skip("no cmake")
    extra, expected, printed = STARTED.get(command, ("", 0, ""))
    code, output = run(command + extra, folder)
    assert code == expected, output[-3000:]
    assert printed in output


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
@pytest.mark.usefixtures("image_sets")
def test_snippets(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = "steps=2, batch_size=4, eval_samples=20"
    models = {"gpt": Transformer, "vq_model": VQModel, "lpips": LPIPS}
    names: dict[str, Any] = {name: randomised(model()).eval() for name, model in models.items() if name in snippet}
    exec(snippet.replace("steps=50", small), names)
    if "model" in names:
        assert isinstance(names["model"], vapi_fast.models.LlamaGen)
        assert names["record"]["config"]["steps"] == 2


def rows(page: str, heading: str) -> Iterator[list[str]]:
    """The cells of the table under a heading."""
    section = PAGES[page].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    for line in re.findall(r"^\| (`.*) \|$", section, flags=re.MULTILINE):
        yield re.split(r"\s*\|\s*", line)


@pytest.mark.parametrize("page", flag_tables.PAGES, ids=lambda page: page.name)
def test_tables_of_flags_are_those_of_the_configurations(page: Path) -> None:
    """`python docs/flag_tables.py` writes them."""
    text = page.read_text(encoding="utf-8")
    assert flag_tables.with_tables(text) == text
    assert text.count("<!-- flags: ") == (1 if page.name == "README.md" else 4)
    assert flag_tables.with_tables(text.replace("| `--batch-size` |", "| stale |")) == text


def test_tables_of_the_tiny_preset() -> None:
    path = ROOT / "benchmarks" / "results" / "ablation" / "controls.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    assert ablation.table(records) in README
    difference = ablation.difference(records, ablation.VAPI, ablation.RANDOM)
    for cell in ("-0.012 ± 0.004", "+0.017 ± 0.001", "+30.2"):
        assert f"| {cell} |" in difference
    assert "by 0.017 ± 0.001 in reward (30 standard errors over random" in README
    assert "precision falls by 0.012 ± 0.004" in README
    best = [[run["aligned"] for run in records[name]] for name in (ablation.TEMPERED, ablation.TEMPERATURE)]
    reward, fid = (
        statistics.mean(run[key] for run in best[0]) - statistics.mean(run[key] for run in best[1])
        for key in ("reward", "fid")
    )
    assert (f"{reward:.3f}", f"{fid:.1f}") == ("0.014", "1.8")
    assert "adds 0.014 of reward, and costs 1.8 of FID" in README


TABLES = {path.stem: path for path in sorted((ROOT / "benchmarks" / "results" / "ablation").glob("*.json"))}


@pytest.mark.parametrize("table", sorted(TABLES.keys() - {"controls"}))
def test_tables_in_miniature(table: str) -> None:
    """As the JSON has them; of captions by task, too."""
    records, page = json.loads(TABLES[table].read_text(encoding="utf-8")), PAGES["ablations.md"]
    made = ablation.curves if table == "steps" else ablation.table
    assert made(records) in page
    if table.startswith(("text-", "janus-")):
        assert ablation.tasks(records) in page


def test_every_table_in_miniature_has_its_figures() -> None:
    headings = re.findall(r"^## (.*)$", PAGES["ablations.md"], re.MULTILINE)
    assert {heading.lower().replace(": ", "-") for heading in headings} == TABLES.keys() - {"controls"}


def test_memory_of_the_models_is_the_plan_s() -> None:
    section = README.partition("### Models\n")[2]
    found = {}
    for first, last in re.findall(
        r"^\| (`\w[^|]*) \|.*\| ([^|]*) \|$", section.partition("\n\nThe memory")[0], re.MULTILINE
    ):
        names = re.findall(r"`([\w-]+)`", first)
        figures = re.findall(r"(?:`(?:--train )?(lora|head)` )?(\d+)", last)
        models = names if len(names) == len(figures) else names * len(figures)
        found |= {(name, part or "all"): int(size) for name, (part, size) in zip(models, figures, strict=True)}
    assert {name for name, _ in found} == {name for name in CATALOG if not name.startswith("tiny")}
    for (name, part), size in found.items():
        config = AlignConfig(
            model=name, train=part, micro_batch=4, evaluate=False, random_init=True, synthetic_data=True
        )
        plans = (memory.plan(config, generator_config(name), gigabytes * 10**9) for gigabytes in (24, 40, 80, 141, 200))
        assert round(next(plan for plan in plans if plan.fits).total / 1e9) == size, (name, part)


MEASURED: dict[str, Any] = {
    "cpu": False,
    "commit": "0123456789abcdef-dirty",
    "device": {"name": "NVIDIA H200", "torch": "2.11.0+cu130", "triton": "3.6.0"},
    "headline": {"step_seconds": 3.604, "ratio": 9.46, "published_step_seconds": 34.1, "run_seconds": 379.6},
}


def test_figures_of_a_gpu_fill_the_first_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, results = tmp_path / "README.md", tmp_path / "h200.json"
    page.write_text(README, encoding="utf-8")
    results.write_text(json.dumps(MEASURED))
    for _ in range(2):  # the second time changes nothing
        assert readme.main([str(results), "--readme", str(page)]) == 0
        text = page.read_text(encoding="utf-8")
        changed = dict(pair for pair in zip(README.splitlines(), text.splitlines(), strict=True) if len(set(pair)) == 2)
        where = "NVIDIA H200, torch 2.11.0+cu130, triton 3.6.0, 012345678-dirty"
        step = "LlamaGen-XXL, 384², 128 images × 8, a step"
        assert list(changed.values()) == [
            f"| {step} | {where} | 3.60 s | published recipe, there: 34.1 s | **9.5×** |",
            f"| the same, 100 steps | {where} | 6 min 20 s | published, 8 × A100: 25 min | |",
        ]
        assert all("*not measured*" in line for line in changed)
    more = MEASURED | {"headline": {"peak_memory": 61.234e9, "images_per_second_sampled": 48.77}, "commit": "f" * 40}
    results.write_text(json.dumps(more))
    assert readme.main([str(results), "--readme", str(page)]) == 0
    assert (
        "| its peak memory | NVIDIA H200, torch 2.11.0+cu130, triton 3.6.0, fffffffff | 61.2 GB | |" in page.read_text()
    )
    assert "| 48.8 images/s | |" in page.read_text()
    assert list(tmp_path.iterdir()) in ([page, results], [results, page])


@pytest.mark.parametrize(
    ("record", "text", "message"),
    [
        (MEASURED | {"cpu": True}, README, "it has no figures of a GPU: run bash benchmarks/gpu_check.sh DIR on one"),
        (MEASURED | {"headline": {}}, README, "it has no figures of a GPU"),
        ([], README, "no gpu_check.json (TypeError("),
        (MEASURED, README.replace("| its peak memory |", "| memory |"), "has 0 rows that begin with 'its peak memory'"),
    ],
)
def test_what_cannot_be_filled_in(
    record: Any, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert readme.main([str(tmp_path / "a.json"), "--readme", str(tmp_path / "README.md")]) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


def literals() -> list[str]:
    """Every text of the package, with … in place of what is filled in."""
    texts = []
    for path in (path for folder in ("vapi_fast", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_messages_are_those_of_the_package() -> None:
    texts = literals()
    messages = [
        message for cells in rows("README.md", "When it stops") for message in re.findall("`([^`]+)`", cells[0])
    ]
    assert len(messages) > 20
    for message in messages:
        pattern = re.compile(".*?".join(re.escape(part.strip()) for part in message.split("…")))
        assert any(pattern.search(text) for text in texts), message


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = folder / path if path else folder / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings], target
