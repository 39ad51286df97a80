"""What is noted while the CUDA path runs on fake tensors, and the launches of Triton kernels that it asks for."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import importlib
import itertools
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from vapi_fast import kernels
from vapi_fast.kernels.launch import Launch, recorded
from vapi_fast.kernels.launches import Specialisation, specialisation
from vapi_fast.runtime.graphs import RecordedGraph, RecordedStages

from .device import Host

LIMIT = 2**31
GRID_LIMITS = (LIMIT - 1, 65535, 65535)
OURS = ("/vapi_fast/", "/kernels/", "/benchmarks/")
# Results that the host needs before it can go on.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "bincount"}
CONVOLUTIONS = {"convolution", "cudnn_convolution_relu"}
# Operations that launch nothing, beside views.
SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


@dataclass(frozen=True)
class Finding:
    """Something that would be slow, wrong or refused on a device; `place`: the innermost of our lines."""

    scene: str
    kind: str
    detail: str
    place: str

    def __str__(self) -> str:
        return f"{self.scene}: {self.kind}: {self.detail} ({self.place})"


def place() -> str:
    return lines_of(traceback.walk_stack(sys._getframe()))


def lines_of(innermost_first: Iterable[tuple[FrameType, int]]) -> str:
    """Our innermost four lines on the stack, innermost first."""
    lines = ((frame.f_code.co_filename, line) for frame, line in innermost_first)
    ours = (f"{file.rsplit('/', 1)[-1]}:{line}" for file, line in lines if any(part in file for part in OURS))
    return " < ".join(itertools.islice(ours, 4))


def tensors(*values: Any) -> list[torch.Tensor]:
    """Those in tuples, lists and dictionaries; pytree would take as long as all other checks."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += tensors(*value)
        elif isinstance(value, dict):
            found += tensors(*value.values())
    return found


