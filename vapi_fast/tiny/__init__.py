"""The presets: real image sets, tokenizers, perceptual networks and generators that ship with the package.

`python -m vapi_fast.tiny.build` makes those of `tiny` from nothing, `python -m vapi_fast.tiny.build_text` those of
`tiny-text` and `tiny-janus`; `FILES` and `TEXT_FILES` say where they are.
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
NETWORKS = ("tiny", "scenes")  # the presets' perceptual networks: with a classifier, so that samples are scored by them
IMAGE_SIZE = 32


class TextFiles(NamedTuple):
    train_images: Path
    heldout_images: Path
    words: Path
    perceptual: Path
    detector: Path
    tokenizer: Path
    generator: Path
    prompts: Path
    janus: Path  # a folder, as Janus-Pro's files


def text_files(folder: Path) -> TextFiles:
    """The text preset's files inside `folder`."""
    names = ("words", "perceptual", "detector", "tokenizer", "generator")
    images = (folder / "train.parquet", folder / "heldout.parquet")
    networks = (folder / f"{name}.safetensors" for name in names)
    return TextFiles(*images, *networks, folder / "prompts.jsonl", folder.with_name("janus"))


TEXT_FILES = text_files(Path(__file__).parent / "preset" / "text")
