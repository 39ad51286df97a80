"""GenEval of samples as they are drawn, where their captions are those of scenes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vapi_fast import tiny
from vapi_fast.data import scenes
from vapi_fast.data.geneval import Prompt
from vapi_fast.evaluation.geneval_rules import counting, judge
from vapi_fast.evaluation.geneval_scores import TaskScores
from vapi_fast.evaluation.scene_detector import SceneDetector
from vapi_fast.runtime.distributed import gather_objects


class SceneJudge:
    """Judges sample i by caption i mod N."""

    def __init__(self, prompts: Sequence[Prompt], detector: SceneDetector) -> None:
        self.prompts = prompts
        self.detector = detector

    @classmethod
    def of(cls, captions: Sequence[str], device: torch.device) -> SceneJudge | None:
        """None where they are other captions: nothing says then what an image must show."""
        try:
            prompts = [scenes.parse(caption) for caption in captions]
        except ValueError:
            return None
        return cls(prompts, SceneDetector.from_checkpoint(tiny.TEXT_FILES.detector).to(device))

    def correct(self, images: Tensor, sample_ids: Tensor) -> list[tuple[int, bool]]:
        """Of images `[n,3,32,32]` in [−1, 1], the samples with the first n of these ids: id and whether it is right."""
        found = self.detector.objects(images.float())
        ids = sample_ids[: len(found)].tolist()
        prompts = [self.prompts[sample_id % len(self.prompts)] for sample_id in ids]
        verdicts = [judge(prompt, counting(each, prompt.tag)) for prompt, each in zip(prompts, found, strict=True)]
        return [(sample_id, verdict.correct) for sample_id, verdict in zip(ids, verdicts, strict=True)]

    def scores(self, correct: Sequence[tuple[int, bool]]) -> TaskScores:
        """Of all ranks' samples; a prompt's are one group, whichever captions they came by."""
        by_prompt: dict[Prompt, list[bool]] = {}
        for sample_id, right in sorted(each for part in gather_objects(list(correct)) for each in part):
            by_prompt.setdefault(self.prompts[sample_id % len(self.prompts)], []).append(right)
        return TaskScores.of(list(by_prompt), list(by_prompt.values()))
