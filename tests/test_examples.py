"""The examples run as their users run them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vapi_fast import tiny
from vapi_fast.models import LlamaGen

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.usefixtures("image_sets")
def test_align_tiny(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "align_tiny.py", "--steps", "2", "--out", "results"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    *steps, last = output.splitlines()
    numbers = [re.fullmatch(r"step (\d): reward (-0\.\d{4}), mse (0\.\d{4}), lpips (0\.\d{4})", line) for line in steps]
    assert [int(found[1]) for found in numbers] == [1, 2]
    for found in numbers:
        assert abs(float(found[2]) + float(found[3]) + float(found[4])) < 2e-4  # R = −(MSE + LPIPS)
    assert last == "results: aligned.pt, samples.png"

    aligned = LlamaGen.from_checkpoint(tmp_path / "results" / "aligned.pt", "tiny").state_dict()
    before = LlamaGen.from_checkpoint(tiny.FILES.generator, "tiny").state_dict()
    moved = torch.stack([(aligned[name] - value).abs().max() for name, value in before.items()])
    assert 0 < moved.max() < 1e-3  # two steps of AdamW at a learning rate of 2e-5
    with Image.open(tmp_path / "results" / "samples.png") as picture:
        assert picture.width > 2 * 3 * 96  # two sheets of nine samples
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 100


def test_scene_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real scenes show what their captions ask for, and less of what others do."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from scene_reward import fulfilled

    from vapi_fast.tiny.build_text import load_scenes

    captions, images = load_scenes(tiny.TEXT_FILES.heldout_images)
    captions, images = captions[::9], images[::9]
    assert fulfilled(images, captions).mean() > 0.98
    others = fulfilled(images, captions[1:] + captions[:1])
    assert others.mean() < 0.3
    assert others.shape == (len(images),)
    assert others.dtype == torch.float32
    assert (fulfilled(images[:1], ["a photo of a cat and a dog"]) * 2 % 1 == 0).all()  # of two: none, half or all
