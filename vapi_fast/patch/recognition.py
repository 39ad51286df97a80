"""Whether a replacement computes what a module computes: both run on twins of it, with random numbers for weights.

A twin lies on the CPU in float32, so that a module is checked the same way wherever it is, in whatever dtype and
however sharded; random weights tell functions apart that zeros and ones do not. It has no hooks. Results, buffers and
gradients must agree in evaluation and in training mode, dropout included.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vapi_fast import ops

from .modules import is_ours, no_global_hooks, unwrapped

TOLERANCE = 1e-4  # relative L2: rounding in float32 gives 1e-6, another formula or epsilon 1e-3 and more
PLAIN = (int, float, bool, str, tuple, type(None))
TORCHS_OWN = frozenset(vars(nn.Module()))  # attributes of any module
COMPILED = "_compiled_call_impl"  # by `Module.compile`
LARGEST = 2**26  # bytes of a tensor that a signature looks at
BOTH_MODES = (False, True)
INDEX = re.compile(r"(?<=\.)\d+(?=\.)")  # of a module in a list; not the digit of w1 and w3


class Case(NamedTuple):
    """One comparison: `call(method, twin, *inputs)` calls the method that it is given, once or more."""

    name: str
    inputs: tuple[Tensor, ...]
    call: Callable[..., Any]
    modes: tuple[bool, ...] = BOTH_MODES  # values of `training`
    method: str | None = None  # the only one of several methods that this is a call of


Checked = dict[Any, "str | None"]  # signature → why not
Weights = dict[tuple[str, torch.Size], nn.Parameter]


def difference(
    module: nn.Module, methods: tuple[Callable[..., Any], ...], cases: Callable[[], list[Case]], checked: Checked
) -> str | None:
    """Why the methods must not replace the module's own of the same names; None if they may.

    checked: earlier results, for modules of the same signature.
    """
    key = (methods, signature(module))
    if key not in checked:
        with on_cpu():
            try:
                compared = cases()
            except Exception as error:  # what it lacks is that it is LlamaGen's
                checked[key] = f"is not of LlamaGen's kind: {first_line(error)}"
            else:
                checked[key] = first_difference(module, methods, compared)
    return checked[key]


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:160] or type(error).__name__


def first_difference(module: nn.Module, methods: tuple[Callable[..., Any], ...], cases: list[Case]) -> str | None:
    weights: Weights = {}
    compared = 0
    for case in cases:
        for method in methods:
            if case.method not in (None, method.__name__):
                continue
            for training in case.modes:
                compared += 1
                try:
                    own, ours = (
                        outcome(twin_of(module, weights).train(training), function, case)
                        for function in (getattr(type(module), method.__name__), method)
                    )
                except Exception as error:  # whatever a fork's code raises when it is called as LlamaGen's would be
                    return f"cannot be called as LlamaGen's is: {type(error).__name__}: {first_line(error)}"
                gap = distance(own, ours)
                if not gap <= TOLERANCE:
                    mode = "training" if training else "evaluation"
                    size = f"differs by {gap:.1e}" if math.isfinite(gap) else "is of another kind"
                    return f"computes something else than LlamaGen's ({case.name} in {mode} mode: {size})"
    return None if compared else "there is nothing to compare it by"


def outcome(twin: nn.Module, method: Callable[..., Any], case: Case) -> list[Any]:
    """All that a call gives: results, buffers afterwards, and gradients of inputs and parameters."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in case.inputs]
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reach the GPUs' generators too
        results = list(entries(case.call(method, twin, *inputs)))
        sources = [x for x in (*inputs, *twin.parameters()) if x.requires_grad]
        total = sum((x * uniform("direction", x.shape, -1, 1)).sum() for x in results if differentiable(x))
        found = torch.autograd.grad(total, sources, allow_unused=True) if isinstance(total, Tensor) else []
        gradients = [(torch.zeros_like(x) if g is None else g).flatten() for x, g in zip(sources, found, strict=False)]
        # As one vector: a gradient that is zero but for rounding, as that of attention's key bias, has no digits.
        return [*results, *twin.buffers(), torch.cat(gradients) if gradients else None]


@contextmanager
def on_cpu() -> Iterator[None]:
    """The plain surroundings of a check, whatever the caller's are."""
    with (
        torch.inference_mode(False),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        ops.use_backend("reference"),
        no_global_hooks(),
    ):
        yield


