"""Samples on disk: PNG files, or one `.npz` in the ADM evaluator's layout, each complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vapi_fast.data.geneval import METADATA, SAMPLES, Prompt, folder_name, sample_name
from vapi_fast.data.image_sets import IMAGES_KEY, SAMPLES_FILE, SAMPLES_FOLDER, NpzImages, read_picture
from vapi_fast.runtime.checkpoint import write_atomically
from vapi_fast.runtime.errors import DataError

WRITE_THREADS = 4
PARTS_FOLDER = "parts"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # its last chunk
PART = re.compile(r"\d{6,}\.safetensors")
# What `write_atomically` calls the temporary files of ours.
LEFTOVER = re.compile(
    r"\.((manifest\.json|samples\.npz|(contact_sheet|comparison|entropy|\d{4,})\.png|\d{6,}\.safetensors|"
    r"metadata\.jsonl)\.\w+\.tmp\.(json|npz|png|safetensors|jsonl))"
)
MERGE_ROWS = 256  # images held at once while the .npz is written


class SampleFiles(Protocol):
    """`count` samples in a folder that several processes fill."""

    def missing(self) -> Tensor:
        """Ids int64 of the samples that are not there."""

    def add(self, ids: Sequence[int], pixels: Tensor) -> None:
        """Write samples, uint8 `[n,3,H,W]`; perhaps in the background, until the next call."""

    def flush(self) -> None:
        """Wait until everything added is on disk."""

    def finish(self) -> None:
        """Called once, by one process, when all are there."""

    def read(self, ids: Sequence[int]) -> Tensor:
        """Samples of a finished set, uint8 `[n,3,H,W]`."""

    def name(self, index: int) -> str:
        """The file in the folder that holds a sample."""


class PngFiles:
    """`images/000000.png`, …"""

    def __init__(self, out: Path, count: int) -> None:
        self.out = out
        self.count = count
        self.pool = ThreadPoolExecutor(WRITE_THREADS)
        self.pending: list[Future[None]] = []

    def name(self, index: int) -> str:
        return f"{SAMPLES_FOLDER}/{index:06d}.png"

    def path(self, index: int) -> Path:
        return self.out / self.name(index)

    def missing(self) -> Tensor:
        return torch.tensor([i for i in range(self.count) if not is_whole_png(self.path(i))], dtype=torch.int64)

    def add(self, ids: Sequence[int], pixels: Tensor) -> None:
        self.flush()
        images = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self.pending = [self.pool.submit(self._write, i, image) for i, image in zip(ids, images, strict=True)]

    def flush(self) -> None:
        for written in self.pending:
            written.result()
        self.pending = []

    def finish(self) -> None:
        self.flush()

    def read(self, ids: Sequence[int]) -> Tensor:
        pictures = np.stack([read_picture(self.path(index)) for index in ids])
        return torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())

    def _write(self, index: int, image: np.ndarray) -> None:
        picture = Image.fromarray(image)
        write_atomically(self.path(index), lambda temporary: picture.save(temporary, format="PNG"))


class GenevalFiles(PngFiles):
    """GenEval's layout: `00000/metadata.jsonl`, `00000/samples/0000.png`, …; sample i is of prompt i mod N."""

    def __init__(self, out: Path, count: int, prompts: Sequence[Prompt]) -> None:
        super().__init__(out, count)
        self.prompts = prompts

    def name(self, index: int) -> str:
        number, prompt = divmod(index, len(self.prompts))
        return sample_name(prompt, number)

    def finish(self) -> None:
        super().finish()
        for number, prompt in enumerate(self.prompts[: self.count]):
            text = json.dumps(prompt.to_json()) + "\n"
            path = self.out / folder_name(number) / METADATA
            write_atomically(path, lambda temporary, text=text: temporary.write_text(text, "utf-8"))


