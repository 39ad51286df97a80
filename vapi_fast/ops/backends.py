"""Choice of the implementation that an operation runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from torch import Tensor

from vapi_fast import reference

# An implementation is a module with a function for every operation, under the operation's name and signature.
IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference}
BACKENDS = ("reference", "triton")

_override: ContextVar[str | None] = ContextVar("vapi_fast_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations called inside the `with` block on backend `name`, in this thread or task alone.

    name: "reference" (plain PyTorch) or "triton". Raises ValueError for another name, and for "triton" in this
    version, which has no Triton kernels: without an override every device runs the reference.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"use_backend: the {name!r} backend is not built in this version; use 'reference'")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def backend_name(tensor: Tensor) -> str:
    """Name of the backend that an operation on this tensor runs on."""
    return _override.get() or "reference"


def implementation(tensor: Tensor) -> ModuleType:
    """The module whose functions carry out an operation on this tensor."""
    return IMPLEMENTATIONS[backend_name(tensor)]
