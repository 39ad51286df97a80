"""The tiny preset that ships: its images, networks, sizes, and that its build makes them."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vapi_fast import ops, tiny
from vapi_fast.data.dataset import ImageData
from vapi_fast.models import LPIPS, LlamaGen, VQTokenizer
from vapi_fast.tiny import images

GROUPS = {
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """`vapi_fast.tiny.build`, of tests that read or write image sets."""
    pytest.importorskip("datasets")
    return importlib.import_module("vapi_fast.tiny.build")


@pytest.fixture(scope="module")
def heldout(build: ModuleType) -> tuple[torch.Tensor, torch.Tensor]:
    return build.load_images(tiny.FILES.heldout_images)


def test_shipped_files_are_small() -> None:
    pictures = sum(path.stat().st_size for path in (tiny.FILES.train_images, tiny.FILES.heldout_images))
    networks = sum(path.stat().st_size for path in (tiny.FILES.perceptual, tiny.FILES.tokenizer, tiny.FILES.generator))
    assert pictures <= 6e6
    assert networks <= 12e6


def test_images_are_distinct_and_heldout_ones_unseen(build: ModuleType, heldout: tuple[torch.Tensor, ...]) -> None:
    train, labels = build.load_images(tiny.FILES.train_images)
    pixels = torch.cat([train, heldout[0]]).flatten(1)
    assert len(pixels.unique(dim=0)) == len(pixels) > 2000
    assert set(ImageData(tiny.FILES.train_images, 32).class_names.values()) == GROUPS
    assert len(labels.unique()) == tiny.CLASSES
    share = labels.bincount().max() / len(labels)
    assert share < 0.35  # "People & Body" is thinned


def test_tokenizer_reconstructs_heldout_images(heldout: tuple[torch.Tensor, ...]) -> None:
    tokenizer = VQTokenizer.from_checkpoint(tiny.FILES.tokenizer, "tiny")
    with torch.no_grad():
        tokens = tokenizer.encode(heldout[0])
        error = (tokenizer.decode(tokens).clamp(-1, 1) - heldout[0]).square().mean()
    assert tokens.shape == (len(heldout[0]), 64)
    assert tokens.unique().numel() > 400  # the codebook is in use
    assert error < 0.03


def test_perceptual_network_recognises_heldout_images(heldout: tuple[torch.Tensor, ...]) -> None:
    network = LPIPS.from_checkpoint(tiny.FILES.perceptual, "tiny")
    with torch.no_grad():
        correct = network.features_and_logits(heldout[0])[1].argmax(1) == heldout[1]
        shifted = network(heldout[0].roll(1, 3), heldout[0])
        other = network(heldout[0].roll(1, 0), heldout[0])
    assert correct.float().mean() > 0.6  # nine groups, the largest is 30 % of them
    assert (shifted < other).float().mean() > 0.95  # a pixel's shift is nearer than another glyph


def test_generator_predicts_heldout_tokens(heldout: tuple[torch.Tensor, ...]) -> None:
    tokenizer = VQTokenizer.from_checkpoint(tiny.FILES.tokenizer, "tiny")
    generator = LlamaGen.from_checkpoint(tiny.FILES.generator, "tiny").eval()
    with torch.no_grad():
        tokens = tokenizer.encode(heldout[0])
        hidden = generator(tokens[:, :-1], heldout[1], return_hidden=True)
        cross_entropy = ops.linear_cross_entropy(hidden, generator.output.weight, tokens)
    assert cross_entropy < 3.7  # uniform: ln 512 = 6.24


@pytest.mark.skipif(
    not images.FONT.exists() or not images.EMOJI_TEST.exists(), reason="Debian's emoji font not installed"
)
def test_images_render_as_shipped() -> None:
    pytest.importorskip("datasets")
    glyphs = [glyph for glyph, _ in images.render_all()]
    assert len(glyphs) == len(ImageData(tiny.FILES.train_images, 32)) + len(ImageData(tiny.FILES.heldout_images, 32))
    assert {glyph.group for glyph in glyphs} == GROUPS
    assert len({glyph.subgroup for glyph in glyphs}) == 99


def test_missing_font_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="install Debian's package fonts-noto-color-emoji"):
        next(images.render_all(font_path=tmp_path / "none.ttf"))


def test_thinning_keeps_one_skin_tone() -> None:
    names = [f"waving hand: {tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark")]
    tones = [chr(code) for code in images.SKIN_TONES]
    glyphs = [images.Glyph("👋", "waving hand", "People & Body", "hand")]
    glyphs += [images.Glyph("👋" + t, n, "People & Body", "hand") for t, n in zip(tones, names, strict=True)]
    glyphs += [images.Glyph("🐒", "monkey", "Animals & Nature", "animal-mammal")]
    kept = images.thin(glyphs)
    assert [glyph.text for glyph in kept[::2]] == ["👋", "🐒"]
    assert len(kept) == 3


def test_images_are_varied_within_their_frame(build: ModuleType) -> None:
    """Mirrored or as they are at share 0; at 1 also scaled and moved, where what comes in from outside is white."""
    pictures = torch.ones(64, 3, 32, 32)
    pictures[:, :, 12:20, 8:14] = -1.0
    seeded = torch.Generator().manual_seed(0)
    same = build.varied(pictures, seeded, 0.0)
    errors = torch.stack([(same - other).abs().amax((1, 2, 3)) for other in (pictures, pictures.flip(3))])
    assert errors.min(0).values.max() < 1e-4
    assert set((errors < 1e-4).float().argmax(0).tolist()) == {0, 1}
    varied = build.varied(pictures, seeded, 1.0)
    dark = (varied < 0).float()
    assert varied[:, :, :4].min() == varied[:, :, -4:].min() == varied.max() == 1.0
    sides = [dark[:, 0].amax(dim).sum(1) for dim in (2, 1)]  # of 8 × 6 pixels, by ± 12 % and a pixel of rounding
    assert all(7 <= height <= 10 for height in sides[0].tolist())
    assert all(5 <= width <= 7 for width in sides[1].tolist())
    centres = (dark[:, 0].sum(2) * torch.arange(32)).sum(1) / dark[:, 0].sum((1, 2))
    assert 12.9 < centres.min() < 14.5
    assert 16.5 < centres.max() < 18.1


def test_build_trains_each_network_from_the_images(build: ModuleType, tmp_path: Path) -> None:
    """A few steps of each on some of the images: the files load, the generator's loss is below a uniform guess's."""
    parquet, files = importlib.import_module("pyarrow.parquet"), tiny.tiny_files(tmp_path)
    for source, target in zip(tiny.FILES[:2], files[:2], strict=True):
        parquet.write_table(parquet.read_table(source).slice(0, 300), target)
    build.train_perceptual(files, steps=3, batch_size=16)
    build.train_tokenizer(files, steps=5, batch_size=8, continuous_steps=2)
    build.train_generator(files, steps=30, batch_size=8)
    assert LPIPS.from_checkpoint(files.perceptual, "tiny").classifier is not None
    tokenizer = VQTokenizer.from_checkpoint(files.tokenizer, "tiny")
    assert tokenizer.codebook().norm(dim=1).sub(1).abs().max() < 1e-3
    generator = LlamaGen.from_checkpoint(files.generator, "tiny")
    pictures, labels = build.load_images(files.train_images)
    with torch.no_grad():
        tokens = tokenizer.encode(pictures[:64])
        hidden = generator(tokens[:, :-1], labels[:64], return_hidden=True)
        assert ops.linear_cross_entropy(hidden, generator.output.weight, tokens) < 6.2
