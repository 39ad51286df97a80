"""Names that a package offers, imported when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def offers(
    package: str, names: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[list[str], Callable[[str], Any]]:
    """`__all__` and `__getattr__` of a package: names by the module below it that has them, and modules themselves."""
    home = {name: module for module, offered in names.items() for name in offered}

    def attribute(name: str) -> Any:
        if name in home:
            return getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return sorted([*home, *modules]), attribute
