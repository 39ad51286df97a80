"""A text encoder in 36 kB: what the text presets' generators see of a caption."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vapi_fast.runtime.checkpoint import load_file_checked
from vapi_fast.runtime.errors import CheckpointError, DataError

FREQUENCIES = (1.0, 0.5, 0.25, 0.125)  # radians a word
POSITION = 2 * len(FREQUENCIES)


class WordVectors:
    """For each word its vector, the vector of the word before it and its place: as `TextEncoder`, by a table.

    The file holds `vectors` `[words, n]`, and the words in its metadata. Raises CheckpointError for another file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        state = load_file_checked(path)
        with safe_open(path, "pt") as file:
            words = json.loads((file.metadata() or {}).get("words", "[]"))
        vectors = state.get("vectors")
        if vectors is None or vectors.ndim != 2 or len(vectors) != len(words) or not words:
            raise CheckpointError(f"{path}: not a table of words' vectors: pass the words.safetensors of a text preset")
        self.vectors = vectors.float()
        self.rows = {word: row for row, word in enumerate(words)}

    @property
    def width(self) -> int:
        return 2 * self.vectors.shape[1] + POSITION

    def states(self, texts: Sequence[str], tokens: int, batch_size: int = 1) -> Iterator[Tensor]:
        """Of captions, in turn: float32 `[n,width]` of at most `tokens` words; DataError for a word that it lacks."""
        for text in texts:
            words = text.split()[:tokens]
            if unknown := [word for word in words if word not in self.rows]:
                raise DataError(
                    f"{text[:80]!r}: {unknown[0]!r} is none of the {len(self.rows)} words of this preset's captions: "
                    "say it as GenEval does, such as `a photo of a red apple and a blue car`"
                )
            own = self.vectors[[self.rows[word] for word in words]]
            before = torch.cat([torch.zeros_like(own[:1]), own[:-1]])
            angles = torch.arange(len(words))[:, None] * torch.tensor(FREQUENCIES)
            yield torch.cat([own, before, angles.sin(), angles.cos()], dim=1)
