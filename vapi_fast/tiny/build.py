"""Rebuild the tiny preset from nothing: images, perceptual network, tokenizer, generator (1½ hours on two cores).

    python -m vapi_fast.tiny.build [--output-dir DIR] [--only PART …]  # images perceptual tokenizer generator

Needs Debian's packages fonts-noto-color-emoji and unicode-data for the images.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vapi_fast import ops
from vapi_fast.models import LPIPS, Dropout, LlamaGen, VQTokenizer
from vapi_fast.runtime.checkpoint import write_atomically
from vapi_fast.tiny import CLASSES, FILES, IMAGE_SIZE, TinyFiles, tiny_files
from vapi_fast.tiny.images import render_all
from vapi_fast.tiny.training import SEED, batches, build_parts, fit, fit_generator, fit_tokenizer, save_half

HELDOUT_SHARE = 5  # one image in five


def build_images(output: TinyFiles) -> None:
    """Render the glyphs and write the training and held-out parquet files."""
    glyphs, pictures = zip(*render_all(), strict=True)
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=list(dict.fromkeys(g.group for g in glyphs))),
        name=datasets.Value("string"),
    )
    order = np.random.default_rng(SEED).permutation(len(glyphs))
    heldout = set(order[: len(glyphs) // HELDOUT_SHARE].tolist())
    for path, wanted in ((output.train_images, False), (output.heldout_images, True)):
        rows = [
            {"image": {"bytes": pictures[i], "path": None}, "label": g.group, "name": g.name}
            for i, g in enumerate(glyphs)
            if (i in heldout) is wanted
        ]
        table = datasets.Dataset.from_list(rows, features=features)
        write_atomically(path, table.to_parquet)
        print(f"{path.name}: {len(rows)} images")


def load_images(path: Path) -> tuple[Tensor, Tensor]:
    """All images of a parquet file: float32 `[N,3,32,32]` in [−1, 1], and their labels int64 `[N]`."""
    with tempfile.TemporaryDirectory() as cache:
        table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in table["image"]])
        labels = torch.tensor(table["label"])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, labels


def shifted(images: Tensor, generator: torch.Generator, most: int = 3) -> Tensor:
    """Each image moved by up to `most` pixels (white border) and mirrored half of the time."""
    batch, _, size, _ = images.shape
    padded = F.pad(images, (most,) * 4, value=1.0)
    offsets = torch.randint(0, 2 * most + 1, (2, batch), generator=generator)
    rows = offsets[0, :, None, None] + torch.arange(size)[None, :, None]
    columns = offsets[1, :, None, None] + torch.arange(size)[None, None, :]
    moved = padded[torch.arange(batch)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
    mirror = torch.rand(batch, generator=generator) < 0.5
    return torch.where(mirror[:, None, None, None], moved.flip(3), moved)


def varied(images: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """Each image mirrored half of the time, and a `share` of them scaled by up to 12 % and moved by up to 2 pixels."""
    batch, _, size, _ = images.shape
    chosen = torch.rand(batch, generator=generator) < share
    scale = 1 + 0.12 * (2 * torch.rand(batch, generator=generator) - 1) * chosen
    mirror = 1 - 2 * (torch.rand(batch, generator=generator) < 0.5).float()
    moves = torch.randint(-2, 3, (batch, 2), generator=generator) * chosen[:, None] * 2 / size
    matrix = torch.diag_embed(torch.stack([scale * mirror, scale], dim=1))
    grid = F.affine_grid(torch.cat([matrix, moves[:, :, None]], dim=2), list(images.shape), align_corners=False)
    white = 1.0  # the sampling pads with zeros
    return (F.grid_sample(images - white, grid, mode="bicubic", align_corners=False) + white).clamp(-1, 1)


def disturbed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, colour gain, noise and a blanked-out square, so that the classifier looks at more than one cue."""
    batch, _, size, _ = images.shape
    blur = torch.rand(batch, 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, blur * (blur > 0.3))
    gain = 1 + 0.2 * torch.randn(batch, 3, 1, 1, generator=generator)
    strength = 0.15 * torch.rand(batch, 1, 1, 1, generator=generator)
    images = images * gain + strength * torch.randn(images.shape, generator=generator)
    corner = torch.randint(0, size - 8, (2, batch, 1, 1), generator=generator)
    grid = torch.arange(size)
    inside = ((grid[None, :, None] - corner[0]).abs() < 6) & ((grid[None, None, :] - corner[1]).abs() < 6)
    return images.masked_fill(inside[:, None], 0.0)


