"""No combination of flags ends in a traceback: a configuration comes of it, or one line and nothing written."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
from dataclasses import Field
from pathlib import Path
from typing import Any

import pytest
from inputs import text_encoder
from PIL import Image

from vapi_fast import cli, commands, tiny
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.options import flags_of, kind_of, options

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

EXAMPLES = int(os.environ.get("VAPI_FAST_FUZZ_EXAMPLES", "120"))  # of each command
NUMBERS = (
    "0",
    "-0",
    "1",
    "2",
    "4",
    "7",
    "-1",
    "0.5",
    "1e-6",
    "1e300",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "",
    "x",
    "٣",
    "1_0",
)
LARGE = (str(2**31), str(2**53), str(2**63), str(2**70), "9" * 400)
TEXTS = (
    "",
    "x",
    "a:b",
    ":",
    "os:getcwd",
    "no.such:thing",
    "math:pi",
    "\x1b[31m",
    "é",
    "0-3",
    "3-0",
    "0,",
    "1-9999999999",
)
PATHS = (
    "",
    ".",
    "/",
    "missing",
    "/proc/self/mem",
    "/dev/null",
    "x" * 300,
    str(tiny.FILES.generator),
    str(tiny.FILES.train_images),
)


def values(config: type, field: Field[Any]) -> Any:
    """Texts that a field's flag may be given."""
    if field.metadata["choices"]:
        return st.sampled_from((*field.metadata["choices"], "other", ""))
    kind = kind_of(config, field)
    if kind in (int, float):
        return st.sampled_from((*NUMBERS, *LARGE)) | st.integers().map(str) | st.floats().map(str)
    return st.sampled_from(PATHS) if kind is Path else st.sampled_from(TEXTS) | st.text(max_size=8)


def of_model(config: type) -> dict[str, str]:
    """The tiny preset's name, where the command has a model."""
    return {"model": "tiny"} if any(field.name == "model" for field in options(config)) else {}


@st.composite
def command_lines(draw: Any, command: str) -> list[str]:
    config = cli.COMMANDS[command].config
    fields = list(options(config))
    chosen = draw(st.lists(st.sampled_from(fields), max_size=6, unique_by=lambda field: field.name))
    model = draw(st.sampled_from(("tiny", "tiny", "xxl", "b", "TINY", "huge")))
    line = ["--model", model] if of_model(config) else []
    for field in chosen:
        name = draw(st.sampled_from(flags_of(field)))
        line += [name] if kind_of(config, field) is bool else [f"{name}={draw(values(config, field))}"]
    return line


def outcome(command: str, line: list[str]) -> str:
    parser = argparse.ArgumentParser()
    cli.add_command_flags(parser, command)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            cli.COMMANDS[command].config(**vars(parser.parse_args(line)))
        except SystemExit as ended:
            return "usage" if ended.code == 2 else said.getvalue()
        except ConfigError:
            return "refused"
    return "taken"


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_any_flags(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: dict[str, int] = {}

    @hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
    @hypothesis.given(command_lines(command))
    def check(line: list[str]) -> None:
        kind = outcome(command, with_required(command, line))
        assert kind in ("usage", "refused", "taken")
        seen[kind] = seen.get(kind, 0) + 1

    check()
    print(f"{command}: {sum(seen.values())} command lines, {seen}")
    assert list(tmp_path.iterdir()) == []
    assert seen.get("refused", 0) > 20
    assert seen.get("taken", 0) > 2


def with_required(command: str, line: list[str]) -> list[str]:
    """The flags that the parser insists on, in front, where they were not drawn."""
    if command == "align":
        return line
    required = {f"--{field}": value for field, value in required_of(command, Path()).items()}
    missing = [name for name in required if not any(each.startswith(f"{name}=") for each in line)]
    return [*(f"{name}={required[name]}" for name in missing), *line]


def required_of(command: str, folder: Path) -> dict[str, Path]:
    """The fields that have no default."""
    return {
        "generate": {"out": folder / "out"},
        "evaluate": {"samples": tiny.FILES.heldout_images},
        "geneval": {"samples": Path(__file__).parent},
        "encode-captions": {"data": tiny.FILES.train_images, "out": folder / "out"},
    }.get(command, {})


@pytest.mark.parametrize("command", list(cli.COMMANDS))
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 2**70, -(2**70), 1e400])
def test_a_number_that_makes_no_sense_is_refused_wherever_it_stands(
    command: str, number: float, tmp_path: Path
) -> None:
    config = cli.COMMANDS[command].config
    required = required_of(command, tmp_path)
    required |= of_model(config)
    config(**required)
    tried = 0
    for field in options(config):
        if kind_of(config, field) in (int, float):
            tried += 1
            with pytest.raises(ConfigError, match=f"{flags_of(field)[0]} must be "):
                config(**(required | {field.name: number}))
    assert tried >= {"evaluate": 2, "geneval": 1, "encode-captions": 3}.get(command, 8)


