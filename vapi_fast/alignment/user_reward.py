"""A reward that the user names: imported, called and checked, its errors as one line with their place."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vapi_fast.runtime.errors import ConfigError, RewardError, one_line

if TYPE_CHECKING:  # the configuration looks a reward up, and imports no torch
    from torch import Tensor


def reward_function(name: str) -> Callable[..., Any]:
    """The function that `--reward module:function` names; its module is looked for in the working directory too."""
    module, _, function = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a module does when it is imported, leaving the process included
        raise ConfigError(
            f"--reward {name}: {place_and_reason(error)}; pass module:function, importable from here"
        ) from error
    if not callable(found):
        raise ConfigError(f"--reward {name}: not a function")
    return found


def user_rewards(name: str, images: Tensor, labels: Tensor | list[str]) -> Tensor:
    """float32 `[N]` rewards of images `[N,3,H,W]` with N class ids or captions, as the user's function gives them.

    Raises RewardError for an exception in it, or anything but a real floating-point tensor `[N]`.
    """
    import torch

    function = reward_function(name)
    try:
        rewards = function(images, labels)
        dense = isinstance(rewards, torch.Tensor) and rewards.layout == torch.strided and not rewards.is_nested
        right = dense and rewards.shape == images.shape[:1] and rewards.is_floating_point() and not rewards.is_meta
    except (KeyboardInterrupt, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        raise RewardError(f"--reward {name}: {place_and_reason(error)}") from error
    if not right:
        got = type(rewards).__name__
        if isinstance(rewards, torch.Tensor):
            shape = list(rewards.shape) if dense else "that is not dense"
            got = f"{str(rewards.dtype).removeprefix('torch.')} {shape}{' on the meta device' * rewards.is_meta}"
        raise RewardError(
            f"--reward {name} must return a floating-point tensor [{len(images)}], a reward an image; got {got}"
        )
    return rewards.to(images.device, torch.float32)


def place_and_reason(error: BaseException) -> str:
    """An exception in one line, with the file and line that it comes from."""
    try:
        reason = one_line(error) or "no word"
    except Exception:  # it is the user's own class
        reason = "no word"
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
    return f"{kind}{reason}{place}"
