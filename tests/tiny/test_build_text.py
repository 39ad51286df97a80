"""The preset tiny-text that ships: its scenes, networks, sizes, and that its build makes them."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from vapi_fast import ops, tiny
from vapi_fast.data import scenes
from vapi_fast.data.geneval import COLORS, NUMBERS, TASKS, Clause, Prompt, parse_prompt
from vapi_fast.data.prompt_tokens import PromptTokens
from vapi_fast.data.prompts import read_prompts
from vapi_fast.data.scenes import KINDS
from vapi_fast.data.text import padded
from vapi_fast.data.words import WordVectors
from vapi_fast.evaluation.config import GenevalConfig
from vapi_fast.evaluation.geneval import evaluate_geneval
from vapi_fast.evaluation.scene_detector import SceneDetector
from vapi_fast.evaluation.scene_judge import SceneJudge
from vapi_fast.generation.config import GenerateConfig
from vapi_fast.generation.folder import draw_samples
from vapi_fast.models import LPIPS, Generator, Janus, LlamaGen, VQTokenizer
from vapi_fast.runtime.errors import DataError, Error
from vapi_fast.tiny import TEXT_FILES, images
from vapi_fast.tiny.training import build_parts

needs_font = pytest.mark.skipif(not images.FONT.exists(), reason="Debian's emoji font not installed")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    pytest.importorskip("datasets")
    return importlib.import_module("vapi_fast.tiny.build_text")


@pytest.fixture(scope="module")
def heldout(build: ModuleType) -> tuple[list[str], torch.Tensor]:
    """Captions and images as shipped."""
    return build.load_scenes(TEXT_FILES.heldout_images)


def test_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in TEXT_FILES[:-1]) <= 14e6
    assert sum(path.stat().st_size for path in TEXT_FILES.janus.iterdir()) <= 12e6


def test_scenes_are_four_samples_of_each_prompt_with_half_as_many_pictures(
    build: ModuleType, heldout: tuple[list[str], torch.Tensor]
) -> None:
    prompts = read_prompts(TEXT_FILES.prompts, parse_prompt)
    assert {prompt.tag for prompt in prompts} == set(TASKS)
    assert heldout[0] == [prompt.text for prompt in prompts] * 2
    captions, pixels = build.load_scenes(TEXT_FILES.train_images)
    parts = {scenes.part_of(scenes.parse(caption)) for caption in captions if scenes.parse(caption).tag != TASKS[0]}
    assert parts == {"aligned"}
    assert len(pixels) == 1280  # forty steps of 32
    assert {scenes.parse(caption).tag for caption in captions} == set(TASKS)


def test_detector_judges_real_scenes_right(heldout: tuple[list[str], torch.Tensor]) -> None:
    """The real images are right by the rules, at least 98 of a hundred; of others' captions hardly one is."""
    captions, pixels = heldout
    judge = SceneJudge.of(captions, torch.device("cpu"))
    assert judge is not None
    right = judge.correct(pixels, torch.arange(len(pixels)))
    assert sum(correct for _, correct in right) / len(right) >= 0.98
    wrong = judge.correct(pixels.roll(1, 0), torch.arange(len(pixels)))
    assert sum(correct for _, correct in wrong) / len(wrong) < 0.05
    found = SceneDetector.from_checkpoint(TEXT_FILES.detector).objects(torch.ones(1, 3, 32, 32) * 0.6)
    assert found == [[]]  # nothing


def test_judge_groups_the_samples_of_a_prompt() -> None:
    captions = ["a photo of a cat", "a photo of two dogs", "a photo of a cat"]
    judge = SceneJudge.of(captions, torch.device("cpu"))
    assert judge is not None
    scores = judge.scores([(0, True), (1, False), (2, False), (3, True), (4, True), (5, True)])
    assert scores.tasks["single_object"].images == 4
    assert scores.tasks["single_object"].prompts == 1
    assert scores.tasks["single_object"].score == 0.75
    assert scores.overall == (0.75 + 0.5) / 2
    assert SceneJudge.of([*captions, "whatever else"], torch.device("cpu")) is None


