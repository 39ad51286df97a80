"""A reward of one's own, for `vapi-fast align --model tiny-text --recipe ar-grpo --reward scene_reward:fulfilled`.

With this folder in PYTHONPATH. It is GenEval's own measure: judge what it brings beside `--control random`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vapi_fast import tiny
from vapi_fast.data import scenes
from vapi_fast.evaluation.geneval_rules import counting, judge
from vapi_fast.evaluation.scene_detector import SceneDetector


@functools.cache
def detector(device: torch.device) -> SceneDetector:
    return SceneDetector.from_checkpoint(tiny.TEXT_FILES.detector).to(device)


def fulfilled(images: Tensor, captions: list[str]) -> Tensor:
    """Images `[N,3,32,32]` in [−1, 1] and their captions → float32 `[N]`: the share of what each asks for, by GenEval's
    rules, that it shows."""
    shares = []
    for found, caption in zip(detector(images.device).objects(images.float()), captions, strict=True):
        prompt = scenes.parse(caption)
        missed = judge(prompt, counting(found, prompt.tag)).missed
        shares.append(1 - len(missed) / (len(prompt.include) + len(prompt.exclude)))
    return torch.tensor(shares)
