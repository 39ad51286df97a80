"""GenEval's prompts: made by its rules, read and checked; its layout on disk."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from vapi_fast.data import geneval
from vapi_fast.data.geneval import (
    COLORS,
    OBJECTS,
    TASKS,
    Clause,
    Prompt,
    fetch_prompts,
    make_prompts,
    parse_prompt,
    read_samples,
)
from vapi_fast.data.prompts import read_prompts
from vapi_fast.data.sample_files import GenevalFiles, remove_leftovers
from vapi_fast.runtime.errors import DataError

TWO = Prompt("counting", "a photo of two dogs", (Clause("dog", 2),), (Clause("dog", 3),))
LEFT = Prompt("position", "a photo of a cat left of a dog", (Clause("dog", 1), Clause("cat", 1, None, ("left of", 0))))
RED = Prompt("colors", "a photo of a red cup", (Clause("cup", 1, "red"),))
LINES = [  # as GenEval's file has them
    '{"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}], '
    '"prompt": "a photo of two dogs"}',
    '{"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, '
    '"position": ["left of", 0]}], "prompt": "a photo of a cat left of a dog"}',
    '{"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of a red cup"}',
]


def write_prompts(path: Path, prompts: list[Prompt]) -> Path:
    path.write_text("".join(json.dumps(each.to_json()) + "\n" for each in prompts))
    return path


def test_a_line_is_a_prompt_and_back(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(LINES) + "\n\n")
    assert read_prompts(tmp_path / "a.jsonl", parse_prompt) == (TWO, LEFT, RED)
    assert [json.dumps(each.to_json()) for each in (TWO, LEFT, RED)] == LINES


def test_prompts_are_made_by_the_rules(tmp_path: Path) -> None:
    prompts = make_prompts(60, seed=3)
    assert prompts == make_prompts(60, seed=3) != make_prompts(60, seed=4)
    assert len(set(prompts)) == len(prompts)
    assert list(read_prompts(write_prompts(tmp_path / "a.jsonl", prompts), parse_prompt)) == prompts
    tasks = Counter(each.tag for each in prompts)
    assert list(tasks) == list(TASKS)
    assert tasks["single_object"] == len(OBJECTS) == 80
    assert all(50 < tasks[task] <= 60 for task in TASKS[1:])
    assert {each.include[0].name for each in prompts if each.tag == "single_object"} == set(OBJECTS)
    for each in prompts:
        assert each.text == expected_text(each)
        assert ("person" in each.text) <= (each.tag not in ("colors", "color_attr"))
        assert [clause.count for clause in each.exclude] == (
            [each.include[0].count + 1] if each.tag == "counting" else []
        )
    seen = Counter(each.include[0].count for each in prompts if each.tag == "counting")
    assert set(seen) == {2, 3, 4}
    assert {each.include[0].color for each in prompts if each.tag == "colors"} == set(COLORS)
    assert all(each.include[0].color != each.include[1].color for each in prompts if each.tag == "color_attr")


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def expected_text(prompt: Prompt) -> str:
    first, *others = prompt.include
    if prompt.tag == "counting":
        number = {2: "two", 3: "three", 4: "four"}[first.count]
        return f"a photo of {number} {first.name}{'es' if first.name[-1] == 's' else 's'}"
    if prompt.tag == "position":
        return f"a photo of {article(others[0].name)} {others[0].position[0]} {article(first.name)}"
    return "a photo of " + " and ".join(
        article(f"{each.color} {each.name}" if each.color else each.name) for each in prompt.include
    )


GOOD = json.loads(LINES[1])
BAD = [
    ("a photo of a cup", "Expecting value"),
    ([], "is no JSON object"),
    (GOOD | {"tag": "style"}, "has the tag 'style', none of single_object"),
    (GOOD | {"prompt": " "}, "has no prompt"),
    (GOOD | {"include": []}, "has no list of what to include"),
    (GOOD | {"exclude": "dog"}, "has no list of what to include"),
    (GOOD | {"include": ["dog"]}, "has a clause that is no JSON object"),
    (GOOD | {"include": [{"count": 1}]}, "has a clause without a class"),
    (GOOD | {"include": [{"class": "dog", "count": 0}]}, "has the count 0 of dog"),
    (GOOD | {"include": [{"class": "dog", "count": True}]}, "has the count True of dog"),
    (GOOD | {"include": [{"class": "dog", "count": 1, "color": "teal"}]}, "has the color 'teal', none of red"),
    (GOOD | {"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "the index of a clause before"),
    (GOOD | {"exclude": [{"class": "dog", "count": 1, "color": "red"}]}, "excludes by color or position"),
    ("[" * 100_000, "maximum recursion depth|no prompt of GenEval's"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_is_no_prompt_is_named_with_its_line(line: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(LINES[0] + "\n\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 3: no prompt of GenEval's: .*({message})"):
        read_prompts(path, parse_prompt)


def test_a_file_without_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: has no prompts, expected one a line"):
        read_prompts(tmp_path / "empty.jsonl", parse_prompt)
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path, parse_prompt)


def test_the_prompts_are_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = write_prompts(tmp_path / "served.jsonl", [TWO, RED])
    monkeypatch.setattr(geneval, "PROMPTS_URL", served.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(DataError, match=r"cannot be downloaded \(invalid hash.* pass it as --prompts FILE --format"):
        fetch_prompts()
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []
    monkeypatch.setattr(geneval, "PROMPTS_SHA256", hashlib.sha256(served.read_bytes()).hexdigest())
    assert read_prompts(fetch_prompts(), parse_prompt) == (TWO, RED)
    served.unlink()
    assert read_prompts(fetch_prompts(), parse_prompt) == (TWO, RED)


def test_samples_are_written_in_genevals_layout(tmp_path: Path) -> None:
    files = GenevalFiles(tmp_path, 5, [TWO, LEFT])
    pixels = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 6) * 20
    files.add([0, 1, 2], pixels[:3])
    files.flush()
    (tmp_path / "00000/samples/0001.png").write_bytes(b"cut")
    left = [tmp_path / "00001" / ".metadata.jsonl.abc.tmp.jsonl", tmp_path / "00001/samples/.0001.png.abc.tmp.png"]
    for path in left:
        path.touch()
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in left)
    assert files.missing().tolist() == [2, 3, 4]
    files.add([2, 3, 4], pixels[2:])
    files.finish()
    assert files.missing().tolist() == []
    assert torch.equal(files.read([3, 0, 4]), pixels[[3, 0, 4]])
    assert [files.name(index) for index in (0, 3)] == ["00000/samples/0000.png", "00001/samples/0001.png"]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == [
        "00000/metadata.jsonl",
        *(f"00000/samples/000{number}.png" for number in range(3)),
        "00001/metadata.jsonl",
        *(f"00001/samples/000{number}.png" for number in range(2)),
    ]
    assert (tmp_path / "00001/metadata.jsonl").read_text() == LINES[1] + "\n"
    assert Image.open(tmp_path / "00001/samples/0001.png").getpixel((5, 3)) == (60, 60, 60)  # sample 3
    (tmp_path / "geneval").mkdir()
    (tmp_path / "00000/grid.png").touch()
    prompts, samples = read_samples(tmp_path)
    assert prompts == [TWO, LEFT]
    assert [(each.prompt, each.name) for each in samples] == [
        *((0, f"00000/samples/000{number}.png") for number in range(3)),
        *((1, f"00001/samples/000{number}.png") for number in range(2)),
    ]


def test_a_folder_in_another_layout_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not in GenEval's layout: expected 00000/metadata\.jsonl"):
        read_samples(tmp_path)
    (tmp_path / "00007").mkdir()
    with pytest.raises(DataError, match=r"00007/metadata\.jsonl: cannot be read: No such file"):
        read_samples(tmp_path)
    (tmp_path / "00007/metadata.jsonl").write_text(LINES[0])
    with pytest.raises(DataError, match=r"00007 has no images in samples/0000\.png"):
        read_samples(tmp_path)
    (tmp_path / "00007/samples").mkdir()
    (tmp_path / "00007/samples/0000.png").touch()
    (tmp_path / "00007/metadata.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"00007/metadata\.jsonl: no prompt of GenEval's: has the tag None"):
        read_samples(tmp_path)
