"""Values of LlamaGen's public code that our models are tested against; README.md says what each file holds."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent


def read(name: str) -> dict[str, Tensor]:
    """The tensors of `<name>.safetensors`."""
    return load_file(FOLDER / f"{name}.safetensors")


def read_weights(name: str) -> dict[str, Tensor]:
    """The generator weights in `<name>.safetensors`: stored in bfloat16, which holds them exactly, used in float32."""
    prefix = "weights."
    return {key.removeprefix(prefix): value.float() for key, value in read(name).items() if key.startswith(prefix)}


def public_state_dict(name: str) -> dict[str, list[int]]:
    """Key → shape of a state dict of the public code; `layers.*` keys are written out for every layer."""
    entry = json.loads((FOLDER / "state_dicts.json").read_text())[name]
    shapes = {}
    for key, shape in entry["shapes"].items():
        for layer in range(entry["layers"]) if "*" in key else [0]:
            shapes[key.replace("*", str(layer))] = shape
    return shapes


def formula_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights too large to store, from their names; float32, the same bits on every machine (README.md, "Formula")."""
    return {key: torch.from_numpy(formula_weight(key, shape)) for key, shape in shapes.items()}


def formula_weight(key: str, shape: list[int]) -> np.ndarray:
    words = np.random.Philox(key=zlib.crc32(key.encode())).random_raw(math.prod(shape))
    uniform = (words >> np.uint64(40)).astype(np.float32).reshape(shape) / np.float32(2**23) - np.float32(1)
    if len(shape) > 1:
        return uniform * np.float32(math.sqrt(6 / math.prod(shape[1:])))
    return np.float32(1) + uniform / np.float32(2) if key.endswith(".weight") else uniform / np.float32(8)


def relative_error(ours: Tensor, public: Tensor) -> float:
    """‖ours − public‖ / ‖public‖; NaN where either holds NaN, inf where the shapes differ."""
    if ours.shape != public.shape:
        return math.inf
    ours, public = ours.detach().double(), public.detach().double()
    return ((ours - public).norm() / public.norm()).item()
