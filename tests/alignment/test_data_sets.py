"""What a run's images are opened as, and which captions are encoded before the generator comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inputs import text_encoder

pytest.importorskip("datasets")
from captioned import TEXTS, write

from vapi_fast import AlignConfig
from vapi_fast.alignment.data_sets import check_flags, feature_source, open_data
from vapi_fast.data.caption_data import CaptionedData
from vapi_fast.data.dataset import ImageData
from vapi_fast.data.features import FolderFeatures
from vapi_fast.data.text import TextEncoder
from vapi_fast.models.sizes import Captions, Classes
from vapi_fast.runtime.errors import ConfigError

CPU = torch.device("cpu")
Make = Callable[..., AlignConfig]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_encoder(tmp_path_factory.mktemp("encoder"))


def test_what_a_run_will_read_is_encoded_first(
    tiny_config: Make, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training images of its steps and the held-out ones, and nothing of theirs once more."""
    given: list[str] = []
    states = TextEncoder.states
    monkeypatch.setattr(
        TextEncoder, "states", lambda self, texts, *sizes: (given.extend(texts), states(self, texts, *sizes))[1]
    )
    config = tiny_config(
        data=write(tmp_path / "train", "list", list(TEXTS)),
        eval_data=write(
            tmp_path / "held-out", "list", [f"a cup {word}" for word in ("on", "two", "red", "cat", "dogs")]
        ),
        caption_cache=tmp_path / "cache",
        text_encoder=str(encoder),
        batch_size=2,
        steps=3,
        evaluate=True,
        eval_samples=4,
        eval_batch=1,
        micro_batch=1,
    )
    data = open_data(config, Captions(12, 16), CPU)
    assert isinstance(data, CaptionedData)
    steps = list(data.batches(2, 3, seed=config.seed))
    read = {data.caption(i) for batch in steps for i in batch.image_ids.tolist()}
    assert set(given) == read | {f"a cup {word}" for word in ("on", "two", "red", "cat", "dogs")}
    assert len(given) == 6 + 5
    held_out = open_data(config, Captions(12, 16), CPU, held_out=True).at(16)
    (batch,) = held_out.batches(4, 1, seed=0)
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.features.shape == (4, 12, 16)
    same = open_data(config, Captions(12, 16), CPU, held_out=True, features=data.features)
    assert same.features is data.features
    assert all(map(torch.equal, next(same.at(16).batches(4, 1, seed=0)), batch))
    assert len(given) == 6 + 5
    config = dataclasses.replace(config, evaluate=False, caption_cache=tmp_path / "another")
    open_data(config, Captions(12, 16), CPU)
    assert len(given) == 6 + 5 + 6


@pytest.mark.usefixtures("image_sets")
def test_classes_and_llamagens_features(tiny_config: Make, tmp_path: Path) -> None:
    data = open_data(tiny_config(), Classes(9), CPU)
    assert isinstance(data, ImageData)
    assert data.split == ImageData(tiny_config().data, 32).split
    (tmp_path / "features/part").mkdir(parents=True)
    for line in range(12):
        np.save(tmp_path / f"features/part/{line}.npy", np.full((1, 2, 16), line, np.float32))
    config = tiny_config(data=write(tmp_path, "list", list(TEXTS)), caption_features=tmp_path / "features")
    (batch,) = open_data(config, Captions(12, 16), CPU).batches(4, 1, seed=0)
    assert batch.features[:, -1, 0].tolist() == batch.image_ids.tolist()


@pytest.mark.parametrize(
    ("condition", "flags", "message"),
    [
        (
            Classes(9),
            {"caption_column": "text"},
            "--caption-column: this model is conditioned on classes, leave it out",
        ),
        (Classes(9), {"caption_features": Path()}, "--caption-features: this model is conditioned on classes"),
        (Captions(12, 16), {"class_index": Path(__file__)}, "--class-index: this model is conditioned on captions"),
        (Captions(12, 16), {"short_caption_features": Path()}, "--short-caption-features needs --caption-features"),
        (
            Captions(12, 16),
            {"caption_features": Path(), "text_encoder": "t5"},
            "--caption-features and --text-encoder: features come of one of them, leave the other out",
        ),
    ],
)
def test_flags_that_do_not_go_together(tiny_config: Make, condition: Any, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_data(tiny_config(**flags), condition, CPU)


def test_a_preset_s_own_encoder_gives_way_to_features() -> None:
    """It was not asked for by a flag."""
    own = AlignConfig(model="tiny-text", caption_features=Path(), output_dir=Path("new"))
    source = feature_source(own, Captions(12, 520), CPU)
    check_flags(own, Captions(12, 520))
    assert isinstance(source, FolderFeatures)
    with pytest.raises(ConfigError, match="--caption-features and --text-encoder"):
        check_flags(dataclasses.replace(own, text_encoder="t5"), Captions(12, 520))
