"""Read LlamaGen's checkpoint files, write ours atomically, and explain what is wrong with the ones that do not fit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
import textwrap
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vapi_fast.runtime.errors import CheckpointError, one_line, warn
from vapi_fast.runtime.hub import CONSOLIDATED, local_path
from vapi_fast.runtime.packages import require

CONTAINERS = ("model", "module", "state_dict")  # where LlamaGen's training scripts put the weights; or bare (FSDP)
AVERAGES = ("ema", "model_ema", "ema_state_dict")  # weights averaged over the training's steps
# Parts of a key that say how a module was wrapped, not what it is; `module` and `model` count in front only.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
LEADING = {"module", "model"}
# What sampling and training leave among the weights: caches, masks, tables, counters.
LEFTOVERS = {
    "kv_cache",
    "k_cache",
    "v_cache",
    "cache_k",
    "cache_v",
    "causal_mask",
    "attn_mask",
    "position_ids",
    "freqs_cis",
    "rotary",
    "inv_freq",
    "cos_cached",
    "sin_cached",
    "_extra_state",
    "num_batches_tracked",
    "codebook_used",
}
DEEPEST = 8  # containers in each other; one can hold itself
FINGERPRINT_BYTES = 1 << 20  # of a file's start, middle and end
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK_BYTES = 64, 1 << 16  # spread over the file
SHOWN = 3  # of what was left out
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # that are cast to a model's own


def load_state_dict(path: str | Path, *, averaged: bool = False, skip: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The weights in a file or folder, by the names that the model itself has for them.

    A file is read by its content: PyTorch's (bare, under `model`, `module` or `state_dict`, or under another name if
    there is but one dictionary of tensors) or safetensors. A folder has an index of shards (`*.index.json`), or one
    file of a usual name. Prefixes of wrappers go, and so does what is no weight; standard error says what, in a line.

    Args:
        averaged: the exponential moving average instead of the weights. It is taken, and said, also where it is all
            there is.
        skip: what the names of weights begin with that are of no concern here: they are neither read nor checked.

    Raises:
        CheckpointError: nothing that could be read, or a weight that is no finite, dense, floating-point tensor.
    """
    path = Path(path)
    state = contained(load_file_checked(path), path, averaged)
    state = {key: value for key, value in state.items() if not (skip and unwrapped(str(key)).startswith(skip))}
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        found = ", ".join(printable(key) for key in list(state)[:5])
        raise CheckpointError(
            f"{path}: no weights found; expected tensors at the top level or under {', '.join(CONTAINERS)}, "
            f"got {found or 'an empty file'}; pass a checkpoint of weights"
        )
    weights: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = unwrapped(key)
        if not LEFTOVERS.intersection(name.split(".")):
            check_weight(value, f"{path}: {printable(key)}")
            if name in weights:
                raise CheckpointError(f"{path}: holds {printable(name)} twice, under several prefixes: save it once")
            weights[name] = value
    left_out = [key for key in map(str, state) if unwrapped(key) not in weights]
    if left_out:
        named = ", ".join(printable(key) for key in left_out[:SHOWN]) + (", …" if len(left_out) > SHOWN else "")
        warn(f"{path}: left out {len(left_out)} entries that are no weights ({named})")
    return weights


def contained(state: dict[Any, Any], path: Path, averaged: bool) -> dict[Any, Any]:
    """The weights' own dictionary in what a file holds."""
    if averaged and not any(isinstance(state.get(key), dict) for key in AVERAGES):
        raise CheckpointError(f"{path}: has no averaged weights ({', '.join(AVERAGES)}): leave --ema out")
    keys = AVERAGES if averaged else (*CONTAINERS, *AVERAGES)
    for _ in range(DEEPEST):
        there = [key for key in keys if isinstance(state.get(key), dict)]
        if not there:
            break
        key = next((key for key in there if state[key]), None)
        if key is None:
            return {}
        if key in AVERAGES:
            if not averaged:
                warn(f"{path}: holds averaged weights ({key}) alone: they are taken")
            return state[key]
        state = state[key]
    if not any(isinstance(value, Tensor) for value in state.values()):
        others = [value for value in state.values() if holds_weights(value)]
        return others[0] if len(others) == 1 else {}
    return state