class NpzFiles:
    """`samples.npz` with uint8 `arr_0` `[N,H,W,3]`, merged from `parts/` when all samples are there."""

    def __init__(self, out: Path, count: int) -> None:
        self.path = out / SAMPLES_FILE
        self.folder = out / PARTS_FOLDER
        self.count = count

    def missing(self) -> Tensor:
        if self.path.exists():
            present = len(NpzImages(self.path))
            if present != self.count:
                raise DataError(f"{self.path} holds {present} images, expected {self.count}: choose another folder")
            return torch.empty(0, dtype=torch.int64)
        absent = torch.ones(self.count, dtype=torch.bool)
        for ids, _ in self._read_parts():
            absent[ids] = False
        return absent.nonzero()[:, 0]

    def add(self, ids: Sequence[int], pixels: Tensor) -> None:
        part = {"ids": torch.tensor(ids), "images": pixels.permute(0, 2, 3, 1).contiguous()}
        path = self.folder / f"{ids[0]:06d}.safetensors"

        def save(temporary: Path) -> None:
            try:
                save_file(part, temporary)
            except SafetensorError as error:  # a full disk, for one
                raise OSError(str(error)) from error

        write_atomically(path, save)

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        if not self.path.exists():
            write_atomically(self.path, self._merge)
        delete_own(self.folder, PART)
        with contextlib.suppress(OSError):  # something else lies there, or it is a link
            self.folder.rmdir()

    def read(self, ids: Sequence[int]) -> Tensor:
        images = NpzImages(self.path)
        return torch.cat([next(images.batches(index, index + 1, 1)) for index in ids])

    def name(self, index: int) -> str:
        return SAMPLES_FILE

    def _read_parts(self) -> list[tuple[Tensor, Any]]:
        """Ids int64 `[n]` and images uint8 `[n,H,W,3]` of each part, these mapped: rows are read when they are taken.

        Raises DataError where a part holds anything else, or images of another size than the first's.
        """
        parts = []
        for path in sorted(path for path in self.folder.glob("*") if PART.fullmatch(path.name)):
            with damage_named(path), safe_open(regular(path), framework="pt") as part:
                ids, images = part.get_tensor("ids"), part.get_slice("images")
                shape, size = images.get_shape(), (parts[0][1] if parts else images).get_shape()[1:]
                if ids.dtype != torch.int64 or ids.ndim != 1 or not ((ids >= 0) & (ids < self.count)).all():
                    raise ValueError(f"its ids are not whole numbers of 0 to {self.count - 1}")
                if images.get_dtype() != "U8" or len(shape) != 4 or shape != [len(ids), *size] or shape[3] != 3:
                    raise ValueError(f"{len(ids)} ids, and images {images.get_dtype()} {shape} beside others of {size}")
            parts.append((ids, images))
        return parts

    def _merge(self, temporary: Path) -> None:
        """Write all parts in the order of their ids, without holding them in memory."""
        parts = self._read_parts()
        place = torch.full((self.count, 2), -1)  # part and row of each id
        for number, (ids, _) in enumerate(parts):
            place[ids] = torch.stack([torch.full_like(ids, number), torch.arange(len(ids))], dim=1)
        if (place < 0).any():
            raise DataError(f"{self.folder} lacks some of the {self.count} samples: run the same command again")
        shape = (self.count, *parts[0][1].get_shape()[1:])
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with (
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            archive.open(zipfile.ZipInfo(f"{IMAGES_KEY}.npy"), "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            for rows in place.split(MERGE_ROWS):
                member.write(torch.stack([parts[part][1][row] for part, row in rows.tolist()]).numpy().tobytes())


FORMATS: dict[str, type[SampleFiles]] = {"png": PngFiles, "npz": NpzFiles}


def is_whole_png(path: Path) -> bool:
    """Whether there is a file that ends as a PNG does: one that a full disk or a lost machine cut is drawn again."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - len(PNG_END), 0))
        return file.read() == PNG_END


def regular(path: Path) -> Path:
    if not path.is_file():
        raise OSError("not a regular file")
    return path


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it, and run the same command again") from error


def remove_leftovers(out: Path) -> None:
    """Delete the temporary files of a run that was killed while it wrote."""
    prompts = [folder for folder in out.glob("[0-9]*") if not folder.is_symlink()]
    below = (out / SAMPLES_FOLDER, out / PARTS_FOLDER, *(folder / SAMPLES for folder in prompts))
    for folder in (out, *prompts, *below):
        delete_own(folder, LEFTOVER)


def delete_own(folder: Path, names: re.Pattern[str]) -> None:
    """Delete the regular files with such names; nothing through a link, which leads to what may be another's."""
    for path in (
        () if folder.is_symlink() and folder.name in (SAMPLES_FOLDER, PARTS_FOLDER, SAMPLES) else folder.glob("*")
    ):
        if names.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)
