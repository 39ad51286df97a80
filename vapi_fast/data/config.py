"""What `vapi-fast encode-captions` does, and defaults that other commands share. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.options import MOST, check, check_files, check_output, fill_in, option

HUB_ROWS = 50_000
SHORT_SHARE = 0.3  # of LlamaGen's training
CAPTION_TOKENS = 120
CAPTION_BATCH = 32  # captions in the encoder at once


@dataclass(frozen=True, kw_only=True)
class EncodeCaptionsConfig:
    """One `vapi-fast encode-captions`: whose captions, by which encoder, into which folder.

    Raises:
        ConfigError: a field out of range, or a missing file.
    """

    data: Path = option(
        help="captions: `.jsonl` lists, with or without images, or anything else that `align --data` takes captions of",
        file="file, folder or hub",
    )
    out: Path = option(
        help="folder of the features, `OUT/<list>/<line>.npy` as LlamaGen's; the same command goes on where it stopped"
    )
    split: str | None = option(None, "which split of `--data`, in any case", shown="train, or the only one")
    hub_rows: int = option(HUB_ROWS, "rows of a `hub:` data set, from its start on", at_least=1, at_most=MOST)
    caption_column: str | None = option(
        None,
        "where the captions are; `NAME:K`: of several of an image the K-th, from 0 on (LlamaGen's lists: `text:1`)",
        shown="a usual name; the first of several",
    )
    text_encoder: str | None = option(None, "T5: folder, or name on Hugging Face's hub", shown="google/flan-t5-xl")
    tokens: int = option(
        CAPTION_TOKENS, "of a caption, the end sign included; more are cut off", at_least=1, at_most=512
    )
    batch_size: int = option(CAPTION_BATCH, "captions in the encoder at once", at_least=1, at_most=MOST)

    def __post_init__(self) -> None:
        fill_in(self, {})
        check(self)
        check_files(self)
        check_output("out", self.out)
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a file: pass a folder")
