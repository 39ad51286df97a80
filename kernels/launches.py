"""What production launches: the specialisations of every kernel, as `python -m rehearsal --record` has found them.

A Triton kernel is compiled anew for each combination of argument types, of what its integers and pointers divide by,
and of compile-time constants. `launches.json` has those that the scenes of the rehearsal (`tests/rehearsal`) ask for,
LlamaGen-XXL at 384² foremost, each with these scenes.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

FILE = Path(__file__).with_name("launches.json")
INT32 = 2**31


class Pointer(NamedTuple):
    """A tensor, as a kernel's compilation sees it. dtype: its name in PyTorch; aligned: to 16 bytes."""

    dtype: str
    aligned: bool

    def data_ptr(self) -> int:
        return 4096 if self.aligned else 4096 + 8


class Descriptor(NamedTuple):
    """A tensor descriptor. dtype: the tensor's, its name in PyTorch; block: what one copy brings."""

    dtype: str
    block: tuple[int, ...]


class Specialisation(NamedTuple):
    """One compilation. kernel: `<module>.<name>` below `vapi_fast.kernels`; integers stand for all of their class."""

    kernel: str
    arguments: tuple[Pointer | Descriptor | int | float | bool | None, ...]
    constants: tuple[tuple[str, Any], ...]

    @property
    def function(self) -> Any:
        """The kernel itself."""
        module, name = self.kernel.split(".")
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def specialisation(kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any]) -> Specialisation:
    """What the launch `kernel[grid](*arguments, **constants)` has to compile."""
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"
    alike = (representative(a, p.do_not_specialize) for a, p in zip(arguments, kernel.params, strict=False))
    return Specialisation(name, tuple(alike), tuple(sorted(constants.items())))


def representative(argument: Any, unspecialised: bool) -> Pointer | Descriptor | int | float | bool | None:
    """The argument, or another one for which Triton compiles the same; unspecialised: whatever an integer divides."""
    if isinstance(argument, torch.Tensor):
        offset = argument.storage_offset() * argument.element_size()  # allocations are aligned
        return Pointer(str(argument.dtype).removeprefix("torch."), offset % 16 == 0)
    if isinstance(argument, TensorDescriptor):
        return Descriptor(str(argument.base.dtype).removeprefix("torch."), tuple(argument.block_shape))
    if isinstance(argument, float):
        return 1.5
    if not isinstance(argument, int) or isinstance(argument, bool):
        return argument
    wide = 0 if -INT32 <= argument < INT32 else INT32
    if unspecialised:
        return wide + 3
    return argument if argument == 1 else wide + (16 if argument % 16 == 0 else 3)


def load(file: Path = FILE) -> dict[Specialisation, list[str]]:
    """The specialisations that were found, each with the scenes that launch it."""
    found = {}
    for kernel, entries in json.loads(file.read_text(encoding="utf-8")).items():
        for entry in entries:
            arguments = tuple(tensor(*each) if isinstance(each, list) else each for each in entry["arguments"])
            found[Specialisation(kernel, arguments, tuple(sorted(entry["constants"].items())))] = entry["scenes"]
    return found


def tensor(dtype: str, form: bool | list[int]) -> Pointer | Descriptor:
    """What the file has of one: whether its pointer is aligned, or its descriptor's block."""
    return Descriptor(dtype, tuple(form)) if isinstance(form, list) else Pointer(dtype, form)


def text(found: Mapping[Specialisation, Iterable[str]]) -> str:
    """What the file holds for these: a line for each."""
    by_kernel: dict[str, list[str]] = {}
    for each, scenes in sorted(found.items(), key=lambda item: str(item[0])):
        entry = {"arguments": each.arguments, "constants": dict(each.constants), "scenes": sorted(scenes)}
        by_kernel.setdefault(each.kernel, []).append(json.dumps(entry, ensure_ascii=False))
    kernels = (f"{json.dumps(name)}: [\n" + ",\n".join(lines) + "\n]" for name, lines in by_kernel.items())
    return "{\n" + ",\n".join(kernels) + "\n}\n"
