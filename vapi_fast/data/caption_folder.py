"""`vapi-fast encode-captions`: captions' features as files in LlamaGen's own layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vapi_fast.data.caption_files import Caption, Captions
from vapi_fast.data.config import EncodeCaptionsConfig
from vapi_fast.data.hub import local_source
from vapi_fast.data.text import TextEncoder, cleaned, identity_of, text_encoder
from vapi_fast.data.words import WordVectors
from vapi_fast.runtime.checkpoint import read_regular, write_atomically
from vapi_fast.runtime.distributed import gather_objects, process_group, rank, world_size
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.progress import progress_bar

MADE_WITH = "encoder.json"


def encode_captions(config: EncodeCaptionsConfig) -> str | None:
    """Write `<out>/<list>/<line>.npy`, float32 `[1,n,width]`, for every caption that has none; several processes share.

    Returns the report, on rank 0. Raises ConfigError where `out` has another encoder's features.
    """
    with process_group() as device:
        source, split = local_source(config.data, config.split, False, config.hub_rows)
        found = Captions(source, split, held_out=False, column=config.caption_column)
        about = {
            "encoder": identity_of(config.text_encoder),
            "captions": config.caption_column,
            "tokens": config.tokens,
        }
        check_folder(config.out, about)
        missing = [caption for caption in found.captions if not place(config.out, caption).exists()]
        if any(gather_objects(len(missing))):  # all have looked before the first writes
            encoder = text_encoder(config.text_encoder, device)
            if rank() == 0:
                write_atomically(config.out / MADE_WITH, lambda path: path.write_text(json.dumps(about), "utf-8"))
            share = sorted(missing, key=lambda caption: len(caption.text))[rank() :: world_size()]
            write(config, encoder, share)
            gather_objects(None)
        if rank():
            return None
        left_out = f", {found.left_out} lines without a caption left out" if found.left_out else ""
        there = len(found.captions) - len(missing)
        return f"{len(missing)} captions of {config.data} encoded into {config.out}, {there} were there{left_out}"


def write(config: EncodeCaptionsConfig, encoder: TextEncoder | WordVectors, captions: list[Caption]) -> None:
    with progress_bar(len(captions), desc="captions", unit="caption", disable=rank() > 0) as progress:
        texts = [cleaned(caption.text) for caption in captions]
        found = encoder.states(texts, config.tokens, config.batch_size)
        for caption, states in zip(captions, found, strict=True):
            values = states.float().numpy()[None]
            path = place(config.out, caption)
            write_atomically(path, lambda temporary, values=values: np.save(temporary, values))
            progress.update()


def place(folder: Path, caption: Caption) -> Path:
    return folder / caption.stem / f"{caption.line}.npy"


def check_folder(folder: Path, about: dict[str, object]) -> None:
    """Raise ConfigError where features of another encoder, or of other captions, lie there."""
    path = folder / MADE_WITH
    if not path.exists():
        return
    try:
        before = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        before = None
    if before != about:
        raise ConfigError(
            f"--out {folder} holds features of another --text-encoder, --caption-column or --tokens: choose another "
            "folder"
        )
