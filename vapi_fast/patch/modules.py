"""Replacements of methods, as they lie on modules; wrappers and hooks around modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules import module as torch_modules
from torch.nn.parallel import DistributedDataParallel

REPLACEMENTS: set[Callable[..., Any]] = set()
INNER = ("_orig_mod", "_checkpoint_wrapped_module")  # of torch.compile's wrapper and of activation checkpointing's
GLOBAL_HOOKS = tuple(k for k, v in vars(torch_modules).items() if k.startswith("_global_") and isinstance(v, dict))
CALL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)

Claims = list[tuple[object, Callable[..., Any]]]
CLAIMS: WeakKeyDictionary[nn.Module, Claims] = WeakKeyDictionary()  # who replaces what; of one method the last one runs


def replaces(method: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function `(module, …)` as one that stands in for a method of that name.

    It takes the method's name: a pickled module stores its bound methods by name, and so comes back with its own.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__name__ = method
        REPLACEMENTS.add(function)
        return function

    return mark


def is_ours(method: object) -> bool:
    return getattr(method, "__func__", None) in REPLACEMENTS


def claim(module: nn.Module, function: Callable[..., Any], owner: object) -> None:
    """Run our function as the module's method of its name, as long as its owner does not withdraw it."""
    claims, name = CLAIMS.setdefault(module, []), function.__name__
    present = module.__dict__.get(name)
    if is_ours(present) and not any(f.__name__ == name for _, f in claims):  # on a copy of a patched module
        claims.append((None, present.__func__))
    claims.append((owner, function))
    module.__dict__[name] = MethodType(function, module)


def withdraw(module: nn.Module, owner: object) -> None:
    """Put back what an owner replaced: what another one put there, if any. What is not ours by now stays."""
    claims = CLAIMS.get(module, [])
    names = {function.__name__ for whose, function in claims if whose is owner}
    claims[:] = [each for each in claims if each[0] is not owner]
    for name in names:
        if is_ours(module.__dict__.get(name)):
            del module.__dict__[name]
            for function in (function for _, function in claims if function.__name__ == name):
                module.__dict__[name] = MethodType(function, module)


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without the wrappers of DDP, FSDP1, torch.compile and activation checkpointing."""
    while True:
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel):
            module = module.module
            continue
        inner = next((module._modules[name] for name in INNER if name in module._modules), None)
        if inner is None:
            return module
        module = inner


def flattened(model: nn.Module) -> set[nn.Module]:
    """All modules under FSDP1, whose parameters have lost their shapes."""
    wrappers = (module for module in model.modules() if isinstance(module, FullyShardedDataParallel))
    return {module for wrapper in wrappers for module in wrapper.modules()}


def on_meta(module: nn.Module) -> bool:
    """Whether tensors that the module keeps besides its parameters have no values."""
    kept = (*module.buffers(), *(value for value in vars(module).values() if isinstance(value, Tensor)))
    return any(tensor.is_meta for tensor in kept)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: then it has to be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or any(getattr(torch_modules, name) for name in CALL_HOOKS)
    )


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module is torch's own forward of that kind and nothing else: then its weight may be read."""
    return type(module).forward is kind.forward and not hooked(module)


@contextmanager
def no_global_hooks() -> Iterator[None]:
    tables = {name: getattr(torch_modules, name) for name in GLOBAL_HOOKS}
    try:
        for name in tables:
            setattr(torch_modules, name, {})
        yield
    finally:
        for name, table in tables.items():
            setattr(torch_modules, name, table)