def train_perceptual(output: TinyFiles, steps: int = 600, batch_size: int = 128) -> None:
    """A classifier of the nine Unicode groups: features for LPIPS and FID, logits for the Inception Score.

    Trained briefly and on disturbed images: with many more steps it learns the training images by heart, and FID
    becomes a matter of its own confidence.
    """
    images, labels = load_images(output.train_images)
    heldout, heldout_labels = load_images(output.heldout_images)
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    model = LPIPS.from_name("tiny").to(memory_format=torch.channels_last)
    model.heads.requires_grad_(False)
    index = batches(len(images), batch_size, generator)

    def loss_of(_: int) -> Tensor:
        rows = next(index)
        inputs = disturbed(shifted(images[rows], generator), generator).to(memory_format=torch.channels_last)
        return F.cross_entropy(model.features_and_logits(inputs)[1], labels[rows], label_smoothing=0.1)

    def figures() -> dict[str, str | int]:
        correct = model.features_and_logits(heldout)[1].argmax(1) == heldout_labels
        return {"heldout_accuracy": f"{correct.float().mean():.3f}"}

    fit("perceptual network", model, steps, loss_of, figures=figures)
    save_half(model, output.perceptual)


def train_tokenizer(output: TinyFiles, steps: int = 3500, batch_size: int = 64, continuous_steps: int = 300) -> None:
    """As `fit_tokenizer` says, on images that are moved and mirrored."""
    images, _ = load_images(output.train_images)
    heldout, _ = load_images(output.heldout_images)
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    perceptual = LPIPS.from_checkpoint(output.perceptual, "tiny").requires_grad_(False)
    model = VQTokenizer.from_name("tiny").to(memory_format=torch.channels_last)
    index = batches(len(images), batch_size, generator)

    def draw() -> Tensor:
        return shifted(images[next(index)], generator)

    fit_tokenizer(model, perceptual, draw, images, heldout, steps, continuous_steps, generator)
    save_half(model, output.tokenizer)


def train_generator(output: TinyFiles, steps: int = 2700, batch_size: int = 32) -> None:
    """Next-token cross-entropy until it gains nothing more on held-out images: a base for alignment to be judged by.

    Images are varied and tokenized anew at every step, with dropout 0.1 for all, as LlamaGen has it; the last 15 % of
    the steps see them as they are, or mirrored, without dropout.
    """
    images, labels = load_images(output.train_images)
    heldout, heldout_labels = load_images(output.heldout_images)
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    tokenizer = VQTokenizer.from_checkpoint(output.tokenizer, "tiny").eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        heldout_tokens = torch.cat([tokenizer.encode(chunk) for chunk in heldout.split(256)])
    model = LlamaGen.from_name("tiny", num_classes=CLASSES, vocab_size=512, grid_size=IMAGE_SIZE // 4)
    index = batches(len(images), batch_size, generator)

    def draw(step: int) -> tuple[Tensor, dict[str, Any]]:
        finishing, rows = step >= 0.85 * steps, next(index)
        dropout = None if finishing else Dropout(0.1, 0.1, ops.fold_seed(SEED, step))
        inputs, classes = varied(images[rows], generator, 0.0 if finishing else 0.7), labels[rows]
        if finishing:  # guidance still needs the class that stands for "none"
            classes = torch.where(torch.rand(batch_size, generator=generator) < 0.1, CLASSES, classes)
        tokens = tokenizer.encode(inputs.to(memory_format=torch.channels_last))
        return tokens, {"condition": classes, "dropout": dropout}

    fit_generator(model, draw, (heldout_tokens, {"condition": heldout_labels}), steps)
    save_half(model, output.generator)


PARTS = {
    "images": build_images,
    "perceptual": train_perceptual,
    "tokenizer": train_tokenizer,
    "generator": train_generator,
}


if __name__ == "__main__":
    build_parts("vapi_fast.tiny.build", __doc__, PARTS, tiny_files, FILES.train_images.parent)
