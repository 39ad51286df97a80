"""Triton's interpreter for tests: it remaps `triton.language` once a launch, not again in each call inside a kernel.

The remapping looks at every name of the language, which takes a millisecond or two, more than most of what is then
called. What is computed stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def remap_once_a_launch() -> None:
    """For this process; a jitted function may see `tl`, `tl.core` or both, and each is remapped as it comes up."""
    remap, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    remapped: set[tuple[bool, bool]] = set()

    def remap_once(function: Callable[..., Any]) -> Any:
        names = function.__globals__.values()
        seen = any(each is tl for each in names), any(each is tl.core for each in names)
        if seen not in remapped:
            remapped.add(seen)
            return remap(function)  # the first of a launch is the kernel's, whose end restores the language
        return None

    def launched(self: Any, *arguments: Any, **options: Any) -> Any:
        remapped.clear()
        return launch(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = remap_once, launched
