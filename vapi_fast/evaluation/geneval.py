"""Score images of captions as GenEval does (Ghosh et al. 2023, arXiv 2310.11513): its layout, rules and six tasks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vapi_fast import tiny
from vapi_fast.data.dataset import DECODE_THREADS
from vapi_fast.data.geneval import OBJECTS, TASKS, Prompt, Sample, read_samples
from vapi_fast.data.image_sets import read_picture
from vapi_fast.data.pictures import marked, save_sheets
from vapi_fast.data.scenes import IMAGE_SIZE, KINDS
from vapi_fast.evaluation.config import SCENES, GenevalConfig
from vapi_fast.evaluation.geneval_detections import Found, read_detections, to_json
from vapi_fast.evaluation.geneval_networks import CLIP, CLIP_WEIGHTS, ColorClassifier, Detector, require_networks
from vapi_fast.evaluation.geneval_rules import Objects, Verdict, colorless, counting, judge
from vapi_fast.evaluation.geneval_scores import TaskScores
from vapi_fast.evaluation.scene_detector import SceneDetector
from vapi_fast.runtime.checkpoint import write_atomically
from vapi_fast.runtime.distributed import gather_objects, process_group, rank, world_size
from vapi_fast.runtime.errors import DataError
from vapi_fast.runtime.ownership import not_written, owned
from vapi_fast.runtime.progress import progress_bar

SHEET_EACH = 4  # images of a task that are right, and as many that are wrong
ROOM = 10**7  # bytes, more than the files take
NOT_COMPARED = "not the official detector: their figures have not been compared"
Finder = Callable[[Sequence[Sample], Sequence[np.ndarray]], list[list[Found]]]  # objects of images uint8 [H,W,3]


class Judged(NamedTuple):
    """One image, its objects and what became of it."""

    sample: Sample
    objects: list[Found]
    verdict: Verdict


@dataclass(frozen=True)
class GenevalReport(TaskScores):
    """What `vapi-fast geneval` measured."""

    detections: str
    seconds: float

    def __str__(self) -> str:
        def line(label: str, score: float, se: float | None, note: str = "") -> str:
            return f"{label:<16} {score:.3f}{'' if se is None else f' ± {se:.3f}'}{note}"

        images, prompts = (sum(getattr(each, name) for each in self.tasks.values()) for name in ("images", "prompts"))
        missing = [task for task in TASKS if task not in self.tasks]
        return "\n".join(
            [
                f"{images} images of {prompts} prompts, objects of {self.detections}",
                *(line(task, each.score, each.se, f"  ({each.prompts} prompts)") for task, each in self.tasks.items()),
                line("overall", self.overall, self.overall_se, f"  (without {', '.join(missing)})" if missing else ""),
            ]
        )


def evaluate_geneval(config: GenevalConfig) -> GenevalReport | None:
    """Score `config.samples`; under torchrun the ranks share the images, and rank 0 reports.

    `config.output` then holds `scores.json`, `detections.jsonl` (every image's objects, as `--detections` takes them)
    and `contact_sheet.png`.

    Raises:
        DataError: a folder that is not in GenEval's layout, or a file that does not hold what it should.
        CheckpointError: weights that are missing, damaged or of another network.
        ConfigError: a package is missing.
    """
    started = time.perf_counter()
    with process_group() as device, owned(config.output, "--output"):
        prompts, samples = read_samples(config.samples)
        find, color, name = finders(config, prompts, samples, device)
        start, stop = (len(samples) * part // world_size() for part in (rank(), rank() + 1))
        mine = judged(prompts, samples[start:stop], find, color, config.batch_size)
        parts = gather_objects(list(mine))
        if rank() > 0:
            return None
        found: list[list[Judged]] = [[] for _ in prompts]
        for each in itertools.chain(*parts):
            found[each.sample.prompt].append(each)
        report = make_report(prompts, found, name, time.perf_counter() - started)
        try:
            save(config.output, report, prompts, found)
        except OSError as error:
            print(report)  # it took its time
            raise not_written(error, config.output, "the scores stand above", ROOM) from error
    return report


def finders(
    config: GenevalConfig, prompts: Sequence[Prompt], samples: Sequence[Sample], device: torch.device
) -> tuple[Finder, ColorClassifier | None, str]:
    """Who says what is in the images, who says which colours, if any are asked for, and what they are called."""
    if config.detections is None and config.detector == SCENES:
        check_kinds(config, prompts, KINDS, f"the {len(KINDS)} kinds of object that {SCENES} has")
        scene_detector = SceneDetector.from_checkpoint(tiny.TEXT_FILES.detector).to(device)

        def find(_: Sequence[Sample], images: Sequence[np.ndarray]) -> list[list[Found]]:
            return scene_detector.objects(as_tensor(config, images).to(device))

        colors, name = False, f"the detector of {SCENES}"
    elif config.detections is None:
        colors = any(clause.color for prompt in prompts for clause in prompt.include)
        require_networks(True, colors)
        check_kinds(config, prompts, OBJECTS, "COCO's classes")
        detector = Detector.load(config.detector, device)
        name = f"{config.detector} ({NOT_COMPARED})"

        def find(_: Sequence[Sample], images: Sequence[np.ndarray]) -> list[list[Found]]:
            return detector(images)
    else:
        known, name = read_detections(config.detections), str(config.detections)
        if missing := [sample.name for sample in samples if sample.name not in known]:
            raise DataError(f"{config.detections}: has no line for {missing[0]} and {len(missing) - 1} other images")
        colors = any(colorless(prompts[s.prompt], counting(known[s.name], prompts[s.prompt].tag)) for s in samples)
        require_networks(False, colors)

        def find(batch: Sequence[Sample], _: Sequence[np.ndarray]) -> list[list[Found]]:
            return [known[sample.name] for sample in batch]

    if not colors:
        return find, None, name
    return find, ColorClassifier.load(config.clip_weights, device), f"{name}, colours by {CLIP} {CLIP_WEIGHTS}"


def check_kinds(config: GenevalConfig, prompts: Sequence[Prompt], kinds: Collection[str], of: str) -> None:
    """Raise DataError where a prompt asks for what the detector does not know."""
    if unknown := {clause.name for prompt in prompts for clause in prompt.include + prompt.exclude}.difference(kinds):
        raise DataError(f"{config.samples}: asks for {min(unknown)!r}, which is none of {of}: pass --detections")


def as_tensor(config: GenevalConfig, images: Sequence[np.ndarray]) -> Tensor:
    """Scenes uint8 `[H,W,3]` as `[N,3,H,W]` in [−1, 1]; raises DataError for images of another size."""
    if wrong := [image.shape for image in images if image.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE)]:
        raise DataError(
            f"{config.samples}: has an image of {wrong[0][1]}x{wrong[0][0]} pixels, the detector of {SCENES} takes "
            f"{IMAGE_SIZE}x{IMAGE_SIZE}: leave --detector out"
        )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def judged(
    prompts: Sequence[Prompt], samples: Sequence[Sample], find: Finder, color: ColorClassifier | None, batch_size: int
) -> Iterator[Judged]:
    """The images one after another, decoded one batch ahead in threads."""
    batches = [samples[first : first + batch_size] for first in range(0, len(samples), batch_size)]
    with (
        ThreadPoolExecutor(DECODE_THREADS) as pool,
        progress_bar(len(samples), desc="geneval", unit="image", disable=rank() > 0) as progress,
    ):
        ahead = [pool.map(read_picture, [sample.path for sample in batch]) for batch in batches[:1]]
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            images = list(ahead.pop())
            ahead.append(pool.map(read_picture, [sample.path for sample in following]))
            for sample, image, found in zip(batch, images, find(batch, images), strict=True):
                prompt = prompts[sample.prompt]
                objects = counting(found, prompt.tag)
                if color is not None:
                    name_colors(color, prompt, objects, image)
                plain = [each._replace(mask=None) for part in objects.values() for each in part]
                yield Judged(sample, plain, judge(prompt, objects))
            progress.update(len(batch))


def name_colors(color: ColorClassifier, prompt: Prompt, objects: Objects, image: np.ndarray) -> None:
    """Give the objects whose color decides theirs."""
    if places := colorless(prompt, objects):
        colors = color(image, [objects[name][place] for name, place in places])
        for (name, place), each in zip(places, colors, strict=True):
            objects[name][place] = objects[name][place]._replace(color=each)


def make_report(
    prompts: Sequence[Prompt], found: Sequence[Sequence[Judged]], name: str, seconds: float
) -> GenevalReport:
    """The scores of images, by prompt."""
    scores = TaskScores.of(prompts, [[each.verdict.correct for each in images] for images in found])
    return GenevalReport(**vars(scores), detections=name, seconds=seconds)


def save(output: Path, report: GenevalReport, prompts: Sequence[Prompt], found: Sequence[Sequence[Judged]]) -> None:
    """The report's files, each whole or absent, the scores last."""
    by_prompt = [
        {
            "folder": Path(images[0].sample.name).parts[0],
            "tag": prompt.tag,
            "prompt": prompt.text,
            "score": sum(each.verdict.correct for each in images) / len(images),
            "images": [{"image": each.sample.name} | each.verdict._asdict() for each in images],
        }
        for prompt, images in zip(prompts, found, strict=True)
    ]
    every = list(itertools.chain(*found))
    lines = "".join(json.dumps(to_json(each.sample.name, each.objects)) + "\n" for each in every)
    scores = json.dumps(dataclasses.asdict(report) | {"prompts": by_prompt}, indent=1) + "\n"
    write_atomically(output / "detections.jsonl", lambda temporary: temporary.write_text(lines, "utf-8"))
    save_contact_sheet(output / "contact_sheet.png", report, prompts, every)
    write_atomically(output / "scores.json", lambda temporary: temporary.write_text(scores, "utf-8"))


def save_contact_sheet(path: Path, report: GenevalReport, prompts: Sequence[Prompt], found: Sequence[Judged]) -> None:
    """A row a task: images that are right, then those that are not, with boxes and what was missed."""
    columns = min(2 * SHEET_EACH, *(each.images for each in report.tasks.values()))
    cells, captions = [], []
    for task in report.tasks:
        for each in shown([each for each in found if prompts[each.sample.prompt].tag == task], columns):
            prompt = prompts[each.sample.prompt]
            asked = {clause.name for clause in prompt.include + prompt.exclude}
            boxes = [(o.box, f"{o.color} {o.name}" if o.color else o.name) for o in each.objects if o.name in asked]
            cells.append(marked(read_picture(each.sample.path), boxes, "; ".join(each.verdict.missed)))
            captions.append(prompt.text.removeprefix("a photo of "))
    save_sheets(path, [(f"GenEval {report.overall:.3f}", torch.stack(cells))], columns, captions)


def shown(found: Sequence[Judged], count: int) -> list[Judged]:
    """`count` of a task's images, half of them right where there are as many, of prompts that are spread evenly."""
    right, wrong = ([each for each in found if each.verdict.correct is correct] for correct in (True, False))
    of_right = min(len(right), max(count - len(wrong), (count + 1) // 2))
    return [part[len(part) * i // n] for part, n in ((right, of_right), (wrong, count - of_right)) for i in range(n)]
