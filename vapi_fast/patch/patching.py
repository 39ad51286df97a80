"""Replacing methods of single modules, and undoing it."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parallel import DataParallel

from .modules import CLAIMS, claim, flattened, is_ours, on_meta, unwrapped, withdraw
from .recognition import Case, Checked, difference


class Candidate(NamedTuple):
    """What to put in place of a module's methods, and the calls that have to come out the same."""

    what: str
    methods: tuple[Callable[..., Any], ...]
    cases: Callable[[], list[Case]]


class Patch:
    """What was replaced in a model. As a context manager it undoes itself on exit.

    Attributes:
        replaced: path of each module that runs our operations now → what stands for what.
        left_alone: path of each module that stays as it is → why.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self.root = unwrapped(model)
        self.replaced: dict[str, str] = {}
        self.left_alone: dict[str, str] = {}
        self._flattened = flattened(model)
        self._owner = object()  # of what it replaced
        self._modules: list[nn.Module] = []
        self._checked: Checked = {}

    def report(self) -> str:
        """A line for each kind of module; numbered ones are drawn together: `layers.*.feed_forward (48)`."""
        lines = [f"{self.name}: {len(self.replaced)} modules replaced, {len(self.left_alone)} left alone"]
        lines += [f"  {paths}: {what}" for paths, what in in_groups(self.replaced)]
        lines += [f"  left alone: {paths}: {why}" for paths, why in in_groups(self.left_alone)]
        return "\n".join(lines)

    def unpatch(self) -> None:
        """Undo this patch: what other patches replaced too, and what was put in its place since, stays."""
        for module in self._modules:
            withdraw(module, self._owner)
        self._modules.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.unpatch()

    def replace(self, path: str, candidate: Candidate) -> None:
        """Replace methods of the module at `path` if the candidate's give the same; else note why not."""
        module = unwrapped(self.root.get_submodule(path))
        why = self.obstacle(module, candidate)
        why = why or difference(module, candidate.methods, candidate.cases, self._checked)
        if why:
            self.leave(path, why)
            return
        for function in candidate.methods:
            claim(module, function, self._owner)
        self._modules.append(module)
        self.replaced[path or "model"] = candidate.what

    def leave(self, path: str, why: str) -> None:
        self.left_alone[path or "model"] = why

    def obstacle(self, module: nn.Module, candidate: Candidate) -> str | None:
        """What stands in the way whatever the module computes."""
        if module in self._flattened:
            return "under FullyShardedDataParallel, which flattens parameters: patch the model before wrapping it"
        if on_meta(module):  # parameters may be: they are random numbers in a check
            return "on the meta device: load its weights first"
        for function in candidate.methods:
            method = function.__name__
            present, own = module.__dict__.get(method), getattr(type(module), method, None)
            if own is None:
                return f"has no method {method}"
            if present is not None and not is_ours(present) and getattr(present, "__func__", None) is not own:
                return f"its {method} has been replaced by something else already"
            if parameters(own) != parameters(function):
                return f"its {method} takes {parameters(own)}, LlamaGen's takes {parameters(function)}"
        return None

    def finished(self) -> Patch:
        """Warn of what was left alone: who does not read the report should not believe all of it replaced."""
        if self.left_alone:
            paths, why = in_groups(self.left_alone)[0]
            total = len(self.left_alone) + len(self.replaced)
            message = f"{self.name} left {len(self.left_alone)} of {total} modules as they are, such as {paths} ({why})"
            try:
                warnings.warn(f"{message}; .report() names all", stacklevel=3)
            except Warning:  # an error by the warning filters: there will be no Patch to undo this by
                self.unpatch()
                raise
        return self


def unpatch(model: nn.Module) -> None:
    """Give a model back all methods that patches replaced, whichever patches and wrappers there are.

    Raises TypeError if it is not a `torch.nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        for method, present in list(module.__dict__.items()):
            if is_ours(present):
                del module.__dict__[method]
        CLAIMS.pop(module, None)


def parameters(method: Callable[..., Any]) -> str:
    """Names, order, kinds and defaults of a method's parameters, as they are written."""
    bare = [p.replace(annotation=p.empty) for p in inspect.signature(method).parameters.values() if p.name != "self"]
    return str(inspect.Signature(bare))


def checked_root(name: str, model: object, needed: Iterable[str]) -> nn.Module:
    """The model inside of its wrappers; TypeError or ValueError if it is none, or lacks a child it needs."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
    root = unwrapped(model)
    if isinstance(root, DataParallel):
        raise ValueError(f"{name}: DataParallel copies modules: use DistributedDataParallel")
    if type(root).__module__.startswith("vapi_fast."):
        raise ValueError(f"{name}: this {type(root).__name__} is vapi-fast's own and runs its operations already")
    missing = [child for child in needed if not isinstance(getattr(root, child, None), nn.Module)]
    if missing:
        raise ValueError(
            f"{name}: expected a model of LlamaGen's structure, with {', '.join(needed)}; this {type(root).__name__} "
            f"has no {' and no '.join(missing)}"
        )
    return root


def in_groups(paths: dict[str, str]) -> list[tuple[str, str]]:
    """Paths that differ in indices alone and share a text, as one line with their count."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, text in paths.items():
        groups.setdefault((re.sub(r"\.\d+(?=\.|$)", ".*", path), text), []).append(path)
    return [
        (f"{general} ({len(members)})" if len(members) > 1 else members[0], text)
        for (general, text), members in groups.items()
    ]
