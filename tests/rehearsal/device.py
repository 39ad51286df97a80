"""A CUDA device that is not there: fake tensors on "cuda:0" in a process without a GPU, on any build of PyTorch.

`load()` must come before the process's first `import torch`. Then, inside `present()`, `torch.cuda` answers as one H200
would, tensors are fake (shapes, strides, dtypes and devices, no numbers), and whoever waits for the device is noted.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SOURCE = Path(__file__).with_name("device.cpp")
NAME, CAPABILITY, MULTIPROCESSORS, MEMORY, CACHE = "NVIDIA H200", (9, 0), 132, 143771 * 2**20, 60 * 2**20
FREE = 139 * 2**30


class AbsentError(RuntimeError):
    """The stand-in for a device cannot be built here; the message says what is missing."""


def load() -> None:
    """Build the device's C++ side, once for each version of PyTorch, and load it under PyTorch.

    Raises AbsentError without a C++ compiler.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the stand-in for a CUDA device must be loaded before torch is imported")
    folder = Path(importlib.util.find_spec("torch").origin).parent
    library = ctypes.CDLL(str(built(folder)), mode=ctypes.RTLD_GLOBAL)
    import torch

    library.install_guard()
    torch.autograd.set_multithreading_enabled(False)  # modes of dispatch belong to a thread


def built(folder: Path) -> Path:
    """The shared library for the PyTorch in `folder`."""
    key = SOURCE.read_bytes() + importlib.metadata.version("torch").encode() + str(folder).encode()
    path = Path(tempfile.gettempdir()) / f"vapi-fast-device-{os.getuid()}-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if path.exists() and path.stat().st_uid == os.getuid():
        return path
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise AbsentError("no C++ compiler: install g++")
    libraries = [f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder / 'lib'}"]
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        output = Path(work) / path.name
        command = [compiler, "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{folder / 'include'}", str(SOURCE)]
        ended = subprocess.run([*command, "-o", str(output), *libraries], capture_output=True, text=True)
        if ended.returncode:
            error = next(
                (line for line in ended.stderr.splitlines() if "error" in line), f"exit code {ended.returncode}"
            )
            raise AbsentError(f"{compiler} cannot build the device: {error}")
        os.replace(output, path)
    return path


class Host:
    """What the host does to the device: waits, captures, events. `note(kind, detail)` is told of what may be wrong."""

    def __init__(self, note: Callable[[str, str], None]) -> None:
        self.note = note
        self.capturing: Any = None
        self.captures = self.replays = 0
        self.streams: list[Any] = []

    def wait(self, name: str) -> None:
        self.note("synchronisation in a capture" if self.capturing else "synchronisation", name)


def stand_ins(host: Host) -> dict[str, Any]:
    """What `torch.cuda` has in place of its own, by name."""
    import torch

    class Event:
        def __init__(self, enable_timing: bool = False, **_: Any) -> None: ...

        def record(self, stream: Any = None) -> None:
            if host.capturing:
                host.note("event in a capture", "Event.record")

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:  # waits for what lies before it only, and is how figures are read
            if host.capturing:
                host.wait("Event.synchronize")

        def wait(self, stream: Any = None) -> None: ...

        def elapsed_time(self, other: Any) -> float:
            return 1.0

    class Stream:
        def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
            self.device, self.priority, self.cuda_stream = torch.device("cuda", 0), priority, 0

        def wait_stream(self, other: Any) -> None: ...

        def wait_event(self, event: Any) -> None: ...

        def record_event(self, event: Any = None) -> Event:
            return event or Event()

        def synchronize(self) -> None:
            host.wait("Stream.synchronize")

        def query(self) -> bool:
            return True

        def __enter__(self) -> Stream:
            host.streams.append(self)
            return self

        def __exit__(self, *_: object) -> None:
            host.streams.pop()

    class CUDAGraph:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.recorded = False

        def replay(self) -> None:
            if not self.recorded:
                raise RuntimeError("a graph was replayed that has recorded nothing")
            if host.capturing:
                host.note("replay in a capture", "CUDAGraph.replay")
            host.replays += 1

        def pool(self) -> tuple[int, int]:
            return (0, 1)

    @contextlib.contextmanager
    def graph(recorded: CUDAGraph, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
        if host.capturing:
            raise RuntimeError("a capture inside a capture")
        with stream or contextlib.nullcontext():
            host.capturing = recorded
            try:
                yield
            finally:
                host.capturing = None
        recorded.recorded = True
        host.captures += 1

    default = Stream()
    properties = types.SimpleNamespace(
        name=NAME,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=MULTIPROCESSORS,
        total_memory=MEMORY,
        L2_cache_size=CACHE,
        gcnArchName="",
    )
    nothing = dict.fromkeys(("set_device", "_lazy_init", "empty_cache", "manual_seed", "manual_seed_all"))
    nothing |= dict.fromkeys(("reset_peak_memory_stats",))
    answers = dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True)
    answers |= dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_reserved", "max_memory_allocated"), 0)
    answers |= {"current_device": 0, "device_count": 1, "get_device_capability": CAPABILITY, "get_device_name": NAME}
    answers |= {
        "memory_snapshot": [],
        "get_device_properties": properties,
        "mem_get_info": (FREE, MEMORY),
        "graph_pool_handle": (0, 1),
    }
    replaced: dict[str, Any] = {
        name: lambda *_, value=value, **__: value for name, value in (nothing | answers).items()
    }
    return replaced | {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "stream": lambda stream: stream or contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda *_: host.streams[-1] if host.streams else default,
        "default_stream": lambda *_: default,
        "synchronize": lambda *_: host.wait("torch.cuda.synchronize"),
        "is_current_stream_capturing": lambda: host.capturing is not None,
    }


@contextlib.contextmanager
def present(host: Host) -> Iterator[None]:
    """Inside the `with` block there is one H200, whose tensors are fake."""
    import torch
    from torch._subclasses import FakeTensorMode, fake_tensor

    class Mode(FakeTensorMode):
        avoid_device_init = True  # numbers from Python become fake tensors without a look at the device

    places: list[tuple[Any, str, Any]] = [(torch.cuda, name, value) for name, value in stand_ins(host).items()]
    places += [
        (torch, "manual_seed", lambda seed: torch.default_generator.manual_seed(int(seed))),
        (torch.Tensor, "pin_memory", lambda self, device=None: self),
        (torch.nn.Module, "to", moved),
        (torch.nn.functional, "scaled_dot_product_attention", attention),
        (fake_tensor, "init_gpu_context", lambda device: None),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        with Mode(allow_non_fake_inputs=True):
            yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The backend that is likeliest on a device; which one it takes, only a device can say."""
    import torch

    operators = torch.ops.aten
    if q.shape[-1] > 256 or q.dtype == torch.float32 or attn_mask is not None:
        needs_gradient = q.requires_grad
        efficient = operators._scaled_dot_product_efficient_attention
        return efficient(q, k, v, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale)[0]
    return operators._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]


def moved(self: torch.nn.Module, *arguments: Any, **options: Any) -> torch.nn.Module:
    """`Module.to` without swapping the parameters' tensors, which fake ones refuse."""
    import torch

    device, dtype, _, memory_format = torch._C._nn._parse_to(*arguments, **options)

    def converted(tensor: torch.Tensor) -> torch.Tensor:
        to = dtype if tensor.is_floating_point() else None
        if memory_format is not None and tensor.ndim in (4, 5):
            return tensor.to(device, to, memory_format=memory_format)
        return tensor.to(device, to)

    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = converted(parameter.detach())
                module._parameters[name] = torch.nn.Parameter(value, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = converted(buffer)
    return self
