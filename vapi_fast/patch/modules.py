"""Replacements of methods, as they lie on modules; wrappers and hooks around modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

REPLACEMENTS: set[Callable[..., Any]] = set()
INNER = ("_orig_mod", "_checkpoint_wrapped_module")  # of torch.compile's wrapper and of activation checkpointing's


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


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without the wrappers of DDP, FSDP1, torch.compile and activation checkpointing."""
    while True:
        if isinstance(module, DistributedDataParallel | DataParallel | FullyShardedDataParallel):
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


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: then it has to be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
