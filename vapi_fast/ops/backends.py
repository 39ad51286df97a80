"""Choice of the implementation that an operation runs on."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from vapi_fast import reference

BACKENDS = ("reference", "triton")

if importlib.util.find_spec("triton") is not None:  # Linux; elsewhere there is no CUDA tensor that it could run on
    from vapi_fast import kernels
else:
    kernels = None

_override: ContextVar[str | None] = ContextVar("vapi_fast_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations called inside the `with` block on backend `name`, in this thread or task alone.

    name: "reference" (plain PyTorch) or "triton". Without an override, tensors on a CUDA device run on Triton and all
    others on the reference. On CPU tensors "triton" needs TRITON_INTERPRET=1 in the environment from the start of the
    process. A compiled function keeps the backend that was chosen when it was traced.

    Raises:
        ValueError: another name, or "triton" where Triton is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if name == "triton" and kernels is None:
        raise ValueError(f"use_backend: {name!r} needs the package triton, which is not installed; use 'reference'")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


@torch.compiler.assume_constant_result
def override() -> str | None:
    """The backend that `use_backend` has chosen; a function of its own as torch.compile cannot trace a ContextVar."""
    return _override.get()


def backend_name(tensor: Tensor) -> str:
    """Name of the backend that an operation on this tensor runs on."""
    if tensor.is_meta:  # shapes alone: no kernel can be launched
        return "reference"
    return override() or ("triton" if tensor.is_cuda else "reference")


def implementation(tensor: Tensor):
    """The module that carries out an operation on this tensor: a function for each, under its name and signature.

    Its type is left to be inferred: from an attribute of the result an editor then finds both functions.
    """
    return kernels if backend_name(tensor) == "triton" else reference
