"""Read LlamaGen's checkpoint files, write ours atomically, and explain what is wrong with the ones that do not fit."""

from __future__ import annotations

import os
import re
import tempfile
import textwrap
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vapi_fast.runtime.errors import CheckpointError
from vapi_fast.runtime.packages import require

CONTAINERS = ("model", "module", "state_dict")  # where LlamaGen's training scripts put the weights; or bare (FSDP)


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights in a `.pt` file (bare, or under `model`, `module` or `state_dict`) or a `.safetensors` file."""
    state = load_file_checked(path)
    for key in CONTAINERS:
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    state = {str(key).removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state.items()}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path}: no weights found; expected tensors at the top level or under {', '.join(CONTAINERS)}, "
            f"got {', '.join(list(state)[:5]) or 'an empty file'}; pass a checkpoint of weights"
        )
    return state


def load_file_checked(path: str | Path) -> dict[str, Any]:
    """Unpickle (`weights_only`) or read safetensors; raises CheckpointError with one line for any damage."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file; check the path")
    safetensors = path.suffix == ".safetensors"
    if safetensors:
        require(CheckpointError, f"reading {path}", "safetensors")
    try:
        if safetensors:
            from safetensors.torch import load_file

            return load_file(path)
        # LlamaGen's training scripts store their command line beside the weights.
        with torch.serialization.safe_globals([Namespace]):
            # Mapped pages go to the device without a copy in memory; the format before PyTorch 1.6 cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # on damaged bytes the unpickler raises whatever its next step happens to
        raise CheckpointError(f"{path}: {unreadable(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: holds a {type(state).__name__}, expected a state dict; save the model's weights alone"
        )
    return state


def unreadable(error: Exception) -> str:
    """Why a checkpoint could not be read, and what to do about it, in one line."""
    reason = str(error)
    code = re.search(r"GLOBAL ([\w.]+)", reason)
    if code:
        return f"holds the Python object {code[1]}, which could run code and is not loaded; save its state dict alone"
    # torch's own advice for a bad pickle is to load it unsafely: not repeated here.
    known = reason and "weights_only" not in reason
    detail = textwrap.shorten(reason.splitlines()[0], 160, placeholder=" …") if known else type(error).__name__
    return f"cannot be read, truncated or not a PyTorch checkpoint ({detail}); copy or download it again"


def load_into(module: nn.Module, state: dict[str, Tensor], path: str | Path, hint: str = "") -> None:
    """Give `module` the weights `state`; every key and shape must match. `hint` says what to do when they do not.

    A module on the meta device takes the tensors themselves, in its own dtype; elsewhere they are copied.
    """
    expected = module.state_dict()
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    problems = []
    if shapes:
        problems.append("; ".join(shapes[:2]) + (f" and {len(shapes) - 2} more" if len(shapes) > 2 else ""))
    if missing:
        problems.append(f"{len(missing)} weights missing ({', '.join(missing[:2])})")
    if extra:
        problems.append(f"{len(extra)} unknown weights ({', '.join(extra[:2])})")
    if problems:
        raise CheckpointError(
            f"{path}: does not fit this {type(module).__name__}: {'; '.join(problems)}{': ' + hint if hint else ''}"
        )
    if all(value.is_meta for value in expected.values()):
        state = {key: value.to(expected[key].dtype).contiguous() for key, value in state.items()}
        module.load_state_dict(state, assign=True)
    else:
        module.load_state_dict(state)


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` with a name beside `path`, then rename: readers see the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_generator(path: str | Path, state: dict[str, Tensor]) -> None:
    """Write a generator's weights as LlamaGen's FSDP export does: a bare state dict of CPU tensors."""
    state = {key: value.cpu() for key, value in state.items()}
    write_atomically(path, lambda temporary: torch.save(state, temporary))