SIZES = ("num", "save_size", "image_size", "batch_size", "group_size", "eval_samples")  # of tensors
FEW = (*SIZES, "micro_batch", "eval_batch", "steps")  # what a run takes longer for
QUICK = {
    "align": "--model tiny --steps 1 --no-eval --batch-size 2 --micro-batch 2 --group-size 2 --output-dir OUT",
    "generate": "--model tiny --num 2 --out OUT",
    "evaluate": f"--model tiny --samples {tiny.FILES.heldout_images}",
    "geneval": "--samples geneval --detections found.jsonl --output OUT",
    "encode-captions": "--data captions.jsonl --text-encoder encoder --out OUT",
}


@st.composite
def quick_lines(draw: Any, command: str) -> list[str]:
    """Flags whose runs are short, numbers of any other meaning included."""
    config = cli.COMMANDS[command].config
    line = QUICK[command].split()
    fields = st.sampled_from([field for field in options(config) if field.name != "model"])
    for field in draw(st.lists(fields, min_size=1, max_size=4, unique_by=lambda field: field.name)):
        name, kind = flags_of(field)[0], kind_of(config, field)
        if kind is bool:
            line.append(name)
        elif field.metadata["choices"]:
            line.append(f"{name}={draw(st.sampled_from(field.metadata['choices']))}")
        elif kind in (int, float):
            any_number = ("0", "1", "2", "0.5", "1e-6", "1e18", str(2**63 - 1))
            line.append(
                f"{name}={draw(st.sampled_from(('1', '2', '3', '8', '32') if field.name in FEW else any_number))}"
            )
        elif field.name not in ("out", "output_dir", "output", "text_encoder"):
            line.append(f"{name}={draw(values(config, field))}")
    return line


@pytest.mark.usefixtures("image_sets")
@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_any_flags_of_a_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, to its end or to its one line."""
    monkeypatch.chdir(tmp_path)
    image = Path("geneval/00000/samples/0000.png")
    image.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(image)
    prompt = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    Path("geneval/00000/metadata.jsonl").write_text(json.dumps(prompt))
    Path("found.jsonl").write_text(json.dumps({"image": "00000/samples/0000.png", "objects": []}))
    Path("captions.jsonl").write_text(json.dumps({"text": ["a red cup", "a cat"]}))
    text_encoder(Path("encoder"))
    seen: dict[int, int] = {}

    @hypothesis.settings(max_examples=max(EXAMPLES // 20, 1), deadline=None, database=None, derandomize=True)
    @hypothesis.given(quick_lines(command))
    @hypothesis.example(QUICK[command].split())
    def check(line: list[str]) -> None:
        line = [str(tmp_path / f"out-{sum(seen.values())}") if each == "OUT" else each for each in line]
        parser = argparse.ArgumentParser()
        cli.add_command_flags(parser, command)
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            try:
                code = commands.MAINS[command](parser.parse_args(line))
            except SystemExit as ended:
                code = int(ended.code)
        seen[code] = seen.get(code, 0) + 1
        assert code in (0, 1, 2)
        assert said.getvalue().count("error: ") == (1 if code else 0)

    check()
    print(f"{command}: {sum(seen.values())} runs, by exit code {seen}")
    assert seen.get(0) or command == "evaluate"  # which takes little but its files


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_what_decides_the_size_of_a_tensor_has_a_largest_value(command: str, tmp_path: Path) -> None:
    """Past it a size in bytes is no 64-bit number, or a list of all takes minutes to fail."""
    config = cli.COMMANDS[command].config
    found = {field.name: field.metadata["at_most"] for field in options(config) if field.name in SIZES}
    assert found
    assert all(most <= 10**7 for most in found.values())
    with pytest.raises(ConfigError, match="--batch-size must be between 1 and 10000000, got 9223372036854775807"):
        config(**({"batch_size": 2**63 - 1} | of_model(config) | required_of(command, tmp_path)))
