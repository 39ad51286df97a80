"""The tiny preset: a real image set, tokenizer, perceptual network and generator that ship with the package.

`python -m vapi_fast.tiny.build` makes all four from nothing; `FILES` says where they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class TinyFiles(NamedTuple):
    train_images: Path
    heldout_images: Path
    perceptual: Path
    tokenizer: Path
    generator: Path


def tiny_files(folder: Path) -> TinyFiles:
    """The preset's files inside `folder`."""
    return TinyFiles(
        folder / "train.parquet",
        folder / "heldout.parquet",
        folder / "perceptual.safetensors",
        folder / "tokenizer.safetensors",
        folder / "generator.safetensors",
    )


FILES = tiny_files(Path(__file__).parent / "preset")
CLASSES = 9  # Unicode groups
IMAGE_SIZE = 32
