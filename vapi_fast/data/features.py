"""Captions' features: encoded once and cached by content, or read from a folder in LlamaGen's own layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vapi_fast.data.captions import Caption, has_words
from vapi_fast.data.config import CAPTION_BATCH, SHORT_SHARE
from vapi_fast.data.text import ENCODER, TextEncoder, cleaned, identity_of, text_encoder
from vapi_fast.data.words import WordVectors
from vapi_fast.runtime.checkpoint import read_regular, write_atomically
from vapi_fast.runtime.distributed import gather_objects, number_in_environment, rank, world_size
from vapi_fast.runtime.errors import ConfigError, DataError, Error, warn
from vapi_fast.runtime.packages import require
from vapi_fast.runtime.progress import progress_bar

SHARD = 512  # captions in a file of the cache: what a crash loses at most, on each rank; whole batches
T = TypeVar("T")


class FeatureSource(Protocol):
    """Features of captions, `[n,width]` with n ≤ `tokens`; where `width` is 0, their token ids int64 `[n]`."""

    tokens: int
    width: int

    def takes(self, caption: str) -> bool:
        """Whether there is anything to make features of: images whose caption is not taken are left out."""

    def prepare(self, captions: Iterable[Caption]) -> None:
        """Have the features of all these ready; all ranks call it, before the generator takes the device's memory."""

    def states(self, caption: Caption) -> Tensor:
        """One caption's features, at any time and in any thread; a DataError makes its image unreadable."""


def cache_folder() -> Path:
    """Where features are cached by default: beside what torch.hub has fetched."""
    return Path(torch.hub.get_dir()) / "vapi-fast" / "captions"


