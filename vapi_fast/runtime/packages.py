"""Packages that not every path needs: each is imported where it is used, and one that is missing is told in a line."""

from __future__ import annotations

import importlib.util

PIP_NAMES = {"PIL": "pillow", "open_clip": "open-clip-torch"}  # where pip's name is another than the module's
OPTIONAL = {"tensorboard": "curves", "matplotlib": "charts", "tqdm": "progress bar"}  # what a run without them lacks


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def require(error: type[Exception], purpose: str, *modules: str) -> None:
    """Raise `error`, in one line, unless all modules are installed that `purpose` needs."""
    missing = [PIP_NAMES.get(module, module) for module in modules if not installed(module)]
    if missing:
        raise error(f"{purpose} needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}")


def left_out() -> str:
    """What an alignment does without for want of an optional package, in a line; empty if nothing."""
    missing = [module for module in OPTIONAL if not installed(module)]
    if not missing:
        return ""
    *others, last = (OPTIONAL[module] for module in missing)
    return f"not installed: {', '.join(missing)}: no {', '.join(others)}{' or ' if others else ''}{last}"
