"""GenEval: its rules one by one on made detections, and the command on a file of them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from processes import free_port

from vapi_fast import commands
from vapi_fast.data.geneval import Clause, Prompt, make_prompts
from vapi_fast.data.pictures import MAX_CELL, marked
from vapi_fast.evaluation.config import GenevalConfig
from vapi_fast.evaluation.geneval import evaluate_geneval, shown
from vapi_fast.evaluation.geneval_detections import Found, Mask, read_detections
from vapi_fast.evaluation.geneval_rules import Verdict, colorless, counting, judge, relations
from vapi_fast.evaluation.geneval_scores import Score
from vapi_fast.runtime.errors import ConfigError, DataError

BOX = (0.0, 0.0, 10.0, 10.0)


def dog(score: float = 0.95, box: tuple[float, ...] = BOX, color: str | None = None, name: str = "dog") -> Found:
    return Found(name, score, box, color)


def ask(*include: Clause, exclude: tuple[Clause, ...] = (), tag: str = "two_object") -> Prompt:
    return Prompt(tag, "a photo", include, exclude)


def verdict(prompt: Prompt, *found: Found) -> Verdict:
    return judge(prompt, counting(found, prompt.tag))


@pytest.mark.parametrize(
    ("tag", "score", "counts"),
    [("colors", 0.3, 0), ("colors", 0.301, 1), ("counting", 0.9, 0), ("counting", 0.901, 1), ("counting", 0.5, 0)],
)
def test_a_score_has_to_be_above_the_threshold(tag: str, score: float, counts: int) -> None:
    assert len(counting([dog(score)], tag).get("dog", ())) == counts


def test_at_most_sixteen_of_a_class_count_the_likeliest() -> None:
    found = [dog(0.4 + 0.01 * number) for number in range(20)]
    objects = counting([*found, dog(0.35, name="cat")], "colors")
    assert [each.score for each in objects["dog"]] == [each.score for each in found[:3:-1]]
    assert len(objects["cat"]) == 1
    assert not verdict(ask(Clause("dog", 17)), *found).correct


def test_overlapping_objects_all_count() -> None:
    assert verdict(ask(Clause("dog", 3)), *[dog()] * 3).correct


def test_each_clause_needs_its_count() -> None:
    prompt = ask(Clause("dog", 2), Clause("cat", 1))
    assert verdict(prompt, dog(), dog(), dog(name="cat")) == (True, ())
    assert verdict(prompt, dog(), dog(), dog(), dog(name="cat")).correct  # more are none too many
    assert verdict(prompt, dog()) == (False, ("1 of 2 dog", "0 of 1 cat"))


def test_what_is_excluded_fails_at_its_count() -> None:
    prompt = ask(Clause("dog", 2), exclude=(Clause("dog", 3),), tag="counting")
    assert verdict(prompt, dog(), dog()).correct
    assert verdict(prompt, dog(), dog(), dog(0.85)).correct  # below the threshold of counting
    assert verdict(prompt, dog(), dog(), dog()) == (False, ("3 dog, not 2",))
    assert not verdict(ask(Clause("dog", 1), exclude=(Clause("cat", 1),)), dog(), dog(name="cat")).correct


def test_a_color_is_judged_on_the_likeliest_objects_alone() -> None:
    prompt = ask(Clause("dog", 1, "red"), tag="colors")
    assert verdict(prompt, dog(0.9, color="red"), dog(0.8, color="blue")).correct
    assert verdict(prompt, dog(0.8, color="red"), dog(0.9, color="blue")) == (False, ("dog blue, not red",))
    two = ask(Clause("dog", 2, "red"))
    assert not verdict(two, dog(0.9, color="red"), dog(0.8, color="blue"), dog(0.7, color="red")).correct
    assert verdict(two, dog(0.9, color="red"), dog(0.8, color="red"), dog(0.7, color="blue")).correct


def test_colors_are_asked_for_where_they_decide() -> None:
    prompt = ask(Clause("dog", 2, "red"), Clause("cat", 1, "blue"), Clause("cup", 1))
    objects = counting([dog(0.9), dog(0.8, color="red"), dog(0.7), dog(0.6, name="cat"), dog(name="cup")], "colors")
    assert colorless(prompt, objects) == [("dog", 0), ("cat", 0)]
    assert colorless(prompt, counting([dog(0.9)], "colors")) == []  # one is too few, whatever its color
    same = ask(Clause("dog", 1, "red"), Clause("dog", 1, "blue"))
    assert colorless(same, counting([dog()], "colors")) == [("dog", 0)]


@pytest.mark.parametrize(
    ("offset", "there"),
    [
        ((-30, 0), {"left of"}),
        ((30, 0), {"right of"}),
        ((0, -30), {"above"}),
        ((0, 30), {"below"}),
        ((30, -30), {"right of", "above"}),
        ((-30, 30), {"left of", "below"}),
        ((2, 0), set()),  # 0.1 · (10 + 10) is taken off
        ((2.1, 0), set()),  # 0.1 of 2.1 is left: not above half of the direction
        ((4, 0), set()),  # 2 of 4: half, not above
        ((4.1, 0), {"right of"}),
        ((30, 17.9), {"right of"}),  # 15.9 of 34.9
        ((30, 20), {"right of"}),  # 18 of 36.06 is 0.4992
        ((30, 20.1), {"right of", "below"}),  # 18.1 of 36.11 is 0.5012
        ((0, 0), set()),
    ],
)
def test_positions(offset: tuple[float, float], there: set[str]) -> None:
    box = (50.0, 50.0, 60.0, 60.0)
    moved = tuple(side + offset[place % 2] for place, side in enumerate(box))
    assert relations(moved, box) == there


def test_the_boxes_sides_are_taken_off_by_axis() -> None:
    wide, small = (0.0, 0.0, 100.0, 10.0), (60.0, 20.0, 70.0, 30.0)
    # Centres (50, 5) and (65, 25): 15 − 0.1 · 110 = 4 and 20 − 0.1 · 20 = 18, of 25.
    assert relations(small, wide) == {"below"}
    assert relations(wide, small) == {"above"}


def test_a_position_holds_for_all_objects_or_fails() -> None:
    prompt = ask(Clause("cat", 1), Clause("dog", 2, position=("left of", 0)), tag="position")
    cat, near, far, behind = (
        dog(box=(left, 0.0, left + 10, 10.0), name=name)
        for left, name in ((50.0, "cat"), (20.0, "dog"), (0.0, "dog"), (90.0, "dog"))
    )
    assert verdict(prompt, cat, near, far).correct
    assert verdict(prompt, cat, near, behind) == (False, ("dog right of, not left of",))
    assert verdict(prompt, near, far) == (False, ("0 of 1 cat", "nothing for dog to be left of"))
    other = ask(Clause("cat", 1, "red"), Clause("dog", 1, position=("left of", 0)))
    assert verdict(other, cat._replace(color="blue"), near).missed == (
        "cat blue, not red",
        "nothing for dog to be left of",
    )


def test_a_mask_is_coded_as_coco_does() -> None:
    pixels = np.array([[0, 1, 1], [0, 0, 1]], dtype=bool)
    assert Mask.of(pixels).runs.tolist() == [2, 1, 1, 2]
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (5, 7), (8, 3)):
        for share in (0, 0.5, 1):
            pixels = rng.random(shape) < share
            mask = Mask.of(pixels)
            assert (mask.pixels() == pixels).all()
            assert mask.runs.sum() == pixels.size
    assert Mask.of(np.ones((2, 2), bool)).runs.tolist() == [0, 4]


def test_standard_errors_are_those_of_prompts() -> None:
    score = Score.of([[True, True], [False, False], [True, False]])
    assert (score.score, score.images, score.prompts) == (0.5, 6, 3)
    assert score.se == pytest.approx(np.std([1, 0, 0.5], ddof=1) / math.sqrt(3))
    assert Score.of([[True]]).se is None
    weighted = Score.of([[True] * 3, [False]])  # of the ratio of two sums: √(2 · (0.75² + 0.75²)) / 4
    assert (weighted.score, weighted.se) == (0.75, pytest.approx(0.375))


def test_the_sheet_shows_half_and_half_where_it_can() -> None:
    found = [number < 6 for number in range(20)]

    class Image:
        def __init__(self, number: int) -> None:
            self.number, self.verdict = number, Verdict(found[number], ())

    images = [Image(number) for number in range(20)]
    assert [each.number for each in shown(images, 8)] == [0, 1, 3, 4, 6, 9, 13, 16]
    assert [each.number for each in shown(images[:7], 5)] == [0, 1, 3, 4, 6]
    assert [each.number for each in shown(images[6:], 3)] == [6, 10, 15]


def test_a_cell_has_its_boxes_in_place() -> None:
    cell = marked(np.full((32, 64, 3), 255, np.uint8), [((32, 16, 64, 32), "x")], "none")
    assert cell.shape == (3, MAX_CELL, MAX_CELL)
    scale = MAX_CELL // 64
    assert cell[:, 3 * scale, 3 * scale].tolist() == [255] * 3
    for x, y in ((32, 24), (63.7, 24), (48, 31.7)):
        assert cell[:, int(y * scale), int(x * scale)].tolist() == [21, 128, 61]
    assert cell[:, MAX_CELL - 2, MAX_CELL - 2].tolist() == [185, 28, 28]
    assert marked(np.zeros((300, 200, 3), np.uint8), [])[:, 100, 100].tolist() == [0] * 3


PROMPTS = [
    ask(Clause("dog", 1), tag="single_object"),
    ask(Clause("dog", 2), exclude=(Clause("dog", 3),), tag="counting"),
    ask(Clause("dog", 1, "red"), tag="colors"),
    ask(Clause("cat", 1), tag="single_object"),
]
OBJECTS = {  # of the two images of each prompt, and whether they are right
    "00000/samples/0000.png": ([dog(0.4)], True),
    "00000/samples/0001.png": ([dog(0.2)], False),
    "00001/samples/0000.png": ([dog(0.95), dog(0.95, (20, 0, 30, 10))], True),
    "00001/samples/0001.png": ([dog(0.95)] * 3, False),
    "00002/samples/0000.png": ([dog(0.6, color="red")], True),
    "00002/samples/0001.png": ([dog(0.6, color="red"), dog(0.5, color="blue")], True),
    "00003/samples/0000.png": ([dog()], False),
    "00003/samples/0001.png": ([], False),
}


def line(image: str, objects: list[Found]) -> dict:
    return {
        "image": image,
        "objects": [
            {"class": each.name, "score": each.score, "box": list(each.box)}
            | ({"color": each.color} if each.color else {})
            for each in objects
        ],
    }


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    for number, prompt in enumerate(PROMPTS):
        (folder / f"{number:05d}" / "samples").mkdir(parents=True)
        (folder / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(prompt.to_json()))
    for number, name in enumerate(OBJECTS):
        Image.new("RGB", (32, 32), (20 * number, 90, 120)).save(folder / name)
    (tmp_path / "found.jsonl").write_text(
        "".join(json.dumps(line(name, found)) + "\n" for name, (found, _) in OBJECTS.items())
    )
    return folder


def test_a_file_of_detections_is_scored(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GenevalConfig(samples=samples, detections=tmp_path / "found.jsonl", batch_size=3)
    report = evaluate_geneval(config)
    assert {task: (each.score, each.images, each.prompts) for task, each in report.tasks.items()} == {
        "single_object": (0.25, 4, 2),
        "counting": (0.5, 2, 1),
        "colors": (1.0, 2, 1),
    }
    assert report.overall == pytest.approx((0.25 + 0.5 + 1) / 3)
    assert report.overall_se is None  # of two tasks there is but one prompt
    assert "single_object    0.250 ± 0.250  (2 prompts)" in str(report)
    assert "overall          0.583  (without two_object, position, color_attr)" in str(report)
    out = samples / "geneval"
    assert {path.name for path in out.iterdir()} == {"scores.json", "detections.jsonl", "contact_sheet.png"}
    scores = json.loads((out / "scores.json").read_text())
    images = {image["image"]: image for prompt in scores["prompts"] for image in prompt["images"]}
    assert {name: image["correct"] for name, image in images.items()} == {n: right for n, (_, right) in OBJECTS.items()}
    assert images["00001/samples/0001.png"]["missed"] == ["3 dog, not 2"]
    assert [prompt["score"] for prompt in scores["prompts"]] == [0.5, 0.5, 1, 0]
    assert scores["prompts"][3] | {"images": 0} == {
        "folder": "00003",
        "tag": "single_object",
        "prompt": "a photo",
        "score": 0,
        "images": 0,
    }
    assert scores["tasks"]["counting"] == {"score": 0.5, "se": None, "images": 2, "prompts": 1}
    width, height = Image.open(out / "contact_sheet.png").size
    assert width > 2 * MAX_CELL
    assert height > 3 * MAX_CELL
    # What was written can be scored again, below the threshold nothing is kept.
    again = evaluate_geneval(
        GenevalConfig(samples=samples, detections=out / "detections.jsonl", output=tmp_path / "again")
    )
    assert again.tasks == report.tasks
    assert read_detections(out / "detections.jsonl")["00000/samples/0001.png"] == []
    assert read_detections(out / "detections.jsonl")["00002/samples/0000.png"] == [dog(0.6, color="red")]
    with pytest.raises(ConfigError, match=r"--output .*geneval exists: choose another name"):
        GenevalConfig(samples=samples)


def test_all_six_tasks_have_a_standard_error(tmp_path: Path) -> None:
    names = ("dog", "cat", "cup")
    prompts, lines = make_prompts(20, 0, names), []
    for number, prompt in enumerate(prompts):
        (tmp_path / f"{number:05d}/samples").mkdir(parents=True)
        (tmp_path / f"{number:05d}/metadata.jsonl").write_text(json.dumps(prompt.to_json()))
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number:05d}/samples/0000.png")
        lines.append(line(f"{number:05d}/samples/0000.png", [dog(color="red"), dog((0.5), color="blue", name="cat")]))
    (tmp_path / "found.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = evaluate_geneval(GenevalConfig(samples=tmp_path, detections=tmp_path / "found.jsonl"))
    assert len(report.tasks) == 6
    assert report.tasks["single_object"].score == pytest.approx(2 / 3)
    assert report.tasks["counting"].score == 0
    assert report.overall == pytest.approx(np.mean([each.score for each in report.tasks.values()]))
    assert report.overall_se == pytest.approx(np.sqrt(sum(each.se**2 for each in report.tasks.values())) / 6)
    assert "without" not in str(report)


def test_two_processes_give_the_same_files(samples: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.jsonl"
    evaluate_geneval(GenevalConfig(samples=samples, detections=found, output=tmp_path / "one"))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"),
        *("-m", "vapi_fast.cli", "geneval", "--samples", samples, "--detections", found, "--output", tmp_path / "two"),
    ]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("overall          0.583") == 1
    for name in ("detections.jsonl", "contact_sheet.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


NO_DETECTIONS = [
    ("nothing", "line 9: expected an image and its objects, each with class, score and box"),
    ('{"image": "00003/samples/0001.png", "objects": []}', "line 9: .*00003/samples/0001.png is there twice"),
    ({"objects": []}, "line 9: .*KeyError: 'image'"),
    ({"image": "x"}, "line 9: .*KeyError: 'objects'"),
    ({"class": 3, "score": 0.5, "box": BOX}, "line 9: .*no class, score and box of four numbers"),
    ({"class": "dog", "score": math.nan, "box": BOX}, "line 9: .*no class, score and box of four numbers"),
    ({"class": "dog", "score": 0.5, "box": [0, 1, 2]}, "line 9: .*no class, score and box of four numbers"),
    ({"class": "dog", "score": 1.5, "box": BOX}, "line 9: .*a score outside of 0 to 1"),
    ({"class": "dog", "score": 0.5, "box": [5, 0, 1, 1]}, "line 9: .*a box whose corners are swapped"),
    ({"class": "dog", "score": 0.5, "box": BOX, "color": "teal"}, "line 9: .*the color 'teal', none of red"),
    (
        {"class": "dog", "score": 0.5, "box": BOX, "mask": {"size": [2, 2], "counts": [3]}},
        "line 9: .*a mask whose runs are not 2 × 2 pixels",
    ),
    (
        {"class": "dog", "score": 0.5, "box": BOX, "mask": {"size": [2, 2], "counts": "abc"}},
        "line 9: .*expected an image and its objects",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), NO_DETECTIONS, ids=[str(number) for number in range(len(NO_DETECTIONS))])
def test_a_file_that_is_none_of_detections_is_one_line(
    wrong: object, message: str, samples: Path, tmp_path: Path
) -> None:
    path = tmp_path / "found.jsonl"
    if isinstance(wrong, dict) and "class" in wrong:
        wrong = {"image": "x", "objects": [wrong]}
    path.write_text(path.read_text() + (wrong if isinstance(wrong, str) else json.dumps(wrong)) + "\n")
    with pytest.raises(DataError, match=f"--detections .*{message}") as caught:
        evaluate_geneval(GenevalConfig(samples=samples, detections=path))
    assert "\n" not in str(caught.value)
    assert not (samples / "geneval").exists()


def test_an_image_without_a_line_is_named(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    with pytest.raises(DataError, match=r"has no line for 00003/samples/0000\.png and 1 other images"):
        evaluate_geneval(GenevalConfig(samples=samples, detections=path))


def test_a_damaged_image_is_named(samples: Path, tmp_path: Path) -> None:
    (samples / "00002/samples/0001.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cannot read .*00002/samples/0001\.png"):
        evaluate_geneval(GenevalConfig(samples=samples, detections=tmp_path / "found.jsonl"))
    assert not (samples / "geneval").exists()


@pytest.mark.parametrize(
    ("detections", "packages"),
    [(False, "transformers and scipy and open-clip-torch"), (True, "open-clip-torch")],
)
def test_missing_packages_are_named_in_one_line(
    detections: bool,
    packages: str,
    samples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Callable[..., int],
) -> None:
    missing = {"transformers", "scipy", "open_clip"}
    monkeypatch.setattr("vapi_fast.runtime.packages.installed", lambda module: module not in missing)
    path = tmp_path / "found.jsonl"
    path.write_text(path.read_text().replace(', "color": "red"', ""))
    assert run("--samples", samples, *(("--detections", path) if detections else ())) == 2
    pip = packages.replace(" and ", " ")
    said = f"scoring by GenEval needs {packages}, not installed here: pip install {pip}\n"
    assert capsys.readouterr().err == f"vapi-fast: error: {said}"
    assert not (samples / "geneval").exists()


def test_a_class_that_no_detector_knows(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vapi_fast.runtime.packages.installed", lambda module: True)
    prompt = ask(Clause("smiley", 1), tag="single_object")
    (samples / "00003/metadata.jsonl").write_text(json.dumps(prompt.to_json()))
    with pytest.raises(DataError, match="asks for 'smiley', which is none of COCO's classes: pass --detections"):
        evaluate_geneval(GenevalConfig(samples=samples))


def test_samples_are_a_folder() -> None:
    with pytest.raises(ConfigError, match="is a file: pass a folder in GenEval's layout"):
        GenevalConfig(samples=Path(__file__))


@pytest.fixture
def run() -> Callable[..., int]:
    import argparse

    from vapi_fast import cli

    def call(*arguments: object) -> int:
        parser = argparse.ArgumentParser()
        cli.add_command_flags(parser, "geneval")
        return commands.geneval_main(parser.parse_args(list(map(str, arguments))))

    return call


def test_official_detections_become_a_file_by_the_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With mmdet's function replaced by one that returns what mmdet returns."""
    page = (Path(__file__).parents[2] / "docs" / "geneval.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    mask = np.zeros((6, 8), bool)
    mask[2:4, 1:5] = True
    boxes = [np.zeros((0, 5), np.float32), np.array([[1, 2, 5, 4, 0.5], [0, 0, 1, 1, 0.25]], np.float32)]
    found = (boxes, [[], [mask, mask]])
    mmdet = SimpleNamespace(init_detector=lambda *files: files, inference_detector=lambda detector, path: found)
    monkeypatch.setitem(sys.modules, "mmdet", SimpleNamespace(apis=mmdet))
    monkeypatch.setitem(sys.modules, "mmdet.apis", mmdet)
    monkeypatch.chdir(tmp_path)
    Path("object_names.txt").write_text("dog\ncat\n")
    Path("00003/samples").mkdir(parents=True)
    Path("00003/samples/0000.png").touch()
    exec(snippet, {})
    ((image, (each,)),) = read_detections(Path("detections.jsonl")).items()
    assert (image, each[:4]) == ("00003/samples/0000.png", ("cat", 0.5, (1, 2, 5, 4), None))
    assert (each.mask.pixels() == mask).all()
    assert each.mask.runs.tolist() == Mask.of(mask).runs.tolist()
