"""Launch tables: block sizes, warps and pipeline stages of every kernel, as data.

`<family>.json` maps a kernel to its settings by architecture: `default`, and `sm_80`, `sm_90` or `sm_100` where
another choice was measured to be faster.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

FOLDER = Path(__file__).parent


@functools.cache
def launch_table() -> dict[str, dict[str, dict[str, int]]]:
    """All families' tables: kernel → architecture → settings."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for path in sorted(FOLDER.glob("*.json")):
        table |= json.loads(path.read_text(encoding="utf-8"))
    return table


@functools.cache
def launch_settings(kernel: str, architecture: str) -> dict[str, int]:
    """Settings of a kernel on an architecture (`sm_90`), to be passed on as keyword arguments of the launch.

    An architecture without settings of its own takes those of the nearest older one, or the default. Raises KeyError
    for a kernel that no table names.
    """
    return nearest(launch_table()[kernel], architecture)


def nearest(by_architecture: dict[str, dict[str, int]], architecture: str) -> dict[str, int]:
    """A kernel's settings for an architecture, out of those that it has."""
    number = int(architecture.removeprefix("sm_"))
    measured = (int(name.removeprefix("sm_")) for name in by_architecture if name != "default")
    usable = [each for each in measured if each <= number]
    return by_architecture[f"sm_{max(usable)}"] if usable else by_architecture["default"]
