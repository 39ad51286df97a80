"""The choice of backend, and that every operation runs on the one chosen."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, SMALLEST, Source

from vapi_fast import ops
from vapi_fast.ops import backends


def test_the_default_follows_the_device() -> None:
    assert backends.backend_name(torch.zeros(1)) == "reference"
    on_gpu = SimpleNamespace(is_cuda=True, is_meta=False)
    assert backends.backend_name(on_gpu) == "triton"
    with ops.use_backend("reference"):
        assert backends.backend_name(on_gpu) == "reference"
    with ops.use_backend("triton"):
        assert backends.backend_name(torch.zeros(1, device="meta")) == "reference"  # no kernel could be launched


def test_the_folder_of_a_checkout_is_no_second_package() -> None:
    """Whoever imports it as `kernels`, as `transformers` does for another package, leaves the operators alone."""
    code = "import vapi_fast.kernels, kernels, sys; print([n for n in sys.modules if n.startswith('kernels')])"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout == "['kernels']\n"


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="expected one of 'reference', 'triton', got 'cuda'"), ops.use_backend("cuda"):
        pass


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "kernels", None)
    with pytest.raises(ValueError, match="needs the package triton"), ops.use_backend("triton"):
        pass


def test_a_compiled_kernel_on_a_cpu_tensor() -> None:
    call = "with ops.use_backend('triton'): ops.rms_norm(torch.ones(4), torch.ones(4))"
    code = f"import torch; from vapi_fast import ops\n{call}"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ValueError: vapi_fast: Triton kernels run on CUDA tensors, got one on cpu" in ended.stderr


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> str:
    """A second backend whose operations return their own name."""
    names = [name for name in ops.__all__ if name.islower()]
    fake = SimpleNamespace(**{name: lambda *_, _name=name, **__: _name for name in names})
    monkeypatch.setattr(backends, "kernels", fake)
    return "triton"


CALLS = {case.operation: case for case in CASES if case.operation != "noisy_prefix_cross_entropy"}  # made of two others


@pytest.mark.parametrize("name", CALLS)
def test_every_operation_runs_on_the_chosen_backend(marked: str, name: str) -> None:
    case = CALLS[name]
    inputs = case.inputs(SMALLEST, Source(torch.device("cpu"), torch.float32))

    def call() -> object:
        return getattr(ops, name)(**inputs, **case.options)

    with ops.use_backend(marked):
        assert call() == name
        with ops.use_backend("reference"):
            assert call() is not name
        assert call() == name
    assert not isinstance(call(), str)


def test_the_choice_is_the_threads_own(marked: str) -> None:
    seen = []
    with ops.use_backend(marked):
        thread = threading.Thread(target=lambda: seen.append(backends.backend_name(torch.zeros(1))))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_the_choice_ends_with_an_error(marked: str) -> None:
    with pytest.raises(RuntimeError), ops.use_backend(marked):
        raise RuntimeError
    assert backends.backend_name(torch.zeros(1)) == "reference"
