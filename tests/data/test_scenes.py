"""Scenes of the text presets: prompts, what is held out, where objects lie, how they are painted; their words."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from vapi_fast import tiny
from vapi_fast.data import scenes
from vapi_fast.data.geneval import COLORS, TASKS, Clause, Prompt
from vapi_fast.data.scenes import PAINTS, SIDE, SPRITE, Sprites, Thing
from vapi_fast.data.text import text_encoder
from vapi_fast.data.words import POSITION, WordVectors
from vapi_fast.evaluation.geneval_detections import Found
from vapi_fast.evaluation.geneval_rules import counting, judge
from vapi_fast.evaluation.scene_detector import cell_box
from vapi_fast.runtime.errors import CheckpointError, DataError


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    draw = random.Random(0)
    return [scenes.drawn_prompt(draw, "trained") for _ in range(600)]


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    """Discs, dark in the middle."""
    glyph = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    drawing = ImageDraw.Draw(glyph)
    drawing.ellipse((0, 0, 59, 59), fill=(250, 200, 90, 255))
    drawing.ellipse((20, 20, 39, 39), fill=(90, 60, 30, 255))
    return Sprites.of([glyph] * len(scenes.KINDS))


def test_prompts_are_of_all_tasks_and_read_back_from_their_text(prompts: list[Prompt]) -> None:
    heldout = scenes.measured_prompts(72, seed=1)
    for prompt in prompts + heldout:
        assert scenes.parse(prompt.text) == prompt
    assert {prompt.tag for prompt in prompts} == set(TASKS)
    assert min(Counter(prompt.tag for prompt in prompts).values()) > 60
    assert len(set(heldout)) == len(heldout)


@pytest.mark.parametrize(
    "caption", ["a photo of a unicorn", "an apple", "a photo of a red apple and a cat", "a photo of five cats", ""]
)
def test_other_captions_are_none_of_a_scene(caption: str) -> None:
    with pytest.raises(ValueError, match="no caption of a scene"):
        scenes.parse(caption)


def test_what_is_measured_on_is_neither_trained_nor_aligned_on(prompts: list[Prompt]) -> None:
    draw = random.Random(2)
    aligned = [scenes.drawn_prompt(draw, "aligned") for _ in range(600)]
    seen = [{each for prompt in part for each in scenes.combinations(prompt)} for part in (prompts, aligned)]
    several = [[prompt for prompt in part if prompt.tag != "single_object"] for part in (prompts, aligned)]
    measured = [prompt for prompt in scenes.measured_prompts(72, seed=1) if prompt.tag != "single_object"]
    for prompt in measured:
        assert set(scenes.combinations(prompt)) - seen[0] - seen[1], prompt.text
    for prompt in several[1]:
        assert set(scenes.combinations(prompt)) - seen[0], prompt.text
    for part, found in (("trained", several[0]), ("aligned", several[1]), ("measured", measured)):
        assert {scenes.part_of(prompt) for prompt in found} == {part}
    every = [scenes.part_of(scenes.parse(f"a photo of a {color} {kind}")) for color in COLORS for kind in scenes.KINDS]
    shares = {part: count / len(every) for part, count in Counter(every).items()}
    assert shares == pytest.approx({"trained": 3 / 4, "aligned": 1 / 8, "measured": 1 / 8}, abs=0.04)


def test_objects_lie_as_the_rules_ask(prompts: list[Prompt]) -> None:
    """What is arranged for a prompt is right by GenEval's own rules, if each object is found in its cell."""
    draw = random.Random(1)
    for prompt in prompts:
        things = scenes.arrange(prompt, draw)
        assert len({thing.cell for thing in things}) == len(things)
        found = [Found(thing.kind, 1.0, cell_box(thing.cell), thing.color) for thing in things]
        verdict = judge(prompt, counting(found, prompt.tag))
        assert verdict.correct, (prompt.text, things, verdict)


def test_objects_are_painted_where_they_are(sprites: Sprites) -> None:
    for cell in range(4):
        image = scenes.render([Thing("cat", "blue", cell)], sprites, random.Random(cell)).astype(int)
        there = (image != scenes.BACKGROUND).any(2)
        rows, columns = np.nonzero(there)
        top, left = cell // 2 * SIDE, cell % 2 * SIDE
        assert top <= rows.min() <= rows.max() < top + SIDE
        assert left <= columns.min() <= columns.max() < left + SIDE
        assert SPRITE - 1 <= np.ptp(rows) + 1 <= SPRITE
        assert (image[there][:, 2] > image[there][:, 0]).mean() > 0.9  # blue


def test_colors_are_told_apart_and_shading_stays(sprites: Sprites) -> None:
    middle, edge = sprites.colors[0, :, 7, 7], sprites.colors[0, :, 7, 2]
    assert (middle.mean(1) < edge.mean(1)).all()  # dark parts stay darker in every color
    mean = sprites.colors[0, :, 3:12, 2:4].mean((1, 2))
    distances = np.linalg.norm(mean[:, None] - mean[None], axis=2) + np.eye(len(PAINTS))
    assert distances[1:, 1:].min() > 0.15
    assert 0 <= sprites.colors.min() <= sprites.colors.max() <= 1


def test_words_are_those_of_all_captions(prompts: list[Prompt]) -> None:
    known = set(scenes.words())
    used = {word for prompt in prompts + scenes.measured_prompts(72, 1) for word in prompt.text.split()}
    assert used <= known
    assert len(known - used) < 12  # rare plurals
    encoder = WordVectors(tiny.TEXT_FILES.words)
    assert set(encoder.rows) == known


def test_states_are_words_with_what_stands_before_them() -> None:
    encoder = text_encoder(str(tiny.TEXT_FILES.words), torch.device("cpu"))
    assert isinstance(encoder, WordVectors)
    size = (encoder.width - POSITION) // 2
    one, other = encoder.states(["a photo of a red apple and a blue car", "a red car"], 12)
    assert one.shape == (10, encoder.width)
    assert torch.equal(one[5, :size], encoder.vectors[encoder.rows["apple"]])
    assert torch.equal(one[5, size : 2 * size], encoder.vectors[encoder.rows["red"]])
    assert torch.equal(one[0, size : 2 * size], torch.zeros(size))
    assert torch.equal(one[:3, 2 * size :], other[:, 2 * size :])  # places alone
    assert not torch.equal(one[0, 2 * size :], one[1, 2 * size :])
    (cut,) = encoder.states(["a photo of a red apple"], 3)
    assert torch.equal(cut, one[:3])


def test_a_word_without_a_vector_is_named() -> None:
    with pytest.raises(DataError, match="'unicorn' is none of the 70 words"):
        list(WordVectors(tiny.TEXT_FILES.words).states(["a photo of a unicorn"], 12))


def test_another_file_is_no_table_of_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a table of words' vectors"):
        WordVectors(tiny.FILES.perceptual)
    save_file({"vectors": torch.zeros(3, 4)}, tmp_path / "words.safetensors", {"words": '["a"]'})
    with pytest.raises(CheckpointError, match="not a table of words' vectors"):
        WordVectors(tmp_path / "words.safetensors")


def test_clause_of_a_position_refers_to_the_other() -> None:
    prompt = scenes.parse("a photo of a cat left of a dog")
    assert prompt.include == (Clause("dog", 1), Clause("cat", 1, position=("left of", 0)))
    for seed in range(8):
        dog, cat = scenes.arrange(prompt, random.Random(seed))
        assert (dog.kind, cat.kind) == ("dog", "cat")
        assert (cat.cell, dog.cell) in {(0, 1), (2, 3)}