def test_tokenizer_keeps_what_scenes_show(heldout: tuple[list[str], torch.Tensor]) -> None:
    """A decoded image is still right for most prompts, of which most have colors that it was not trained on either."""
    captions, pixels = (each[: len(heldout[0]) // 2] for each in heldout)  # once each
    tokenizer = VQTokenizer.from_checkpoint(TEXT_FILES.tokenizer, "scenes")
    judge = SceneJudge.of(captions, torch.device("cpu"))
    assert judge is not None
    with torch.no_grad():
        tokens = tokenizer.encode(pixels)
        decoded = tokenizer.decode(tokens).clamp(-1, 1)
    assert tokens.shape == (len(captions), 64)
    right = judge.correct(decoded, torch.arange(len(captions)))
    assert sum(correct for _, correct in right) / len(captions) > 0.85
    assert (decoded - pixels).square().mean() < 0.02


def of_captions(captions: list[str]) -> dict[str, torch.Tensor]:
    features, mask = padded(list(WordVectors(TEXT_FILES.words).states(captions, 12)), 12)
    return {"condition": features, "condition_mask": mask}


def prompt_tokens(model: Janus) -> PromptTokens:
    _, _, bos, begin_image = model.config.condition
    return PromptTokens(TEXT_FILES.janus, model.config.prompt_tokens, bos=bos, begin_image=begin_image)


@pytest.mark.parametrize("name", ["tiny-text", "tiny-janus"])
def test_generator_reads_captions(name: str, heldout: tuple[list[str], torch.Tensor]) -> None:
    """Held-out tokens are likelier under their own captions than under those of other images."""
    captions, pixels = heldout[0][:128], heldout[1][:128]
    tokenizer = VQTokenizer.from_checkpoint(TEXT_FILES.tokenizer, "scenes")
    if name == "tiny-text":
        generator: Generator = LlamaGen.from_checkpoint(TEXT_FILES.generator, name).eval()
        given = of_captions(captions)
    else:
        generator = Janus.from_checkpoint(TEXT_FILES.janus, name).eval()
        prompts = [prompt_tokens(generator).ids(caption) for caption in captions]
        rows, mask = padded(prompts, max(map(len, prompts)))
        given = {"condition": rows, "condition_mask": mask}
    with torch.no_grad():
        tokens = tokenizer.encode(pixels)
        own, others = (
            ops.linear_cross_entropy(
                **generator.head.operands(
                    generator(
                        tokens[:, :-1], **{key: value.roll(by, 0) for key, value in given.items()}, return_hidden=True
                    )
                ),
                targets=tokens,
            )
            for by in (0, 1)
        )
    assert own < 2  # uniform: ln 512 = 6.24
    assert others > own + 0.3


def test_janus_writes_prompts_and_refuses_other_words() -> None:
    """What is written after "a photo of" is a caption's word nearly always; of seventy one would be right by chance."""
    model = Janus.from_checkpoint(TEXT_FILES.janus, "tiny-janus").eval()
    tokens, head = prompt_tokens(model), model.language_head(TEXT_FILES.janus)
    assert head is not None
    ids = tokens.ids("a photo of two cats")[:-1]
    with torch.no_grad():
        probabilities = (model.text_states(ids[None])[0] @ head.float().T).softmax(-1)
    of = ids.tolist().index(tokens.tokenizer.token_to_id("of"))
    words = {*KINDS, *COLORS, *NUMBERS, "a", "an"}
    assert sum(probabilities[of, tokens.tokenizer.token_to_id(word)] for word in words) > 0.9
    with pytest.raises(DataError, match=r"a photo of a zebra.*has a word that"):
        tokens.ids("a photo of a zebra")


def test_scenes_are_drawn_and_scored_by_name(tmp_path: Path) -> None:
    """`generate --prompts geneval` draws the preset's own prompts, here of two tasks, and its detector judges them."""
    prompts = read_prompts(TEXT_FILES.prompts, parse_prompt)
    assert GenerateConfig(model="tiny-text", prompts="geneval", out=tmp_path / "all").geneval_prompts == prompts
    wanted = [prompt for prompt in prompts if prompt.tag in ("single_object", "colors")][16:32]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(prompt.to_json()) + "\n" for prompt in wanted))
    config = GenerateConfig(
        model="tiny-text", prompts=tmp_path / "some.jsonl", format="geneval", num=2, out=tmp_path / "out"
    )
    assert (config.cfg_scale, config.top_k) == (2, 0)
    draw_samples(config)
    report = evaluate_geneval(GenevalConfig(samples=tmp_path / "out", detector="tiny-text"))
    assert report is not None
    assert report.tasks["single_object"].images == 16
    assert report.tasks["single_object"].score > 0.4  # most single objects are right, colors that are held out fewer
    assert report.tasks["colors"].score < report.tasks["single_object"].score
    found = (tmp_path / "out" / "geneval" / "detections.jsonl").read_text()
    (tmp_path / "colorless.jsonl").write_text(re.sub(r', "color": "\w+"', "", found))
    again = GenevalConfig(samples=tmp_path / "out", detections=tmp_path / "colorless.jsonl", output=tmp_path / "b")
    with pytest.raises(Error, match=r"open-clip-torch|CLIP"):  # as of objects in their own colors
        evaluate_geneval(again)


