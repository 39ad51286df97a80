"""Packages that not every path needs: each is imported where it is used, and one that is missing is told in a line."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TypeVar

from vapi_fast.runtime.errors import CheckpointError, ConfigError, one_line

T = TypeVar("T")

PIP_NAMES = {"PIL": "pillow", "open_clip": "open-clip-torch"}  # where pip's name is another than the module's
OPTIONAL = {"tensorboard": "curves", "matplotlib": "charts", "tqdm": "progress bar"}  # what a run without them lacks


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def require(error: type[Exception], purpose: str, *modules: str) -> None:
    """Raise `error`, in one line, unless all modules are installed that `purpose` needs."""
    missing = [PIP_NAMES.get(module, module) for module in modules if not installed(module)]
    if missing:
        raise error(f"{purpose} needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}")


def loaded(what: str, advice: str, read: Callable[[], T], *, where: str = "") -> T:
    """What `read` returns; whatever goes wrong in the packages' own code is one line.

    Args:
        what: the flag that names a network; advice: what to do where it cannot be read; where: it was looked for.

    Raises:
        ConfigError: a package cannot be imported.
        CheckpointError: anything else.
    """
    try:
        return read()
    except Exception as error:  # whatever the hub's client or a reader of weights or vocabularies raises
        reason = str(error).strip() or type(error).__name__
        # Such as PyTorch of one build and torchvision of another, which both packages import.
        if isinstance(error, ImportError) or "torchvision::" in str(error):
            raise ConfigError(
                f"{what}: a package that reads it cannot be imported ({one_line(reason.splitlines()[0])[:300]}): "
                "install the torchvision that belongs to this PyTorch"
            ) from error
        raise CheckpointError(f"{what}: cannot be read{where} ({one_line(reason)[:300]}): {advice}") from error


def left_out() -> str:
    """What an alignment does without for want of an optional package, in a line; empty if nothing."""
    missing = [module for module in OPTIONAL if not installed(module)]
    if not missing:
        return ""
    *others, last = (OPTIONAL[module] for module in missing)
    return f"not installed: {', '.join(missing)}: no {', '.join(others)}{' or ' if others else ''}{last}"
