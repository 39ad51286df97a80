"""The house: which rooms may import which, and no circle among them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vapi_fast
from vapi_fast import kernels

PACKAGE = Path(vapi_fast.__file__).parent
# From the ground up; a room imports what lies below it, and itself.
FLOORS = (
    {"_lazy"},
    {"reference"},
    {"kernels"},
    {"ops"},
    {"runtime"},
    {"tiny"},
    {"models", "data"},
    {"generation", "evaluation"},
    {"alignment", "patch"},
    {"commands"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What builds the tiny preset stands beside the house.
BESIDE = {"tiny/build.py", "tiny/images.py"}


def imported(path: Path) -> Iterator[str]:
    """Names below vapi_fast that a file imports, inside of functions as well, but not for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "vapi_fast":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("vapi_fast."):
                yield node.module.removeprefix("vapi_fast.")
        elif isinstance(node, ast.Import):
            yield from (n.name.removeprefix("vapi_fast.") for n in node.names if n.name.startswith("vapi_fast."))


# Rooms that know generators, whatever their family, by `vapi_fast.models.transformer.Generator` alone.
ABOVE_MODELS = ("alignment/", "evaluation/", "generation/", "runtime/")

FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
KERNELS = Path(kernels.__file__).parent  # in a checkout beside the package
FILES |= {f"kernels/{path.relative_to(KERNELS).as_posix()}": path for path in KERNELS.rglob("*.py")}


@pytest.mark.parametrize("file", sorted(FILES.keys() - BESIDE - {"__init__.py"}))
def test_a_room_imports_what_lies_below_it(file: str) -> None:
    room = file.partition("/")[0].removesuffix(".py")
    for name in imported(FILES[file]):
        other = name.partition(".")[0]
        assert other in FLOOR, f"{name}: vapi_fast has no such room"
        assert FLOOR[other] < FLOOR[room] or other == room, f"{room} lies on floor {FLOOR[room]}, {name} above it"


def names(path: Path) -> Iterator[str]:
    """Names, attributes and imports in a file's code; what is said in texts does not count."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for field in ("id", "attr", "name", "module", "arg", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield name


@pytest.mark.parametrize("file", sorted(file for file in FILES if file.startswith(ABOVE_MODELS)))
def test_above_models_no_family_has_a_name(file: str) -> None:
    assert [name for name in names(FILES[file]) if "llamagen" in name.lower()] == []
