"""Prompts as Janus-Pro was trained on them: a caption's token ids, by the tokenizer beside the checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vapi_fast.runtime.errors import CheckpointError, DataError
from vapi_fast.runtime.hub import local_path
from vapi_fast.runtime.packages import loaded, require

if TYPE_CHECKING:
    from vapi_fast.data.captions import Caption

BEGIN_IMAGE = "<begin_of_image>"
UNKNOWN = "<unk>"  # of a tokenizer of whole words; Janus-Pro's has none
TEMPLATE = "<|User|>: {}\n\n<|Assistant|>:" + BEGIN_IMAGE


class PromptTokens:
    """Makes prompts of captions; a `FeatureSource` whose features are token ids int64 `[n]`.

    Args:
        checkpoint: a folder with `tokenizer.json`, a file beside one, or a repository of the hub.
        tokens: of the longest prompt that the generator takes.
        bos, begin_image: ids that the generator knows BOS and `<begin_of_image>` by.

    Raises:
        CheckpointError: no tokenizer, or another model's. DataError: the package `tokenizers` is missing.
    """

    width = 0  # a position has no features, but an id

    def __init__(self, checkpoint: Path, tokens: int, *, bos: int, begin_image: int) -> None:
        require(DataError, "reading prompts", "tokenizers")
        from tokenizers import Tokenizer

        checkpoint = local_path(checkpoint)
        path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file, and a prompt needs it: copy it there from the model's page")
        self.tokenizer = loaded(str(path), "copy it again", lambda: Tokenizer.from_file(str(path)))
        self.tokens, self.limit, self.longest, self.bos = tokens, tokens, 0, bos
        self.path, self.unknown = path, self.tokenizer.token_to_id(UNKNOWN)
        found = self.tokenizer.token_to_id(BEGIN_IMAGE)
        if found is None:
            raise CheckpointError(f"{path}: has no {BEGIN_IMAGE}: pass Janus-Pro's own tokenizer.json")
        if found != begin_image:
            raise CheckpointError(
                f"{path}: {BEGIN_IMAGE} is {found}, and {begin_image} in this model: pass its own file"
            )

    def takes(self, caption: str) -> bool:
        """A prompt is not cleaned: any writing is one."""
        return bool(caption.strip())

    def ids(self, caption: str) -> Tensor:
        """A prompt's token ids, int64 `[n]`, BOS first and `<begin_of_image>` last.

        Raises DataError for a prompt that is longer than the generator takes, or without words.
        """
        text = caption.strip()
        if not text:
            raise DataError(f"a prompt has no words: {caption[:80]!r}")
        found = [self.bos, *self.tokenizer.encode(TEMPLATE.format(text), add_special_tokens=False).ids]
        if self.unknown in found:
            raise DataError(f"{text[:80]!r}: has a word that {self.path} does not know: say it in other words")
        if len(found) > self.limit:
            raise DataError(
                f"a prompt has {len(found)} tokens, and the model takes {self.limit}: shorten it ({text[:80]!r} …)"
            )
        return torch.tensor(found)

    def text_ids(self, text: str) -> Tensor:
        """Of a text without a template, BOS first: int64 `[n]`."""
        return torch.tensor([self.bos, *self.tokenizer.encode(text, add_special_tokens=False).ids])

    def prepare(self, captions: Iterable[Caption]) -> None:
        """Take no more `tokens` than the longest prompt of all these has; of a later, longer one the image is left out.

        Prompts that are too long for the generator stay so.
        """
        for caption in captions:
            with contextlib.suppress(DataError):
                self.longest = max(self.longest, len(self.ids(caption.text)))
        self.tokens = self.longest or self.tokens

    def states(self, caption: Caption) -> Tensor:
        found = self.ids(caption.text)
        if len(found) > self.tokens:
            raise DataError(f"a prompt has {len(found)} tokens, and none of the foreseen ones more than {self.tokens}")
        return found