class Watch(TorchDispatchMode):
    """Sees every ATen operation, and carries out our own operators by their real bodies, held to their fakes.

    hot: whether to wait for the device counts as a finding. channels_last: whether convolutions must be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.findings: collections.Counter[Finding] = collections.Counter()
        self.host = Host(self.host_note)
        self.scene = ""
        self.launched_so_far = 0  # of our kernels and of PyTorch's operations on the device
        self.hot = self.channels_last = False
        self.operators = {op._qualname: op for op in own_operators()}
        self.launches: dict[str, list[Specialisation]] = {}
        self.captured: list[tuple[StorageWeakRef, tuple[str, str]]] = []  # what was allocated in a capture, and where

    @contextlib.contextmanager
    def during(self, scene: str, *, channels_last: bool = True) -> Iterator[None]:
        """Watch what runs inside the `with` block, and record its launches, under this name."""
        self.scene, self.channels_last = scene, channels_last
        with recorded(describe=self.launched) as recording:
            try:
                with self:
                    yield
            except Exception as error:
                where = lines_of(reversed(list(traceback.walk_tb(error.__traceback__))))
                self.note("fails", f"{type(error).__name__}: {str(error).splitlines()[0]}", where)
        self.launches[scene] = recording.launches
        self.check_captured()
        self.scene, self.hot = "", False

    def specialisations(self) -> dict[Specialisation, set[str]]:
        """What was launched, each with the scenes that launched it."""
        found: dict[Specialisation, set[str]] = {}
        for scene, launches in self.launches.items():
            for each in launches:
                found.setdefault(each, set()).add(scene)
        return found

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """Inside the `with` block nothing may wait for the device."""
        self.hot = True
        try:
            yield
        finally:
            self.hot = False

    def waiting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, inside of which the host may wait for the device: a set-up, a measurement."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            hot, self.hot = self.hot, False
            try:
                return function(*args, **kwargs)
            finally:
                self.hot = hot

        return wrapped

    def any_layout(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose convolutions need not be channels-last."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            channels_last, self.channels_last = self.channels_last, False
            try:
                return function(*args, **kwargs)
            finally:
                self.channels_last = channels_last

        return wrapped

    def note(self, kind: str, detail: str, where: str | None = None) -> None:
        if self.scene:
            self.findings[Finding(self.scene, kind, detail, where or place())] += 1

    def host_note(self, kind: str, detail: str) -> None:
        if self.hot or self.host.capturing:
            self.note(kind, detail)

    def waits(self, detail: str) -> None:
        self.host_note("host sync in a capture" if self.host.capturing else "host sync", detail)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = tensors(args, kwargs)
        name = func._schema.name.split("::")[1]
        if kwargs.get("pin_memory") and self.host.capturing:
            self.note("pinned memory in a capture", f"{func}")
        on_gpu = any(each.is_cuda for each in given)
        self.check_copies(func, name, args, kwargs, given)
        if on_gpu:
            self.launched_so_far += func.namespace == "aten" and not func.is_view and name not in SILENT
            self.check_devices(func, name, given)
            if name in WAITING or (name in ("index", "index_put", "index_put_") and has_mask(given)):
                self.waits(f"{func}")
        if func.namespace == "vapi_fast":
            result = self.own(func, args, kwargs)
        elif name == "_local_scalar_dense":  # some number, for whoever asks
            return {torch.bool: False}.get(given[0].dtype, 0.0 if given[0].is_floating_point() else 0)
        elif name == "cudnn_convolution_relu":  # PyTorch has no fake of it
            x, weight, bias, stride, padding, dilation, groups = args
            result = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0], groups)
        elif func._overloadname == "dtype_out":  # its fake asks for other arguments in PyTorch before 2.13
            result = kwargs["out"]
        else:
            result = func(*args, **kwargs)
        self.check_results(func, name, given, tensors(result))
        return result

    def own(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        operator = self.operators[func._schema.name]
        with self:
            result = operator._init_fn(*args, **kwargs)
        if operator._abstract_fn is not None:
            expected = operator._abstract_fn(*args, **kwargs)
            real, fake = ([describe(each) for each in tensors(found)] for found in (result, expected))
            if real != fake:
                self.note("fake differs", f"{func}: its body gives {real}, its fake {fake}", func._schema.name)
        return result

    def check_devices(self, func: Any, name: str, given: list[torch.Tensor]) -> None:
        if name not in ("_to_copy", "copy_") and len({each.device for each in given if each.ndim}) > 1:
            self.note("mixed devices", f"{func}: {[str(each.device) for each in given]}")

    def check_copies(
        self, func: Any, name: str, args: tuple, kwargs: dict[str, Any], given: list[torch.Tensor]
    ) -> None:
        """A copy between host and device that the host waits for."""
        if name == "_to_copy":
            source, target, waits = given[0].device, kwargs.get("device"), not kwargs.get("non_blocking")
        elif name == "copy_":
            source, target, waits = given[-1].device, given[0].device, not (len(args) > 2 and args[2])
        else:
            return
        if waits and target is not None and target.type != source.type:
            inside = " in a capture" if self.host.capturing else ""
            self.host_note(f"blocking copy{inside}", f"{func} of {list(given[-1].shape)} from {source} to {target}")

    def check_results(self, func: Any, name: str, given: list[torch.Tensor], results: list[torch.Tensor]) -> None:
        for each in results:
            if each.is_cuda and each.numel() >= LIMIT:
                self.note("2³¹ elements or more", f"{func}: {list(each.shape)} {each.dtype}")
        if name in CONVOLUTIONS and self.channels_last:
            for role, each in zip(("input", "weight", "result"), (*given[:2], *results), strict=False):
                if each.is_cuda and not each.is_contiguous(memory_format=torch.channels_last):
                    self.note("layout", f"{role} of a convolution is not channels-last: {describe(each)}")
        if self.host.capturing:
            old = {StorageWeakRef(each.untyped_storage()) for each in given}
            for each in results:
                storage = StorageWeakRef(each.untyped_storage())
                if each.is_cuda and storage not in old:
                    self.captured.append((storage, (f"{func} {list(each.shape)}", place())))

    def launched(self, launch: Launch) -> Specialisation:
        name = launch.kernel.__name__
        self.launched_so_far += 1
        if not all(isinstance(size, int) for size in launch.grid):
            self.note("grid", f"{name}: {launch.grid} is not of integers")
        elif any(size > limit for size, limit in zip(launch.grid, GRID_LIMITS, strict=False)):
            self.note("grid", f"{name}: {launch.grid} is larger than a device takes")
        for each in launch.args:
            if isinstance(each, torch.Tensor):
                if not each.is_cuda:
                    self.note("kernel argument off the device", f"{name}: {describe(each)}")
                if each.numel() >= LIMIT:
                    self.note("2³¹ elements or more", f"argument of {name}: {describe(each)}")
            elif isinstance(each, int) and not -LIMIT <= each < LIMIT:
                self.note("2³¹ elements or more", f"argument of {name}: {each}")
        return specialisation(launch.kernel, launch.args, launch.constants)

    def check_captured(self) -> None:
        """A graph's memory belongs to whatever is replayed next, once nobody holds the tensor inside the capture."""
        gc.collect()
        graphs = [each for each in gc.get_objects() if type(each) in (RecordedGraph, RecordedStages)]
        kept = {
            StorageWeakRef(each.untyped_storage()) for graph in graphs for each in tensors(vars(graph).get("outputs"))
        }
        for storage, origin in self.captured:
            if not storage.expired() and storage not in kept:
                self.note("outlives its capture", *origin)
        self.captured.clear()


def own_operators() -> Iterator[Any]:
    for module in pkgutil.iter_modules(kernels.__path__):
        for value in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).values():
            if isinstance(value, CustomOpDef):
                yield value


def has_mask(given: list[torch.Tensor]) -> bool:
    return any(each.dtype == torch.bool for each in given[1:])


def describe(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Shape, strides, dtype and device."""
    return tuple(tensor.shape), tensor.stride(), str(tensor.dtype).removeprefix("torch."), str(tensor.device)
