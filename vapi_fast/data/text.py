"""What text-conditioned generators see of a caption: the states of a T5 encoder, as LlamaGen's training had them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vapi_fast.data.captions import clean_caption
from vapi_fast.data.config import CAPTION_BATCH
from vapi_fast.data.words import WordVectors
from vapi_fast.runtime.checkpoint import identity
from vapi_fast.runtime.errors import DataError
from vapi_fast.runtime.hub import see, to_fetch
from vapi_fast.runtime.packages import loaded, require

ENCODER = "google/flan-t5-xl"
PURPOSE = "a caption's features"


class TextEncoder:
    """The encoder of a T5 and its tokenizer: bf16 on a GPU, as LlamaGen ran it, float32 elsewhere."""

    def __init__(self, source: str | Path | None, device: torch.device) -> None:
        """source: a folder in `transformers`' layout, or a name of Hugging Face's hub; default flan-t5-xl.

        Raises CheckpointError where it cannot be read, and DataError where a package is missing.
        """
        require(DataError, PURPOSE, "transformers", "ftfy")
        source = source or ENCODER

        def read() -> tuple[Any, Any]:
            from transformers import AutoTokenizer, T5EncoderModel
            from transformers.utils.logging import disable_progress_bar

            see(str(source))
            disable_progress_bar()
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            return AutoTokenizer.from_pretrained(source), T5EncoderModel.from_pretrained(source, dtype=dtype)

        advice = f"put the files of {ENCODER} into a folder, and pass --text-encoder FOLDER"
        self.tokenizer, self.model = loaded(f"--text-encoder {source}", advice, read)
        self.model.eval().requires_grad_(False).to(device)

    @property
    def width(self) -> int:
        return self.model.config.d_model

    def encode(self, captions: Sequence[str], tokens: int) -> tuple[Tensor, Tensor]:
        """Features of captions, cleaned first, in the last of `tokens` positions; zeros before them.

        Longer captions are cut off, the end sign last.

        Returns:
            Features float32 `[N,tokens,width]` and a mask bool `[N,tokens]`, False before a caption, on the CPU.

        Raises:
            DataError: a caption of which nothing is left.
        """
        return padded(list(self.states([cleaned(caption) for caption in captions], tokens)), tokens)

    @torch.no_grad()
    def states(self, texts: Sequence[str], tokens: int, batch_size: int = CAPTION_BATCH) -> Iterator[Tensor]:
        """Of cleaned captions, in turn: the states of at most `tokens` positions, on the CPU in the encoder's dtype."""
        for first in range(0, len(texts), batch_size):
            part = list(texts[first : first + batch_size])
            words = self.tokenizer(part, padding=True, truncation=True, max_length=tokens, return_tensors="pt").to(
                self.model.device
            )
            states = self.model(input_ids=words.input_ids, attention_mask=words.attention_mask).last_hidden_state.cpu()
            for row, used in zip(states, words.attention_mask.sum(1).tolist(), strict=True):
                yield row[:used]


def text_encoder(source: str | Path | None, device: torch.device) -> TextEncoder | WordVectors:
    """The encoder `source`: a table of words (`.safetensors`), or what `TextEncoder` takes; errors as of the two."""
    if source is not None and Path(source).suffix == ".safetensors":
        return WordVectors(Path(source))
    return TextEncoder(source, device)


def padded(states: Sequence[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """States `[n,width]` of at least one caption, n ≤ tokens, as `TextEncoder.encode` gives them; or prompts' token ids
    int64 `[n]`, as int64 `[N,tokens]`."""
    dtype = torch.float32 if states[0].is_floating_point() else torch.int64
    features = torch.zeros(len(states), tokens, *states[0].shape[1:], dtype=dtype)
    mask = torch.zeros(len(states), tokens, dtype=torch.bool)
    for row, own in enumerate(states):
        features[row, tokens - len(own) :] = own
        mask[row, tokens - len(own) :] = True
    return features, mask


def cleaned(caption: str) -> str:
    """A caption as the encoder is given it; raises DataError where nothing is left of it."""
    text = clean_caption(caption)
    if not text:
        raise DataError(f"a caption has no words, or none that are left when it is cleaned: {caption[:80]!r}")
    return text


def encoder_to_fetch(source: str | Path | None) -> dict[str, str]:
    """Where the hub has the encoder `source`, by its flag, unless it is on this machine."""
    page = to_fetch(str(source or ENCODER))
    return {"--text-encoder FOLDER": page} if page else {}


def identity_of(source: str | Path | None) -> str:
    """What tells an encoder from another: of a file or folder what it holds, of the hub's its name."""
    if os.path.isfile(source or ENCODER):
        return identity(Path(source or ENCODER))["blake2b"]
    if not os.path.isdir(source or ENCODER):
        return str(source or ENCODER)
    files = sorted(path for path in Path(source or ENCODER).iterdir() if path.is_file() and path.name[0] != ".")
    return json.dumps([[path.name, identity(path)["blake2b"]] for path in files])
