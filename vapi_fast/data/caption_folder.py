"""`vapi-fast encode-captions`: captions' features as files in LlamaGen's own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vapi_fast.data.caption_files import Captions
from vapi_fast.data.captions import Caption
from vapi_fast.data.config import EncodeCaptionsConfig
from vapi_fast.data.features import digest
from vapi_fast.data.hub import local_source
from vapi_fast.data.text import TextEncoder, cleaned, identity_of, text_encoder
from vapi_fast.data.words import WordVectors
from vapi_fast.runtime.checkpoint import read_regular, write_atomically
from vapi_fast.runtime.distributed import gather_objects, process_group, rank, world_size
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.progress import progress_bar

MADE_WITH, LISTS = "encoder.json", "lists"


def encode_captions(config: EncodeCaptionsConfig) -> str | None:
    """Write `<out>/<list>/<line>.npy`, float32 `[1,n,width]`, for every caption that has none; several processes share.

    Returns the report, on rank 0. Raises ConfigError where `out` has features of another encoder or of other captions.
    """
    with process_group() as device:
        source, split = local_source(config.data, config.split, False, config.hub_rows)
        found = Captions(source, split, held_out=False, column=config.caption_column)
        about = {
            "encoder": identity_of(config.text_encoder),
            "captions": config.caption_column,
            "tokens": config.tokens,
        }
        lists = check_folder(config.out, about, digests(found.captions))
        missing = [caption for caption in found.captions if not place(config.out, caption).exists()]
        if any(gather_objects(len(missing))):  # all have looked before the first writes
            encoder = text_encoder(config.text_encoder, device)
            if rank() == 0:
                write_atomically(
                    config.out / MADE_WITH, lambda path: path.write_text(json.dumps(about | lists), "utf-8")
                )
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


def digests(captions: list[Caption]) -> dict[str, str]:
    """Of each list its captions and their lines, in short."""
    lists: dict[str, list[str]] = {}
    for caption in captions:
        lists.setdefault(caption.stem, []).append(f"{caption.line} {caption.text}")
    return {stem: digest("\n".join(texts)) for stem, texts in lists.items()}


def check_folder(folder: Path, about: dict[str, Any], lists: dict[str, str]) -> dict[str, dict[str, str]]:
    """`lists` with those whose features lie there already. Raises ConfigError where these are of another encoder, or a
    list of that name has other captions."""
    path = folder / MADE_WITH
    if not path.exists():
        return {LISTS: lists}
    try:
        before = json.loads(read_regular(path))
        there = before.pop(LISTS)
        if not isinstance(there, dict):
            raise TypeError
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        before, there = None, {}
    if before != about:
        raise ConfigError(
            f"--out {folder} holds features of another --text-encoder, --caption-column or --tokens: choose another "
            "folder"
        )
    for stem, known in lists.items():
        if there.get(stem, known) != known:
            raise ConfigError(f"--out {folder} holds features of other captions under {stem}: choose another folder")
    return {LISTS: there | lists}