def holds_weights(value: object) -> bool:
    """Whether it is a dictionary with tensors by name; an optimizer's has them by number."""
    return isinstance(value, dict) and any(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def unwrapped(key: str) -> str:
    """A weight's name without the wrappers around the modules that hold it."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in LEADING:
        parts = parts[1:]
    return ".".join(parts)


def check_weight(value: Tensor, name: str) -> None:
    """Raise CheckpointError for a tensor that cannot be a weight; reading through it costs what reading it costs."""
    kind = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        form = "on the meta device" if value.is_meta else "quantized" if value.is_quantized else "sparse"
        raise CheckpointError(f"{name} is {form}, expected a dense tensor: save the whole weights")
    if value.dtype not in DTYPES:
        raise CheckpointError(f"{name} is of type {kind}, expected float32, float16, bfloat16 or float64")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{name} repeats {value.untyped_storage().nbytes()} bytes: save the whole weights")
    if not value.numel():
        raise CheckpointError(f"{name} is empty, {list(value.shape)}: save the whole weights")
    low, high = (extreme.float() for extreme in value.aminmax())
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(
            f"{name} has values that are not finite in float32: pass a checkpoint from before they went wrong"
        )


def printable(key: object) -> str:
    """A key as one line shows it, cut down to a readable length."""
    text = one_line(key)
    return textwrap.shorten(text, 80, placeholder=" …") if len(text) > 80 else text


def load_file_checked(path: str | Path) -> dict[str, Any]:
    """What a file holds, or all files of a folder: unpickled (`weights_only`), or by safetensors, as its content is.

    Of `hub:owner/name…` it is the copy on this machine, fetched if need be. Raises CheckpointError with one line for
    any damage.
    """
    path = local_path(path)
    if path.is_dir():
        return load_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file; check the path")
    safetensors = is_safetensors(path)
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


def is_safetensors(path: Path) -> bool:
    """By suffix, or whatever its suffix by content: the length of a JSON header, and the header."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def checkpoint_files(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, or of a folder the one of a usual name, or its index and the shards in that.

    Raises CheckpointError for a folder without either, or an index that cannot be read or names what is not there.
    """
    if not path.is_dir():
        return [path]
    indices = sorted(path.glob("*.index.json"))
    if indices:
        return [indices[0], *(path / name for name in sorted(set(shards_of(indices[0]).values())))]
    found = [path / name for name in CONSOLIDATED if (path / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{path}: is a folder without a checkpoint that is known (*.index.json, {', '.join(CONSOLIDATED)}); "
            "pass the file itself"
        )
    return found[:1]


def identity(path: Path) -> dict[str, Any]:
    """Name, size and fingerprint of an input: of all of it, or of samples of its files where they are large."""
    path = local_path(path)
    digest, total = hashlib.blake2b(digest_size=16), 0
    for each in checkpoint_files(path):
        size = each.stat().st_size
        total += size
        spans = [(start, FINGERPRINT_BYTES) for start in (0, (size - FINGERPRINT_BYTES) // 2, size - FINGERPRINT_BYTES)]
        spans += [(size * block // FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK_BYTES) for block in range(FINGERPRINT_BLOCKS)]
        if size <= sum(length for _, length in spans):
            spans = [(0, size)]
        digest.update(str(size).encode())
        with each.open("rb") as file:
            for start, length in spans:
                file.seek(start)
                digest.update(file.read(length))
    return {"name": path.name, "bytes": total, "blake2b": digest.hexdigest()}


def shards_of(index: Path) -> dict[str, str]:
    """The file beside the index that each weight is in."""
    try:
        shards = json.loads(read_regular(index))["weight_map"]
        names = {str(name) for name in shards.values()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: is no index of weights ({type(error).__name__}); copy it again") from error
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: names files outside of its folder; copy it again")
    for name in sorted(names):
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names the shard {printable(name)}, which is not beside it; copy it there")
    return {key: str(name) for key, name in shards.items()}


def load_folder(folder: Path) -> dict[str, Any]:
    """A checkpoint in several files, whose index says which has which weight; or the one file of a usual name."""
    first, *shards = checkpoint_files(folder)
    if not shards:
        return load_file_checked(first)
    place, state = shards_of(first), {}
    for shard in shards:
        state |= {key: value for key, value in load_file_checked(shard).items() if place.get(key) == shard.name}
    if missing := [key for key in place if key not in state]:
        raise CheckpointError(
            f"{first}: names {len(missing)} weights that its shards lack ({printable(missing[0])}); copy it again"
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
        problems.append(f"{len(extra)} unknown weights ({', '.join(map(printable, extra[:2]))})")
    if problems:
        raise CheckpointError(
            f"{path}: does not fit this {type(module).__name__}: {'; '.join(problems)}{': ' + hint if hint else ''}"
        )
    if all(value.is_meta for value in expected.values()):
        state = {key: value.to(expected[key].dtype).contiguous() for key, value in state.items()}
        module.load_state_dict(state, assign=True)
    else:
        module.load_state_dict(state)


def read_regular(path: str | Path) -> bytes:
    """The bytes of a regular file; a pipe or a device, which may never end, raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file")
    return Path(path).read_bytes()


def write_atomically(path: str | Path, write: Callable[[Path], None], *, replace: bool = True) -> None:
    """Call `write(temporary)` with a name beside `path`, then rename: readers see the old file or the whole new one.

    An OSError names `path`, whatever wrote to it; without `replace` there is one where `path` exists.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def save_generator(path: str | Path, state: dict[str, Tensor]) -> None:
    """Write a generator's weights as LlamaGen's FSDP export does: a bare state dict of CPU tensors."""
    state = {key: value.cpu() for key, value in state.items()}

    def save(temporary: Path) -> None:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # of torch's own writer, which does not say what the system said
            raise OSError(f"{sum(value.nbytes for value in state.values()) / 1e6:.0f} MB did not fit") from error

    write_atomically(path, save)
