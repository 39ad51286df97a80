"""Whether a replacement computes what a module computes: both run on twins of it, with random numbers for weights.

A twin lies on the CPU in float32, so that a module is checked the same way wherever it is, in whatever dtype and
however sharded; random weights tell functions apart that zeros and ones do not. It has no hooks. Results, buffers and
gradients must agree in evaluation and in training mode, dropout included.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vapi_fast import ops

from .modules import is_ours, unwrapped

TOLERANCE = 1e-4  # relative L2: rounding in float32 gives 1e-6, another formula or epsilon 1e-3 and more
PLAIN = (int, float, bool, str, tuple, type(None))
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
        try:
            with on_cpu():
                checked[key] = first_difference(module, methods, cases())
        except Exception as error:  # whatever a fork's code raises when it is called as LlamaGen's would be
            reason = str(error).partition("\n")[0][:160]
            checked[key] = f"cannot be called as LlamaGen's is: {type(error).__name__}: {reason}"
    return checked[key]


def first_difference(module: nn.Module, methods: tuple[Callable[..., Any], ...], cases: list[Case]) -> str | None:
    weights: Weights = {}
    for case in cases:
        for method in methods:
            if case.method not in (None, method.__name__):
                continue
            for training in case.modes:
                own, ours = (
                    outcome(twin_of(module, weights).train(training), function, case)
                    for function in (getattr(type(module), method.__name__), method)
                )
                error = distance(own, ours)
                if not error <= TOLERANCE:
                    mode = "training" if training else "evaluation"
                    size = f"differs by {error:.1e}" if math.isfinite(error) else "is of another kind"
                    return f"computes something else than LlamaGen's ({case.name} in {mode} mode: {size})"
    return None


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
        if "_hooks" in name or isinstance(value, set):
            value = type(value)()
        elif isinstance(value, Tensor):
            value = value.detach().to("cpu", copy=True)
        if not is_ours(value) and name != "_compiled_call_impl":
            twin.__dict__[name] = value
    parameters: dict[str, nn.Parameter | None] = {}
    for name, parameter in module._parameters.items():
        parameters[name] = None
        if parameter is not None:
            key = INDEX.sub("*", f"{path}.{name}"), parameter.shape
            if key not in weights:
                weights[key] = nn.Parameter(random_weight(*key))
            parameters[name] = weights[key]
    buffers = {name: b if b is None else b.detach().to("cpu", copy=True) for name, b in module._buffers.items()}
    children = {
        name: None if child is None or name == "kv_cache" else twin_of(child, weights, f"{path}.{name}")
        for name, child in module._modules.items()
    }
    twin.__dict__.update(_parameters=parameters, _buffers=buffers, _modules=children)
    return twin


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
    """Classes, plain attributes and shapes of a module and all below it: what decides what it computes."""
    return tuple(
        (
            path,
            type(part),
            tuple(f"{k}={v!r}" for k, v in part.__dict__.items() if isinstance(v, PLAIN) and k != "training"),
            tuple((k, None if p is None else tuple(p.shape)) for k, p in part._parameters.items()),
        )
        for path, part in module.named_modules()
    )
