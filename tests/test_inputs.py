"""Whatever is handed to a command, the result is right, or one line says what is wrong and nothing was written."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from vapi_fast import cli, commands

pytest.importorskip("datasets")
inputs = pytest.importorskip("inputs")

ALIGN = "align --model tiny --steps 1 --no-eval --batch-size 2 --micro-batch 2 --group-size 2 --output-dir OUT "
GENERATE = "generate --model tiny --num 2 --out OUT "
EVALUATE = "evaluate --model tiny --output OUT "
BARE = "--ema --gpt-ckpt IN/checkpoints/no-unconditional.pt"  # without a row for "none"
NONE = r"no-unconditional\.pt was trained without an unconditional class .*each of its 9 classes.* which"
FILE, USAGE, FAILED = 2, 2, 1  # exit codes


class Case(NamedTuple):
    line: str  # IN: the folder of inputs; OUT: of results
    says: str  # pattern in what is printed
    code: int = 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs.write_all(tmp_path_factory.mktemp("inputs") / "in")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def refused(name: str, says: str) -> Iterator[Case]:
    """A checkpoint that both commands refuse."""
    for command in (ALIGN, GENERATE):
        yield Case(f"{command} --gpt-ckpt IN/checkpoints/{name}", says, FILE)


CASES = [
    *refused("nan.pt", r"nan\.pt: output\.weight has values that are not finite"),
    *refused("infinite.pt", r"infinite\.pt: output\.weight has values that are not finite"),
    *(
        Case(f"{command} --vq-ckpt IN/checkpoints/vq-nan.pt", r"vq-nan\.pt: .*conv_out\.bias has values that", FILE)
        for command in (ALIGN, GENERATE)
    ),
    *refused("vocabulary-256.pt", r"vocabulary-256\.pt .*tokenizer\.safetensors"),
    *refused("vocabulary-600.pt", r"vocabulary-600\.pt .*tokenizer\.safetensors"),
    *refused("odd-layer.pt", r"odd-layer\.pt: .*layers\.x"),
    *refused("gap-in-layers.pt", r"gap-in-layers\.pt: "),
    *refused("meta.pt", r"output\.weight is on the meta device"),
    *refused("sparse.pt", r"output\.weight is sparse"),
    *refused("integer.pt", r"output\.weight is of type int64"),
    *refused("complex.pt", r"output\.weight is of type complex64"),
    *refused("float8.pt", r"output\.weight is of type float8_e4m3fn"),
    *refused("flat-table.pt", r"flat-table\.pt: .*tok_embeddings\.weight"),
    *refused("empty-table.pt", r"tok_embeddings\.weight is empty"),
    *refused("scalar.pt", r"scalar\.pt: .*norm\.weight is \[\]"),
    *refused("control-characters.pt", r"control-characters\.pt: .*\\x1b\[31m layers"),
    *refused("number-keys.pt", r"number-keys\.pt: "),
    *refused("list.pt", r"holds a list, expected a state dict"),
    *refused("nothing.pt", r"no weights found"),
    *refused("no-checkpoint", r"is a folder without a checkpoint that is known"),
    Case(ALIGN + "--gpt-ckpt IN/checkpoints/compiled-of-ddp.pt", "aligned"),
    Case(ALIGN + "--gpt-ckpt IN/checkpoints/after-sampling.pt", r"left out 2 entries that are no weights \("),
    Case(f"{GENERATE}{BARE} --class-ids 8", "samples"),
    Case(f"{GENERATE}{BARE} --cfg-scale 2", rf"{NONE} --cfg-scale above 1 needs: pass --cfg-scale 1", FILE),
    Case(ALIGN + BARE, "aligned"),
    Case(f"{ALIGN}{BARE} --label-dropout 0.1", rf"{NONE} --label-dropout needs: pass --label-dropout 0", FILE),
    Case(ALIGN.replace("--no-eval", BARE), rf"{NONE} the second .*\(--cfg-scale\) needs: pass --cfg-scale 1", FILE),
    Case(GENERATE + "--gpt-ckpt IN/checkpoints/averaged-alone.pt", r"holds averaged weights \(ema\) alone"),
    Case(GENERATE + "--gpt-ckpt IN/checkpoints/safetensors-in-disguise.pt", "samples"),
    Case(GENERATE + "--gpt-ckpt IN/checkpoints/shards --compare-ckpt IN/checkpoints/shards", "samples"),
    *(Case(f"{ALIGN} --data IN/pictures/{form}", "2 classes: a=0, b=1") for form in ("gray16", "float", "alpha")),
    Case(ALIGN + "--data IN/pictures/not-finite", "its values are not finite", FILE),
    Case(ALIGN + "--data IN/folders/system-folders", "4 images in 2 classes: n01440764=0, n01443537=1"),
    Case(ALIGN + "--data IN/folders/splits", "6 images in 2 classes of split Train: cat=0, dog=1"),
    Case(ALIGN + "--data IN/folders/splits --split VAL", "4 images in 2 classes of split Val: cat=0, dog=1"),
    Case(ALIGN + "--data IN/folders/splits --split other", "has no split 'other'; it has Train, Val", FILE),
    Case(ALIGN + "--data IN/folders/numbers", r"label 9 of .*numbers/10/0\.png is out of range", FILE),
    Case(ALIGN + "--data IN/folders/loops", "4 images in 2 classes: cat=0, dog=1\nwarning: the generator has 9"),
    Case(ALIGN + "--data IN/folders/fifo", "4 images in 2 classes: cat=0, dog=1"),
    Case(ALIGN + "--data IN/data/saved-with-format", "8 images in 2 classes: cat=0, dog=1"),
    Case(EVALUATE + "--samples IN/samples/whole.npz --reference IN/data/validation-shards", "8 images against 12"),
    Case(EVALUATE + "--samples IN/samples/fortran.npz", "arr_0 lies in Fortran's order", FILE),
    Case(EVALUATE + "--samples IN/samples/negative.npz", r"arr_0 is uint8 \[-8, 32, 32, 3\]", FILE),
    Case(EVALUATE + "--samples IN/samples/overflowing.npz", "which is 14167099448608935641088 bytes", FILE),
    Case(EVALUATE + "--samples IN/samples/larger-than-it-is.npz", "is 27648 bytes, and it holds 24576", FILE),
    Case(EVALUATE + "--samples IN/samples/flat-bomb.npz", "its images are 1048576x1, at most 4096 are taken", FILE),
    Case(EVALUATE + "--samples IN/samples/encrypted.npz", "encrypted", FILE),
    Case(EVALUATE + "--samples IN/samples/unknown-compression.npz", "compression", FILE),
    *(
        Case(f"{EVALUATE} --samples IN/samples/whole.npz --reference IN/samples/statistics-of-{name}.npz", says, FILE)
        for name, says in (
            ("1e300", "values that are not finite, or past any feature's"),
            ("nan", "values that are not finite"),
            ("complex", "complex128 and float64, no numbers"),
            ("text", "<U1 and float64, no numbers"),
        )
    ),
    *(
        Case(f"{command}IN/samples/{name}", r"manifest\.json is damaged", code)
        for name in ("nested", "no-manifest", "a-list")
        for command, code in ((EVALUATE + "--samples ", FILE), ("generate --model tiny --num 2 --out ", USAGE))
    ),
    Case(ALIGN + "--reward leaving_reward:reward", "SystemExit: 0 .*leaving_reward.py, line 2", USAGE),
    Case(ALIGN + "--reward broken_reward:reward", r"SyntaxError: expected ':' \(.*broken_reward.py, line 1\)", USAGE),
    Case(ALIGN + "--reward failing_reward:reward", "IndexError: .*failing_reward.py, line 2", FAILED),
    Case(ALIGN + "--reward quitting_reward:reward", "SystemExit: 0 .*quitting_reward.py, line 2", FAILED),
    Case(ALIGN + "--reward not_a_number_reward:reward", r"is not finite \(stage reward\)", FAILED),
    Case(
        ALIGN + "--reward whole_numbers_reward:reward",
        r"must return a floating-point tensor \[4\].*int64 \[4\]",
        FAILED,
    ),
    Case(ALIGN + "--reward truth_reward:reward", r"must return a floating-point tensor \[4\].*got bool \[4\]", FAILED),
    Case(ALIGN + "--reward imaginary_reward:reward", r"must return a floating-point.*got complex64 \[4\]", FAILED),
    Case(ALIGN + "--reward of_a_wrong_shape_reward:reward", r"must return a floating-point.*got float32 \[\]", FAILED),
    Case(ALIGN + "--reward clip:high", r"--reward clip:high: the weight of clip must be a number, got 'high'", USAGE),
    Case(ALIGN + "--reward aesthetic:2", r"--reward aesthetic:2: unknown, expected pixel, classifier, clip, ", USAGE),
    Case(ALIGN + "--reward pixel:0.5,failing_reward:reward:2", "IndexError: .*failing_reward.py, line 2", FAILED),
    Case(ALIGN + "--reward pixel:0.5,classifier:2 --advantage each", "aligned"),
    Case(ALIGN + "--lr 1e300", "--lr must be finite and less than 2^63".replace("^", r"\^"), USAGE),
    Case(ALIGN + "--lr 9e18 --steps 2", r"is not finite \(stage .*the weights up to step 1 are in", FAILED),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"^(\w+) .*?IN/|^(\w+) .*OUT ", r"\1\2 ", case.line))
def test_a_command_is_right_or_says_what_is_wrong(
    case: Case, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made / "rewards")
    monkeypatch.syspath_prepend(made / "rewards")
    before = there(made)
    out = tmp_path / "out"
    name, *line = case.line.replace("OUT", str(out)).replace("IN", str(made)).split()
    parser = argparse.ArgumentParser()
    cli.add_command_flags(parser, name)
    assert getattr(commands, f"{name}_main")(parser.parse_args(line)) == case.code
    printed = capsys.readouterr()
    assert re.search(case.says, printed.out + printed.err, re.DOTALL if case.code == 0 else 0)
    assert there(made) == before
    if case.code:
        errors = [text for text in printed.err.splitlines() if "vapi-fast: error: " in text]
        assert len(errors) == 1
        assert errors[0].isprintable()
        assert "Traceback" not in printed.err
        results = {path.name for path in out.glob("*")} if out.is_dir() else set()
        began = case.code == FAILED or "not-finite" in case.line  # images are decoded when their step comes
        assert results <= ({"progress.jsonl", "tensorboard", "snapshots"} if began else set())
    elif name == "align":
        assert all(weight.isfinite().all() for weight in torch.load(out / "aligned.pt").values())
        assert json.loads((out / "run.json").read_text())["curves"]["loss"]
    elif name == "generate":
        assert np.asarray(Image.open(out / "images" / "000001.png")).std() > 5
    else:
        assert 0 < json.loads(out.read_text())["fid"] < 1000


def there(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of all files."""
    found = {
        str(path): path.lstat() for path in folder.rglob("*") if "__pycache__" not in path.parts and path.is_file()
    }
    return {path: (about.st_size, about.st_mtime_ns) for path, about in found.items()}
