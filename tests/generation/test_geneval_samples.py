"""`generate --format geneval`: GenEval's folders and settings, restarts, several processes, and the scorers on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inputs import clip, text_encoder
from PIL import Image
from processes import on_two_ranks
from test_samples import contents, draw_noted

from vapi_fast import generate, tiny
from vapi_fast.data import geneval
from vapi_fast.data.geneval import Clause, Prompt
from vapi_fast.data.image_sets import open_image_set
from vapi_fast.data.pictures import CAPTION_HEIGHT, GAP, MARGIN, SHEET_GAP
from vapi_fast.data.text import TextEncoder
from vapi_fast.evaluation.config import GenevalConfig
from vapi_fast.evaluation.geneval import evaluate_geneval
from vapi_fast.generation.config import GenerateConfig
from vapi_fast.generation.folder import draw_samples
from vapi_fast.models import LlamaGen, VQTokenizer
from vapi_fast.runtime.checkpoint import save_generator
from vapi_fast.runtime.errors import ConfigError

PROMPTS = [
    Prompt("counting", "a photo of two dogs", (Clause("dog", 2),), (Clause("dog", 3),)),
    Prompt("colors", "a photo of a red cup", (Clause("cup", 1, "red"),)),
    Prompt("two_object", "a photo of a cat and a table", (Clause("cat", 1), Clause("dining table", 1))),
]
TEXTS = [each.text for each in PROMPTS]
EACH = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of captions, another one, their text encoder, a CLIP and prompts."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("text", "other")):
        torch.manual_seed(seed)
        model = LlamaGen.from_name("tiny", caption_tokens=9, caption_width=16)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        save_generator(folder / f"{name}.pt", model.state_dict())
    text_encoder(folder / "encoder")
    clip(folder / "clip")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(each.to_json()) + "\n" for each in PROMPTS))
    return folder


def options(files: Path, **changes: Any) -> dict[str, Any]:
    named = {"gpt_ckpt": files / "text.pt", "text_encoder": str(files / "encoder"), "prompts": files / "prompts.jsonl"}
    return {"model": "tiny", "format": "geneval", "num": EACH, "batch_size": 4, "seed": 5} | named | changes


def config(files: Path, out: Path, **changes: Any) -> GenerateConfig:
    given = {name: value for name, value in options(files, **changes).items() if value is not None}
    return GenerateConfig(out=out, **given)


@pytest.fixture(scope="module")
def drawn(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("samples") / "out"
    draw_samples(config(files, out, compare_ckpt=files / "other.pt"))
    return out


def image(out: Path, prompt: int, number: int) -> np.ndarray:
    return np.asarray(Image.open(out / f"0000{prompt}/samples/000{number}.png"))


def test_genevals_settings_are_the_defaults(files: Path, tmp_path: Path) -> None:
    official = config(files, tmp_path, num=None)
    assert (official.num, official.cfg_scale, official.top_k, official.temperature) == (4, 7.5, 2000, 1.0)
    assert official.count == 12
    given = config(files, tmp_path, num=3, cfg_scale=1.5, top_k=7)
    assert (given.num, given.cfg_scale, given.top_k, given.count) == (3, 1.5, 7, 9)
    plain = config(files, tmp_path, format=None, num=None)
    assert (plain.format, plain.num, plain.count, plain.cfg_scale, plain.top_k) == ("png", 3, 3, 1.0, 0)
    assert plain.texts == official.texts == tuple(TEXTS)


def test_the_folder_has_genevals_layout(files: Path, drawn: Path) -> None:
    """Sample i is of prompt i mod N, drawn as the library draws it; each prompt's line stands beside its images."""
    assert sorted(contents(drawn)) == sorted(
        [
            *(f"0000{prompt}/samples/000{number}.png" for prompt in range(3) for number in range(EACH)),
            *(f"0000{prompt}/metadata.jsonl" for prompt in range(3)),
            *("manifest.json", "contact_sheet.png", "comparison.png"),
        ]
    )
    for prompt, asked in enumerate(PROMPTS):
        assert json.loads((drawn / f"0000{prompt}/metadata.jsonl").read_text()) == asked.to_json()
    features, mask = TextEncoder(str(files / "encoder"), torch.device("cpu")).encode(TEXTS, 9)
    rows = torch.arange(3 * EACH) % 3
    model = LlamaGen.from_checkpoint(files / "text.pt", "tiny").eval()
    tokens = generate(model, features[rows], seed=5, condition_mask=mask[rows], cfg_scale=7.5, top_k=2000)
    with torch.no_grad():
        expected = VQTokenizer.from_checkpoint(tiny.FILES.tokenizer, "tiny").decode(tokens)
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    images = [image(drawn, index % 3, index // 3) for index in range(3 * EACH)]
    assert len({each.tobytes() for each in images}) == 3 * EACH
    assert np.abs(np.stack(images) - expected).max() <= 1
    manifest = json.loads((drawn / "manifest.json").read_text())
    assert manifest["images"][4] == {
        "id": 4,
        "file": "00001/samples/0001.png",
        "caption": 1,
        "prompt": "a photo of a red cup",
        "seed": 5,
    }
    assert manifest["files"]["captions"]["name"] == "prompts.jsonl"


def test_what_was_drawn_is_known_to_the_scorers(drawn: Path, tmp_path: Path) -> None:
    """As images with their captions by the manifest, and without it by GenEval's metadata."""
    listed = open_image_set(drawn, 32)
    assert listed.captions == tuple(TEXTS * EACH)
    pixels = torch.cat(list(listed.batches(0, 6, 4)))
    assert (pixels[4].permute(1, 2, 0).numpy() == image(drawn, 1, 1)).all()
    shutil.copytree(drawn, tmp_path / "bare", ignore=shutil.ignore_patterns("manifest.json"))
    bare = open_image_set(tmp_path / "bare", 32)
    assert bare.captions == tuple(text for text in TEXTS for _ in range(EACH))
    assert torch.equal(torch.cat(list(bare.batches(0, 6, 6))), pixels[[0, 3, 1, 4, 2, 5]])


def objects(*names: str, color: str | None = None) -> list[dict[str, Any]]:
    return [
        {"class": name, "score": 0.95, "box": [3, 3, 20, 20]} | ({"color": color} if color else {}) for name in names
    ]


def detections(path: Path) -> Path:
    """Three dogs in one of two images, a blue cup in one of two, and all that is asked for."""
    found = [
        *(objects("dog", "dog"), objects("dog", "dog", "dog")),
        *(objects("cup", color="red"), objects("cup", color="blue")),
        *[objects("cat", "dining table")] * 2,
    ]
    names = [f"0000{prompt}/samples/000{number}.png" for prompt in range(3) for number in range(EACH)]
    lines = [json.dumps({"image": name, "objects": each}) for name, each in zip(names, found, strict=True)]
    path.write_text("\n".join(lines))
    return path


def test_geneval_scores_the_folder_as_it_is(files: Path, drawn: Path, tmp_path: Path) -> None:
    out = shutil.copytree(drawn, tmp_path / "out")
    report = evaluate_geneval(GenevalConfig(samples=out, detections=detections(tmp_path / "found.jsonl")))
    assert {task: each.score for task, each in report.tasks.items()} == {
        "counting": 0.5,
        "colors": 0.5,
        "two_object": 1.0,
    }
    assert report.overall == pytest.approx(2 / 3)
    before = contents(out)
    draw_samples(config(files, out))  # there is nothing to do, and the scores do not stand in its way
    assert contents(out) == before


def test_sheets_have_a_prompt_a_row(drawn: Path) -> None:
    """Of two generators side by side an image has the same place on both."""
    sheet = np.asarray(Image.open(drawn / "contact_sheet.png").convert("RGB")).astype(int)
    both = np.asarray(Image.open(drawn / "comparison.png").convert("RGB")).astype(int)
    step, width = 96 + GAP, EACH * (96 + GAP) - GAP
    assert sheet.shape[:2] == (2 * MARGIN + 3 * (step + CAPTION_HEIGHT) - GAP, 2 * MARGIN + width)
    assert both.shape[1] == 2 * (MARGIN + width) + SHEET_GAP
    header = both.shape[0] - sheet.shape[0]
    for prompt in range(3):
        top = MARGIN + prompt * (step + CAPTION_HEIGHT) + CAPTION_HEIGHT
        label = sheet[top - CAPTION_HEIGHT : top, MARGIN : MARGIN + width]
        middle = label[:, 96 : 96 + GAP]  # one label over the row: it crosses the gap
        assert label.min() < 100
        for number in range(EACH):
            left = MARGIN + number * step
            expected = image(drawn, prompt, number)
            assert (sheet[top : top + 96 : 3, left : left + 96 : 3] == expected).all()
            base, other = (
                both[header + top :][:96:3, start : start + 96 : 3] for start in (left, left + width + SHEET_GAP)
            )
            assert np.abs(base - expected).max() <= 1
            assert np.abs(other - expected).max() > 100
        assert prompt != 2 or middle.min() < 200  # the longest
        assert (both[header + top - CAPTION_HEIGHT :][:CAPTION_HEIGHT, : MARGIN + width] < 100).any()
        assert (both[header + top - CAPTION_HEIGHT :][:CAPTION_HEIGHT, MARGIN + width + SHEET_GAP :] < 100).any()


def test_an_interrupted_run_is_finished_by_the_same_command(files: Path, drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draw_noted(config(files, out), batches=1)
    assert not list(out.rglob("metadata.jsonl"))  # it cannot be scored yet
    (out / "00002/samples/0000.png").write_bytes(b"cut")
    (out / "00001/samples/.0001.png.x1.tmp.png").write_bytes(b"half")
    assert draw_noted(config(files, out)) == [[2, 4, 5]]
    expected = contents(drawn)
    expected.pop("comparison.png")
    assert contents(out) == expected
    with pytest.raises(ConfigError, match=r"holds samples of another run \(num is 2 there, 3 now\)"):
        draw_samples(config(files, out, num=3))


@pytest.mark.usefixtures("image_sets")
def test_two_ranks_give_the_same_files_and_scores_as_one(files: Path, drawn: Path, tmp_path: Path) -> None:
    from vapi_fast.evaluation.scoring import EvaluateConfig, evaluate

    out = tmp_path / "out"
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options(files).items())
    lines = [
        f"generate {flags.replace('--num ', '--num-images ')} --out {out}",
        f"geneval --samples {out} --detections {detections(tmp_path / 'found.jsonl')} --output {tmp_path / 'geneval'}",
        f"evaluate --model tiny --samples {out} --clip-score --clip-network {files / 'clip'} --output {tmp_path / 'a'}",
    ]
    printed = on_two_ranks(tmp_path, *lines)
    expected = contents(drawn)
    expected.pop("comparison.png")
    assert contents(out) == expected
    assert json.loads((tmp_path / "geneval" / "scores.json").read_text())["overall"] == pytest.approx(2 / 3)
    with pytest.warns(UserWarning, match="FID from 6 samples"):
        report = evaluate(
            EvaluateConfig(model="tiny", samples=drawn, clip_score=True, clip_network=str(files / "clip"))
        )
    scores = json.loads((tmp_path / "a").read_text())
    assert scores["clip_score"] == pytest.approx(report.clip_score, rel=1e-5)
    assert scores["clip_score_se"] == pytest.approx(report.clip_score_se, rel=1e-3)
    assert printed.count("CLIP score  ") == 1


def test_its_own_prompts_by_name(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched before anything is read, and then a file as any other; offline is one line."""
    monkeypatch.setattr(geneval, "PROMPTS_URL", (tmp_path / "absent.jsonl").as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match=r"^--prompts geneval: its prompts cannot be downloaded \(.*absent") as told:
        config(files, tmp_path / "out", prompts="geneval", format=None)
    assert "pass it as --prompts FILE --format geneval, or put it at" in str(told.value)
    cached = tmp_path / "hub" / "checkpoints" / f"geneval-{geneval.PROMPTS_SHA256[:8]}.jsonl"
    shutil.copy(files / "prompts.jsonl", cached)
    found = config(files, tmp_path / "out", prompts="geneval", format=None, num=None)
    assert (found.prompts, found.format, found.count, found.cfg_scale) == (cached, "geneval", 12, 7.5)
    plain = config(files, tmp_path / "out", prompts=Path("geneval"), format="npz", num=None)
    assert (plain.format, plain.count, plain.cfg_scale, plain.texts) == ("npz", 3, 1.0, tuple(TEXTS))


def test_what_cannot_be_drawn_for_it(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "lines.txt").write_text("a photo of a cup\n")
    (tmp_path / "other.jsonl").write_text((files / "prompts.jsonl").read_text() + '{"prompt": "a cup"}\n')
    for changes, message in (
        ({"prompts": tmp_path / "lines.txt"}, r"^--prompts .*lines\.txt, line 1: no prompt of GenEval's: Expecting"),
        ({"prompts": tmp_path / "other.jsonl"}, r"other\.jsonl, line 4: no prompt of GenEval's: has the tag None"),
        ({"prompts": None}, "^--format geneval is for --prompts geneval, or --prompts FILE of that kind: pass one"),
        ({"prompts": None, "prompt": "a cup"}, "^--format geneval is for --prompts geneval, or"),
        ({"num": 4_000_000}, "^--num 4000000: of 3 prompts, at most 10000000 images are drawn"),
        ({"num": 0}, "^--num must be between 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(files, out, **changes)
    with pytest.raises(ConfigError, match=r"^--prompts: this checkpoint is conditioned on classes"):
        draw_samples(config(files, out, gpt_ckpt=tiny.FILES.generator))
    assert not out.exists()