def differentiable(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def distance(expected: list[Any], actual: list[Any]) -> float:
    """The largest relative L2 difference between two outcomes; infinite if they are not even of the same kind."""
    if len(expected) != len(actual):
        return math.inf
    worst = 0.0
    for a, b in zip(expected, actual, strict=True):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            error = 0.0 if type(a) is type(b) and a == b else math.inf
        elif a.shape != b.shape or a.dtype != b.dtype:
            error = math.inf
        elif not a.is_floating_point():
            error = 0.0 if torch.equal(a, b) else math.inf
        else:
            error = norm(a.detach() - b.detach()) / (norm(a.detach()) or 1.0)
        if math.isnan(error):
            return math.inf
        worst = max(worst, error)
    return worst


def norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def entries(value: Any) -> Iterator[Any]:
    """The entries of nested tuples and lists."""
    if isinstance(value, tuple | list):
        for entry in value:
            yield from entries(entry)
    else:
        yield value


def twin_of(module: nn.Module, weights: Weights, path: str = "") -> nn.Module:
    """A module of the same classes and attributes on the CPU, without hooks and patches.

    weights: random numbers by path and shape, added to. Paths that differ in an index alone share theirs: the layers of
    a transformer then take one layer's memory. KV caches are large and set up anew: they are left out.
    """
    module = unwrapped(module)
    twin = object.__new__(type(module))
    for name, value in module.__dict__.items():
        if name in TORCHS_OWN:
            twin.__dict__[name] = type(value)() if "_hooks" in name or isinstance(value, set) else value
        elif name != COMPILED and not is_ours(value):
            twin.__dict__[name] = copied(value)
    parameters: dict[str, nn.Parameter | None] = {}
    for name, parameter in module._parameters.items():
        parameters[name] = None
        if parameter is not None:
            key = INDEX.sub("*", f"{path}.{name}"), parameter.shape
            if key not in weights:
                weights[key] = nn.Parameter(random_weight(*key))
            parameters[name] = weights[key]
    buffers = {name: copied(buffer) for name, buffer in module._buffers.items()}
    children = {
        name: None if child is None or name == "kv_cache" else twin_of(child, weights, f"{path}.{name}")
        for name, child in module._modules.items()
    }
    twin.__dict__.update(_parameters=parameters, _buffers=buffers, _modules=children)
    return twin


def copied(value: Any) -> Any:
    """Containers and tensors anew, on the CPU; whatever else they hold is shared."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) is tuple:
        return tuple(map(copied, value))
    if isinstance(value, list | dict):
        value = copy.copy(value)
        for key in value if isinstance(value, dict) else range(len(value)):
            value[key] = copied(value[key])
        return value
    return copy.copy(value) if isinstance(value, set) else value


def random_weight(name: str, shape: torch.Size) -> Tensor:
    """Matrices that keep the variance of what they multiply; vectors around one."""
    if len(shape) < 2:
        return uniform(name, shape, 0.5, 1.5)
    bound = math.sqrt(3 / max(math.prod(shape[1:]), 1))
    return uniform(name, shape, -bound, bound)


def uniform(name: str, shape: torch.Size | tuple[int, ...], low: float, high: float) -> Tensor:
    """Random numbers that depend on name and shape alone."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{name} {tuple(shape)}".encode()))
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(low, high, generator=generator)


def integers(name: str, shape: tuple[int, ...], limit: int) -> Tensor:
    return (uniform(name, shape, 0, 1) * limit).long().clamp(max=limit - 1)


def signature(module: nn.Module) -> tuple[Any, ...]:
    """All that decides what a module computes, to tell whether another one computes the same.

    Classes and their functions, attributes, shapes of parameters, and values of buffers, of it and of all below it.
    Where something cannot be compared there is a new object, which equals nothing.
    """
    module = unwrapped(module)
    own = {k: v for k, v in module.__dict__.items() if k not in TORCHS_OWN and k != COMPILED and not is_ours(v)}
    classes = (each for each in type(module).__mro__ if each not in nn.Module.__mro__)
    children = (named for named in module._modules.items() if named[0] != "kv_cache")
    return (
        type(module),
        tuple(f for each in classes for f in vars(each).values() if isinstance(f, FunctionType)),
        content(own),
        tuple((name, p if p is None else p.shape) for name, p in module._parameters.items()),
        content(module._buffers),
        tuple((name, child if child is None else signature(child)) for name, child in children),
    )


def content(value: Any) -> Any:
    """What equals that of another value if the two are the same."""
    kind = type(value)
    if value is None or isinstance(value, int | float | str | torch.dtype | torch.device):
        return kind, repr(value)
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return value
    if isinstance(value, list | tuple):
        return kind, tuple(map(content, value))
    if isinstance(value, dict):
        return kind, tuple((content(key), content(entry)) for key, entry in value.items())
    if isinstance(value, functools.partial):
        return kind, content((value.func, value.args, value.keywords))
    if isinstance(value, SimpleNamespace) or (dataclasses.is_dataclass(value) and hasattr(value, "__dict__")):
        return kind, content(vars(value))
    readable = kind in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta
    if readable and value.nbytes <= LARGEST:
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return value.dtype, value.shape, hashlib.sha256(data).digest()
    return object()
