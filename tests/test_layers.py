"""The house: which rooms may import which, and no circle among them."""

from __future__ import annotations

import ast
import re
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
# What builds the presets stands beside the house.
BESIDE = {"tiny/build.py", "tiny/build_text.py", "tiny/images.py", "tiny/training.py"}


BENCHMARKS = {path.stem for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py")}


def imported(path: Path, module: str) -> Iterator[str]:
    """Full names that a file imports, inside of functions as well, but not for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            if path.name == "__init__.py" and node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + 1]
            home = ".".join([*above, *([node.module] if node.module else [])])
            yield from (name if name in MODULES else home for name in (f"{home}.{a.name}" for a in node.names))


# Rooms that know generators, whatever their family, by `vapi_fast.models.transformer.Generator` alone.
ABOVE_MODELS = ("alignment/", "evaluation/", "generation/", "runtime/")

FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
KERNELS = Path(kernels.__file__).parent  # in a checkout beside the package
FILES |= {f"kernels/{path.relative_to(KERNELS).as_posix()}": path for path in KERNELS.rglob("*.py")}
MODULES = {
    "vapi_fast." + file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file
    for file in FILES.keys() - {"__init__.py"}
}


@pytest.mark.parametrize("module", sorted(name for name, file in MODULES.items() if file not in BESIDE))
def test_a_room_imports_what_lies_below_it(module: str) -> None:
    room = module.split(".")[1]
    for name in imported(FILES[MODULES[module]], module):
        assert name.partition(".")[0] not in BENCHMARKS | {"benchmarks", "tests"}, f"{name}: the package imports none"
        if name.startswith("vapi_fast."):
            other = name.split(".")[1]
            assert other in FLOOR, f"{name}: vapi_fast has no such room"
            assert FLOOR[other] < FLOOR[room] or other == room, f"{room} lies on floor {FLOOR[room]}, {name} above it"


def test_no_circle_within_a_room_either() -> None:
    below = {
        module: {name for name in imported(FILES[file], module) if name in MODULES and name != module}
        for module, file in MODULES.items()
    }
    while free := [module for module, needed in below.items() if not needed]:  # they can be imported now
        for module in free:
            del below[module]
        for needed in below.values():
            needed.difference_update(free)
    assert below == {}


def names(path: Path) -> Iterator[str]:
    """Names, attributes and imports in a file's code; what is said in texts does not count."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for field in ("id", "attr", "name", "module", "arg", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield name


@pytest.mark.parametrize("file", sorted(file for file in FILES if file.startswith(ABOVE_MODELS)))
def test_above_models_no_family_has_a_name(file: str) -> None:
    assert [name for name in names(FILES[file]) if "llamagen" in name.lower()] == []


def test_the_rooms_table_names_every_module() -> None:
    page = (Path(__file__).parents[1] / "docs" / "development.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `((?:vapi_fast|kernels)/\w*)/?`[^|]*\| (.*) \|$", page, flags=re.MULTILINE))
    stems = {path.stem for path in (PACKAGE / "ops").glob("*.py")}  # these have a table of their own
    private = {"filters", "head", "philox", "launch"}  # named below that table
    for module in MODULES:
        room, _, name = module.removeprefix("vapi_fast.").rpartition(".")
        where = {"": "vapi_fast/", "kernels": "kernels/"}.get(room, f"vapi_fast/{room}")
        if name.startswith("_") or (module.count(".") == 1 and room == "" and name not in ("cli", "commands")):
            continue
        if name not in stems | private or room not in ("ops", "kernels", "reference"):
            assert f"`{name}`" in rows[where], f"{module} is not in the row of {where}"
