"""GenEval's rules: which objects count, where they are to each other, and whether an image shows what a prompt asks.

As the public scorer has them (github.com/djghosh13/geneval, `evaluation/evaluate_images.py`, with its defaults).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vapi_fast.data.geneval import Clause, Prompt
from vapi_fast.evaluation.geneval_detections import Found

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a score has to be above
MOST = 16  # objects of a class that count
SHRINK = 0.1  # of two boxes' sides, taken off the distance of their centres
DIRECTION = 0.5  # a component of the direction has to be above


class Verdict(NamedTuple):
    correct: bool
    missed: tuple[str, ...]  # what of the prompt the image lacks, or has too much of


Objects = dict[str, list[Found]]  # by class, the likeliest first


def counting(found: Iterable[Found], task: str) -> Objects:
    """What counts of the objects that were found: above the task's threshold, at most MOST of a class."""
    threshold = COUNTING_THRESHOLD if task == "counting" else THRESHOLD
    objects: Objects = {}
    for each in sorted(found, key=lambda each: -each.score):
        if each.score > threshold and len(objects.get(each.name, ())) < MOST:
            objects.setdefault(each.name, []).append(each)
    return objects


def asked(clause: Clause, objects: Mapping[str, list[Found]]) -> Sequence[Found]:
    """The objects that a clause is judged by: as many as it asks for, the likeliest."""
    return objects.get(clause.name, [])[: clause.count]


def colorless(prompt: Prompt, objects: Objects) -> list[tuple[str, int]]:
    """Class and place of the objects whose color decides and is not known."""
    return list(
        dict.fromkeys(
            (clause.name, place)
            for clause in prompt.include
            for place, each in enumerate(asked(clause, objects))
            if clause.color and each.color is None and len(asked(clause, objects)) == clause.count
        )
    )


def judge(prompt: Prompt, objects: Objects) -> Verdict:
    """Whether an image with these objects is right; colors that decide are known."""
    missed: list[str] = []
    groups: list[Sequence[Found]] = []  # what fulfils each clause, or nothing
    for clause in prompt.include:
        wrong = lacking(clause, asked(clause, objects), groups)
        groups.append(() if wrong else asked(clause, objects))
        missed += filter(None, [wrong])
    for clause in prompt.exclude:
        if (there := len(objects.get(clause.name, ()))) >= clause.count:
            missed.append(f"{there} {clause.name}, not {clause.count - 1}")
    return Verdict(not missed, tuple(missed))


def lacking(clause: Clause, found: Sequence[Found], groups: Sequence[Sequence[Found]]) -> str:
    """What the objects `found` lack of a clause, in a few words; nothing where they fulfil it."""
    if len(found) < clause.count:
        return f"{len(found)} of {clause.count} {clause.name}"
    wrong = [each.color or "no color" for each in found if clause.color and each.color != clause.color]
    if wrong:
        return f"{clause.name} {', '.join(wrong)}, not {clause.color}"
    if clause.position:
        relation, index = clause.position
        if not groups[index]:
            return f"nothing for {clause.name} to be {relation}"
        for each in found:
            for target in groups[index]:
                there = relations(each.box, target.box)
                if relation not in there:
                    return f"{clause.name} {' and '.join(sorted(there)) or 'in place'}, not {relation}"
    return ""


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where `box` is, seen from the `other`: no, one or two of GenEval's relations."""
    boxes = np.array([box, other], dtype=float).reshape(2, 2, 2)
    centres, sides = boxes.mean(axis=1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    apart = np.sign(offset) * np.maximum(np.abs(offset) - SHRINK * sides.sum(axis=0), 0)
    if (np.abs(apart) < 1e-3).all():
        return set()
    x, y = apart / np.linalg.norm(offset)
    shown = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {relation for relation, component in shown.items() if component > DIRECTION}
