"""Which of several forms of the same work a device takes: the usual one, until another was measured to be faster there.

The forms of one kind of work give the same result but for rounding. `forms.json` holds, by architecture, those that
`python benchmarks/forms.py` found faster in the rates of a GPU check; what it does not name takes the usual form, the
first of FORMS. `VAPI_FAST_FORMS="encoder=float16 wide-attention=matmul"` takes others for a process.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from vapi_fast.runtime.errors import ConfigError

FORMS: dict[str, tuple[str, ...]] = {
    "attention": ("installed", "cudnn", "flash-attn-3"),  # the transformer's: flash-attn, xformers, or PyTorch's choice
    "convolution": ("cudnn", "triton"),  # 3×3, of a tokenizer's blocks; each shape has its own
    "cudnn-benchmark": ("off", "on"),  # cuDNN's algorithms by its heuristics, or by trying them
    "encoder": ("tf32", "float16"),  # of a tokenizer, in which the images become tokens
    "last-convolution": ("three", "eight"),  # channels out of the decoder's, of which three are the image's
    "micro-batch": ("eager", "graph"),  # the transformer's part of one; each number of images has its own
    "wide-attention": ("sdpa", "matmul"),  # of a tokenizer's blocks, one head of all channels
}
VARIABLE = "VAPI_FAST_FORMS"
MEASURED = Path(__file__).with_name("forms.json")

_chosen: dict[str, str] = {}


def form(kind: str, device: torch.device, shape: str = "") -> str:
    """The form of FORMS[kind] that `device` takes; shape: of the work, where each has its own.

    Raises ConfigError for what the environment names and nobody knows.
    """
    found = taken(architecture(device))
    return found.get(f"{kind} {shape}".rstrip()) or found.get(kind, FORMS[kind][0])


def taken(architecture: str) -> dict[str, str]:
    """What an architecture (as `sm_90`; "" for none) has in the place of usual forms, by kind and, where each has its
    own, shape: what `taking` and the environment name, and of other kinds what was measured."""
    chosen = from_environment() | _chosen
    own = {kind: name for kind, name in measured(architecture).items() if kind.split()[0] not in chosen}
    return own | chosen


@contextmanager
def taking(**forms: str) -> Iterator[None]:
    """These forms, whatever was measured, for what is built inside of the `with` block; `_` stands for `-`."""
    global _chosen
    before, _chosen = _chosen, _chosen | checked({kind.replace("_", "-"): name for kind, name in forms.items()})
    try:
        yield
    finally:
        _chosen = before


def from_environment() -> dict[str, str]:
    return parsed(os.environ.get(VARIABLE, ""))


@functools.cache
def parsed(text: str) -> dict[str, str]:
    pairs = (word.partition("=") for word in text.split())
    return checked({kind: name for kind, _, name in pairs})


def checked(forms: Mapping[str, str]) -> dict[str, str]:
    for kind, name in forms.items():
        if name not in FORMS.get(kind.partition(" ")[0], ()):
            known = "; ".join(f"{kind}={'|'.join(names)}" for kind, names in FORMS.items())
            raise ConfigError(f"{VARIABLE}: there is no {kind}={name}: choose of {known}")
    return dict(forms)


@functools.cache
def measured(name: str) -> dict[str, str]:
    """What is faster on an architecture, by kind of work, with the shape where each has its own."""
    return json.loads(MEASURED.read_text(encoding="utf-8")).get(name, {})


def architecture(device: torch.device) -> str:
    """As `sm_90`; "" of what is no GPU, on which nothing was measured."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    from vapi_fast.kernels.launch import device_architecture  # imports Triton

    return device_architecture(device.index)