def test_other_images_and_prompts_are_none_of_the_detector_s(tmp_path: Path) -> None:
    def sample(name: str, size: int, folder: str) -> GenevalConfig:
        place = tmp_path / folder / "00000" / "samples"
        place.mkdir(parents=True)
        Image.new("RGB", (size, size)).save(place / "0000.png")
        line = json.dumps(Prompt("single_object", f"a photo of a {name}", (Clause(name, 1),)).to_json())
        (place.parent / "metadata.jsonl").write_text(line)
        return GenevalConfig(samples=tmp_path / folder, detector="tiny-text")

    with pytest.raises(DataError, match="asks for 'zebra', which is none of the 24 kinds of object that tiny-text has"):
        evaluate_geneval(sample("zebra", 32, "kind"))
    with pytest.raises(DataError, match="an image of 64x64 pixels, the detector of tiny-text takes 32x32"):
        evaluate_geneval(sample("cat", 64, "size"))


@needs_font
def test_build_makes_every_part(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few scenes and a few steps of each network: the files load, and the scenes are those that ship."""
    files = tiny.text_files(tmp_path / "text")
    tmp_path.joinpath("text").mkdir()
    build.build_scenes(files)
    for built, shipped in zip(files, TEXT_FILES, strict=True):
        if built.suffix == ".parquet":
            assert torch.equal(build.load_scenes(built)[1], build.load_scenes(shipped)[1])
    assert files.prompts.read_bytes() == TEXT_FILES.prompts.read_bytes()
    files.words.write_bytes(TEXT_FILES.words.read_bytes())
    build.train_perceptual(files, steps=3, batch_size=8)
    build.train_detector(files, steps=3, batch_size=8)
    build.train_tokenizer(files, steps=4, batch_size=8, continuous_steps=2)
    build.train_generator(files, cycles=(18, 2), batch_size=8)
    build.train_janus(files, steps=3, batch_size=8)
    assert LPIPS.from_checkpoint(files.perceptual, "scenes").classifier is not None
    assert SceneDetector.from_checkpoint(files.detector) is not None
    assert VQTokenizer.from_checkpoint(files.tokenizer, "scenes").codebook().norm(dim=1).sub(1).abs().max() < 1e-3
    assert LlamaGen.from_checkpoint(files.generator, "tiny-text").config.condition == (12, 520)
    assert Janus.from_checkpoint(files.janus, "tiny-janus").config.vocab_size == 512
    assert (files.janus / "tokenizer.json").read_bytes() == (TEXT_FILES.janus / "tokenizer.json").read_bytes()


@needs_font
def test_words_come_of_their_package(build: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("wordllama")
    build.build_words(tiny.text_files(tmp_path))
    built, shipped = (WordVectors(path) for path in (tmp_path / "words.safetensors", TEXT_FILES.words))
    assert built.rows == shipped.rows
    assert torch.equal(built.vectors, shipped.vectors)


def test_an_interrupted_build_goes_on_by_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[str, Path]] = []
    parts = {name: lambda files, name=name: done.append((name, files.words.parent)) for name in ("one", "two", "three")}
    for flags, built in (([], ["one", "two", "three"]), (["--only", "three", "two"], ["two", "three"])):
        done.clear()
        monkeypatch.setattr("sys.argv", ["build", "--output-dir", str(tmp_path / "new"), *flags])
        build_parts("build", "All of it.", parts, tiny.text_files, tmp_path)
        assert done == [(name, tmp_path / "new") for name in built]
        assert re.findall(r"^(\w+): 0\.0 min$", capsys.readouterr().out, re.MULTILINE) == built