class CachedFeatures:
    """Features by `encoder` (as `TextEncoder` takes it), in a folder that runs and their ranks share.

    A caption's key is a hash of its cleaned text, its folder's name one of the encoder, its dtype and `tokens`; files
    are safetensors of up to `SHARD` captions, complete or absent, and a damaged one is made again.

    Raises:
        ConfigError: the encoder's states are not `width` wide.
    """

    def __init__(
        self, encoder: str | Path | None, device: torch.device, tokens: int, width: int, folder: Path | None = None
    ) -> None:
        require(DataError, "caching captions' features", "safetensors")
        self.encoder, self.device = encoder, device
        self.tokens, self.width = tokens, width
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        about = json.dumps([identity_of(encoder), str(self.dtype), tokens, width])
        self.folder = (folder or cache_folder()) / digest(about)
        self._keys: dict[str, str] = {}  # of captions met: cleaning takes longer than reading
        self._files: dict[Path, Any] = {}
        self._places: dict[str, Any] = {}  # the open file that a key is in
        self._late: dict[str, Tensor] = {}
        self._spare: TextEncoder | WordVectors | None = None
        self._lock = Lock()

    takes = staticmethod(has_words)

    def prepare(self, captions: Iterable[Caption]) -> None:
        """Encode what the cache lacks, a share of it on each rank; the encoder leaves the device again."""
        texts: dict[str, str] = {}
        for text in dict.fromkeys(caption.text for caption in captions):
            if self._keys.get(text) in self._places:
                continue
            clean = cleaned(text)
            self._keys[text] = digest(clean)
            texts[self._keys[text]] = clean
        everyone = rank(), world_size()
        # Then by machine, as others may have folders of their own.
        own = number_in_environment("LOCAL_RANK", 0), number_in_environment("LOCAL_WORLD_SIZE", 1)
        for place, places in (everyone, own if world_size() > 1 else everyone):
            missing = self._missing(texts)
            if not any(gather_objects(len(missing))):  # all have looked before the first writes
                return
            failed = None
            try:
                self._encode(dict(share_of(missing, place, places)))
            except Error as error:
                failed = error
            if said := next(filter(None, gather_objects(failed and str(failed))), None):
                raise failed or DataError(said)
        self._missing(texts)

    def states(self, caption: Caption) -> Tensor:
        """From the cache; of a caption that was not foreseen encoded now, on the CPU."""
        text = caption.text
        key = self._keys.get(text) or self._keys.setdefault(text, digest(cleaned(text)))
        if (file := self._places.get(key)) is not None:
            return file.get_tensor(key)
        with self._lock:
            if key not in self._late:
                self._spare = self._spare or self._loaded(torch.device("cpu"))
                (found,) = self._spare.states([cleaned(text)], self.tokens)
                self._late[key] = found.to(self.dtype)
        return self._late[key]

    def _missing(self, texts: Mapping[str, str]) -> list[tuple[str, str]]:
        """Keys and cleaned captions that no file has, those of a length side by side; files that are new are opened."""
        from safetensors import SafetensorError, safe_open

        for path in sorted(self.folder.glob("[!.]*.safetensors")):  # not those being written
            if path in self._files:
                continue
            try:
                self._files[path] = file = safe_open(path, "pt")
            except FileNotFoundError:  # another process has found it damaged
                continue
            except (SafetensorError, OSError) as error:
                warn(f"{path}: damaged ({error}); its captions are encoded again")
                path.unlink(missing_ok=True)
                continue
            self._places |= dict.fromkeys(file.keys(), file)
        return sorted(
            ((key, text) for key, text in texts.items() if key not in self._places),
            key=lambda each: (len(each[1]), each),
        )

    def _encode(self, texts: Mapping[str, str]) -> None:
        if not texts:
            return
        encoder, items = self._loaded(self.device), list(texts.items())
        with progress_bar(len(items), desc="captions", unit="caption", disable=rank() > 0) as progress:
            for first in range(0, len(items), SHARD):
                keys, part = zip(*items[first : first + SHARD], strict=True)
                found: dict[str, Tensor] = {}
                for key, states in zip(keys, encoder.states(part, self.tokens, CAPTION_BATCH), strict=True):
                    found[key] = states.to(self.dtype, copy=True)
                    progress.update()
                self._save(found)
        del encoder
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _save(self, found: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        path = self.folder / f"{digest(' '.join(found))}.safetensors"
        try:
            write_atomically(path, lambda temporary: save_file(found, temporary))
        except OSError as error:
            raise Error(
                f"captions' features could not be written to {self.folder}: {error.strerror or error}; pass a "
                "--caption-cache with room that can be written to"
            ) from error

    def _loaded(self, device: torch.device) -> TextEncoder | WordVectors:
        return checked_encoder(self.encoder, device, self.width)


def share_of(items: Sequence[T], place: int, places: int) -> list[T]:
    """One of several parts, of the encoder's whole batches: how a state is rounded depends on who is in its batch."""
    firsts = range(place * CAPTION_BATCH, len(items), places * CAPTION_BATCH)
    return [each for first in firsts for each in items[first : first + CAPTION_BATCH]]


def checked_encoder(source: str | Path | None, device: torch.device, width: int) -> TextEncoder | WordVectors:
    """The encoder; raises ConfigError where its states have another width than the generator takes."""
    encoder = text_encoder(source, device)
    if encoder.width != width:
        raise ConfigError(
            f"--text-encoder {source or ENCODER}: its states are {encoder.width} wide, this checkpoint takes {width}"
        )
    return encoder


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class FolderFeatures:
    """Features as LlamaGen keeps them: `<folder>/<stem>/<line>.npy`, float32 `[1,n,width]`.

    Args:
        short: another such folder, of shorter captions of the same images; the share `short_share` of the images, as
            their places in the lists decide, has its features in place of the first one's.
    """

    def __init__(
        self, folder: Path, tokens: int, width: int, short: Path | None = None, short_share: float = SHORT_SHARE
    ) -> None:
        self.folder, self.short, self.short_share = folder, short, short_share
        self.tokens, self.width = tokens, width

    takes = staticmethod(has_words)

    def prepare(self, captions: Iterable[Caption]) -> None:
        """Raises DataError where the first caption's features, or the first short one's, are none of the model's."""
        first: dict[Path, Caption] = {}
        for caption in captions:
            first.setdefault(self._folder_of(caption), caption)
            if len(first) > (self.short is not None):
                break
        for caption in first.values():
            self.states(caption)

    def states(self, caption: Caption) -> Tensor:
        path = self._folder_of(caption) / caption.stem / f"{caption.line}.npy"
        if not path.is_file():
            raise DataError(f"{path}: no features of this caption; vapi-fast encode-captions makes them")
        try:
            states = np.load(BytesIO(read_regular(path)), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: cannot be read as a .npy array ({error}); make it again") from error
        fits = states.ndim == 3 and states.shape[0] == 1 and 1 <= states.shape[1] <= self.tokens
        if not fits or states.shape[2] != self.width or states.dtype.kind != "f":
            raise DataError(
                f"{path}: is {states.dtype} {list(states.shape)}, this checkpoint takes float32 "
                f"[1, 1 to {self.tokens}, {self.width}]"
            )
        found = torch.from_numpy(states[0]).float()
        if not found.isfinite().all():
            raise DataError(f"{path}: has values that are not finite; make it again")
        return found

    def _folder_of(self, caption: Caption) -> Path:
        place = digest(f"{caption.stem}/{caption.line}")
        return self.short if self.short and int(place[:8], 16) < self.short_share * 2**32 else self.folder
