"""Image sets with captions in every layout, and features that tell which caption they are of."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import datasets
import torch
from inputs import grey_png, write_tar

from vapi_fast.data.captions import Caption, has_words
from vapi_fast.runtime.errors import DataError

TEXTS = [f"a photo of number {value}" for value in range(12)]
GIVEN: list[str | None] = [{3: None, 5: " ", 7: "漢字"}.get(value, text) for value, text in enumerate(TEXTS)]
KEPT = [0, 1, 2, 4, 6, 8, 9, 10, 11]  # images whose captions have words
LAYOUTS = ("parquet", "saved", "txt-tar", "json-tar", "metadata.jsonl", "metadata.csv", "list")


def jsonl(path: Path, lines: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def pictures(folder: Path, count: int = len(GIVEN)) -> Path:
    """Picture v is grey of value v."""
    folder.mkdir(parents=True)
    for value in range(count):
        (folder / f"{value}.png").write_bytes(grey_png(value))
    return folder


def write(root: Path, layout: str, captions: list[str | None] = GIVEN) -> Path:
    """Image v has the v-th caption."""
    images = [{"bytes": grey_png(value), "path": f"{value}.png"} for value in range(len(captions))]
    if layout in ("parquet", "saved"):
        root.mkdir(parents=True, exist_ok=True)
        column = "caption_original" if layout == "parquet" else "text"
        features = datasets.Features({"image": datasets.Image(), column: datasets.Value("string")})
        rows = datasets.Dataset.from_dict({"image": images, column: captions}, features=features)
        rows.to_parquet(root / "set.parquet") if layout == "parquet" else rows.save_to_disk(root / "set")
        return root / ("set.parquet" if layout == "parquet" else "set")
    if layout.endswith("tar"):
        root.mkdir(parents=True, exist_ok=True)
        members: dict[str, bytes] = {}
        for value, text in enumerate(captions):
            members[f"{value:03d}.png"] = grey_png(value)
            if text is not None:
                about = {"url": "-", "caption": text}
                members[f"{value:03d}.{layout[:-4]}"] = (
                    text.encode() if layout == "txt-tar" else json.dumps(about).encode()
                )
        return write_tar(root / "set.tar", members)
    pictures(root / "set")
    if layout == "metadata.jsonl":
        jsonl(root / "set" / layout, ({"file_name": f"{v}.png", "caption": text} for v, text in enumerate(captions)))
    elif layout == "metadata.csv":
        with (root / "set" / layout).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [["file_name", "text"], *((f"{v}.png", text) for v, text in enumerate(captions))]
            )
    else:
        texts = ([text, "another"] if text in TEXTS else [text] for text in captions)
        return jsonl(
            root / "part.0.jsonl", ({"image_path": f"set/{v}.png", "text": each} for v, each in enumerate(texts))
        )
    return root / "set"


class Numbered:
    """Features of 1 to 5 positions that hold the caption's line; refuses the lines in `refused`."""

    tokens, width = 5, 3

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        self.refused = refused

    takes = staticmethod(has_words)

    def prepare(self, captions: Iterable[Caption]) -> None:
        pass

    def states(self, caption: Caption) -> torch.Tensor:
        if caption.line in self.refused:
            raise DataError("no features")
        return torch.full((caption.line % 5 + 1, 3), float(caption.line))
