"""Images with captions, served as `ImageData` serves labelled ones; a batch carries the captions' features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vapi_fast.data.dataset import ImageStream, checked_side, reader
from vapi_fast.data.features import FeatureSource, digest
from vapi_fast.runtime.errors import DataError
from vapi_fast.runtime.packages import require

if TYPE_CHECKING:
    from vapi_fast.data.captions import Caption


class CaptionedData(ImageStream):
    """Images with captions at `source`: what `ImageData` takes, class folders aside, or lists of paths and captions.

    A Hugging Face table has its captions in a column named as one of `caption_files.CAPTION_COLUMNS`, a WebDataset tar
    in `.txt` or `.json` beside the image, a list (`.jsonl`, or an image folder's `metadata.csv`) under the same names
    beside `file_name` or `image_path`, LlamaGen's own lists included. `caption_column` names another; of several
    captions of an image the first with words is taken, or of `NAME:K` the K-th, from 0 on.

    Images without a caption, or with one that `features` does not take, are left out: ids are rows of the rest, and
    the batches' labels are the ids. An image whose features cannot be had is unreadable, as a damaged one is.

    Raises `DataError` as `ImageData` does, and for a set without any caption.
    """

    def __init__(
        self,
        source: str | Path,
        image_size: int,
        *,
        features: FeatureSource,
        split: str | None = None,
        held_out: bool = False,
        caption_column: str | None = None,
    ) -> None:
        checked_side(image_size)
        reader()
        if features.width:
            require(DataError, "reading captions", "ftfy")
        from vapi_fast.data.caption_files import CaptionedRows

        rows = CaptionedRows(Path(source), split, held_out, caption_column, features.takes)
        super().__init__(rows, np.arange(len(rows), dtype=np.int64), image_size)
        self.features = features
        self._captions = rows.captions
        self._about = {"column": rows.column, "left_out": rows.left_out}

    def caption(self, image_id: int) -> str:
        """The caption as the source has it."""
        return self._captions[image_id].text

    def foreseen(self, count: int, seed: int) -> list[Caption]:
        """The captions of the first `count` images of the stream, each once: what `FeatureSource.prepare` takes."""
        return [self._captions[image_id] for image_id in self._stream(np.arange(min(count, len(self))), seed)]

    def summary(self) -> dict[str, Any]:
        """What the set is made of, for `run.json` and to tell it from another."""
        captions = self._about | {"hash": digest("\n".join(caption.text for caption in self._captions))}
        return {"split": self.split, "images": len(self), "classes": {}, "captions": captions}

    def condition(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of images' captions, as of a batch, by the images' ids int64 `[n]`, and their mask."""
        features, mask = self._caption_room(len(labels))
        for place, image_id in enumerate(labels.tolist()):
            self._fill_caption(features[place], mask[place], image_id)
        return torch.from_numpy(features), torch.from_numpy(mask)

    def _caption_room(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        shape, width = (count, self.features.tokens), self.features.width
        features = np.zeros((*shape, width), dtype=np.float32) if width else np.zeros(shape, dtype=np.int64)
        return features, np.zeros(shape, dtype=bool)

    def _fill_caption(self, features: np.ndarray, mask: np.ndarray, image_id: int) -> None:
        states = self.features.states(self._captions[image_id])
        features[-len(states) :] = (states.float() if states.is_floating_point() else states).numpy()
        mask[-len(states) :] = True

    def _room(self, count: int) -> tuple[np.ndarray, ...]:
        return *super()._room(count), *self._caption_room(count)

    def _fill(self, out: tuple[np.ndarray, ...], image_id: int) -> None:
        super()._fill(out, image_id)
        self._fill_caption(*out[1:], image_id)
