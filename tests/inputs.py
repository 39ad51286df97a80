"""Inputs that people have really handed over, by kind, made of the tiny preset and random pictures.

python tests/inputs.py DIR        writes all of them
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vapi_fast import tiny
from vapi_fast.runtime.checkpoint import load_state_dict

Named = dict[str, Tensor]


def picture(size: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    picture(seed=seed).save(file, "PNG")
    return file.getvalue()


def grey_png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of files with these contents."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def text_encoder(folder: Path, width: int = 16) -> Path:
    """A small random T5 and a tokenizer of whole words, in `transformers`' layout."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "on", "red", "blue", "cup", "cat", "dogs", "table", "two"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    signs = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **signs).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(words)}
    T5EncoderModel(T5Config(**sizes)).save_pretrained(folder)
    return folder


SIDE, PATCH, HEAD, CLIP_WORDS = 24, 8, 64, 20  # of small CLIPs
LETTERS = [*"abcdefghijklmnopqrstuvwxyz&"]
VOCABULARY = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def clip(folder: Path) -> Path:
    """A small random CLIP and its tokenizer of letters, in `transformers`' layout."""
    import transformers

    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    size = {"hidden_size": 2 * HEAD, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": len(VOCABULARY) - 2, "eos_token_id": len(VOCABULARY) - 1}
    text = size | special | {"vocab_size": len(VOCABULARY), "max_position_embeddings": CLIP_WORDS}
    vision = size | {"image_size": SIDE, "patch_size": PATCH}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    louder(model).save_pretrained(folder)
    return folder


def louder(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that tell images apart."""
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter) / (parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 3))
    return model.eval()


def classes(root: Path, *names: str, each: int = 2) -> Path:
    """A folder of class folders."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.png").write_bytes(png(i))
    return root


CLASS_TABLE = "cls_embedding.embedding_table.weight"


def write_checkpoints(folder: Path) -> None:
    """Generators and tokenizers."""
    base, tokenizer = load_state_dict(tiny.FILES.generator), load_state_dict(tiny.FILES.tokenizer)

    def changed(key: str, value: Tensor) -> Named:
        return base | {key: value}

    def vocabulary(size: int) -> Named:
        rows = torch.arange(size) % len(base["output.weight"])
        return base | {key: base[key][rows] for key in ("tok_embeddings.weight", "output.weight")}

    bias, head = "decoder.conv_out.bias", base["output.weight"]
    cache = {"layers.0.attention.kv_cache.k_cache": torch.zeros(2, 6, 64, 32), "causal_mask": torch.ones(2, 4).bool()}
    contents: dict[str, Any] = {
        "nan": changed("output.weight", head * float("nan")),
        "infinite": changed("output.weight", head.half() * 65504 * 65504),
        "vq-nan": tokenizer | {bias: tokenizer[bias] * float("nan")},
        "vocabulary-256": vocabulary(256),
        "vocabulary-600": vocabulary(600),
        "compiled-of-ddp": {"model": {f"_orig_mod.module.{key}": value for key, value in base.items()}},
        "after-sampling": {"model": base | cache, "optimizer": {"state": {}}, "steps": 7},
        "averaged-alone": {"ema": base},
        "no-unconditional": {"model": vocabulary(600), "ema": changed(CLASS_TABLE, base[CLASS_TABLE][:9])},
        "odd-layer": {"model": changed("layers.x.attention.wqkv.weight", torch.zeros(2, 2))},
        "gap-in-layers": {key: value for key, value in base.items() if not key.startswith("layers.2.")},
        "meta": changed("output.weight", head.to("meta")),
        "sparse": changed("output.weight", head.to_sparse()),
        "integer": changed("output.weight", head.long()),
        "complex": changed("output.weight", head.cfloat()),
        "float8": changed("output.weight", head.to(torch.float8_e4m3fn)),
        "flat-table": changed("tok_embeddings.weight", base["tok_embeddings.weight"].flatten()),
        "empty-table": changed("tok_embeddings.weight", torch.zeros(0, head.shape[1])),
        "scalar": changed("norm.weight", torch.tensor(1.0)),
        "control-characters": changed("\x1b[31m\nlayers", torch.zeros(1)),
        "number-keys": {1: head},
        "list": [head],
        "nothing": {},
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
    save_file(base, folder / "safetensors-in-disguise.pt")
    keys = sorted(base)
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        (folder / "shards").mkdir(exist_ok=True)
        save_file({key: base[key].contiguous() for key in part}, folder / "shards" / f"part-{number}.safetensors")
    index = {
        key: f"part-{number}.safetensors" for number, part in enumerate((keys[::2], keys[1::2]), 1) for key in part
    }
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "no-checkpoint").mkdir()


def write_pictures(folder: Path) -> None:
    """Class folders of pictures that are not 8-bit RGB."""
    gray = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    forms: dict[str, list[Image.Image]] = {
        "gray16": [Image.fromarray(gray.astype(np.uint16))],
        "float": [Image.fromarray((gray / 65535).astype(np.float32))],
        "palette": [picture().convert("P")],
        "alpha": [picture().convert("RGBA"), picture().convert("LA")],
        "cmyk": [picture().convert("CMYK")],
    }
    suffixes = {"gray16": "png", "float": "tiff", "palette": "gif", "alpha": "png", "cmyk": "jpg"}
    for form, images in forms.items():
        for name in ("a", "b"):
            (folder / form / name).mkdir(parents=True)
            for i, image in enumerate(images):
                image.save(folder / form / name / f"{i}.{suffixes[form]}")
    endless = folder / "not-finite" / "a"
    endless.mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(endless / f"{i}.tiff")


def write_folders(folder: Path) -> None:
    """Class folders with what systems, splits, links and pipes bring."""
    classes(folder / "system-folders", "n01440764", "n01443537")
    (folder / "system-folders" / "__MACOSX").mkdir()
    (folder / "system-folders" / "__MACOSX" / "._0.png").write_bytes(b"\0\5\26\7")
    for split in ("Train", "Val"):
        classes(folder / "splits" / split, "cat", "dog", each=3 if split == "Train" else 2)
    classes(folder / "numbers", *map(str, range(9)), "10")
    classes(folder / "loops", "cat", "dog")
    for name in ("cat", "dog"):
        (folder / "loops" / name / "all").symlink_to("..")
    classes(folder / "fifo", "cat", "dog")
    os.mkfifo(folder / "fifo" / "cat" / "x.png")
    (folder / "fifo" / "dog" / "zero.png").symlink_to("/dev/zero")


def write_data_sets(folder: Path) -> None:
    """What `datasets` and others write."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(8)], "label": [0, 1] * 4}
    Dataset.from_dict(rows, features=features).with_format("arrow").save_to_disk(folder / "saved-with-format")
    (folder / "validation-shards").mkdir()
    for i in range(2):
        table = pa.table({"image": [{"bytes": png(k), "path": "x.png"} for k in range(6)], "label": [0] * 6})
        pq.write_table(table, folder / "validation-shards" / f"validation-0000{i}-of-00002.parquet")


def write_samples(folder: Path) -> None:
    """Files that are to be scored."""
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "whole.npz", images)
    np.savez(folder / "fortran.npz", np.asfortranarray(images))
    for name, mean in (("1e300", 1e300), ("nan", np.nan), ("complex", 1j), ("text", "x")):
        np.savez(folder / f"statistics-of-{name}.npz", mu=np.full(64, mean), sigma=np.eye(64))
    for name, manifest in (("nested", "[" * 100_000), ("no-manifest", "\0"), ("a-list", "[]")):
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(manifest)
    for name, shape in (
        ("negative", (-8, 32, 32, 3)),
        ("overflowing", (2**62, 32, 32, 3)),
        ("larger-than-it-is", (9, 32, 32, 3)),
        ("flat-bomb", (4, 1, 2**20, 3)),
    ):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        values = bytes(4 * 2**20 * 3) if name == "flat-bomb" else images.tobytes()
        with zipfile.ZipFile(folder / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arr_0.npy", header.getvalue() + values)
    whole = bytearray((folder / "whole.npz").read_bytes())
    for name, offset, value in (("encrypted", 6, 1), ("unknown-compression", 8, 99)):  # in both of a member's headers
        changed = bytearray(whole)
        for signature, place in ((b"PK\3\4", offset), (b"PK\1\2", offset + 2)):
            changed[changed.index(signature) + place] = value
        (folder / f"{name}.npz").write_bytes(changed)


def write_rewards(folder: Path) -> None:
    """Modules for `--reward`."""
    for name, text in {
        "leaving": "import sys\nsys.exit(0)\n",
        "broken": "def reward(images, labels)\n    return images\n",
        "failing": "def reward(images, labels):\n    return images[10_000]\n",
        "quitting": "def reward(images, labels):\n    raise SystemExit(0)\n",
        "not_a_number": "def reward(images, labels):\n    return images.mean((1, 2, 3)) * float('nan')\n",
        "whole_numbers": "def reward(images, labels):\n    return labels\n",
        "truth": "def reward(images, labels):\n    return labels > 3\n",
        "imaginary": "def reward(images, labels):\n    return images.mean((1, 2, 3)) * 1j\n",
        "of_a_wrong_shape": "def reward(images, labels):\n    return images.mean()\n",
    }.items():
        (folder / f"{name}_reward.py").write_text(text)


KINDS: dict[str, Callable[[Path], None]] = {
    "checkpoints": write_checkpoints,
    "pictures": write_pictures,
    "folders": write_folders,
    "data": write_data_sets,
    "samples": write_samples,
    "rewards": write_rewards,
}


def write_all(root: Path) -> Path:
    for kind, write in KINDS.items():
        (root / kind).mkdir(parents=True)
        write(root / kind)
    return root


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
