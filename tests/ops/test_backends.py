"""The choice of backend, and that every operation runs on the one chosen."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from vapi_fast import ops
from vapi_fast.ops import backends


def test_the_default_follows_the_device() -> None:
    assert backends.backend_name(torch.zeros(1)) == "reference"
    assert backends.backend_name(SimpleNamespace(is_cuda=True)) == "triton"
    with ops.use_backend("reference"):
        assert backends.backend_name(SimpleNamespace(is_cuda=True)) == "reference"


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


def calls() -> dict[str, object]:
    x, row, ids = torch.zeros(2, 4, 8), torch.zeros(8), torch.zeros(2, 4, dtype=torch.int64)
    head, image, group = torch.zeros(5, 8), torch.zeros(2, 8, 3, 3), torch.zeros(2, 3, 4, dtype=torch.int64)
    cache = torch.zeros(2, 4, 6, 8)
    return {
        "group_sample": lambda: ops.group_sample(x, 2, seed=0),
        "linear_group_sample": lambda: ops.linear_group_sample(x, head, 2, seed=0),
        "noisy_prefix": lambda: ops.noisy_prefix(ids, 0.5, 5, seed=0),
        "policy_loss": lambda: ops.policy_loss(x, head, group, torch.zeros(2, 3), ids),
        "group_advantages": lambda: ops.group_advantages(head),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, head, ids),
        "vq_lookup": lambda: ops.vq_lookup(x, head),
        "codebook_lookup": lambda: ops.codebook_lookup(ids, head),
        "straight_through_lookup": lambda: ops.straight_through_lookup(x, x[0].T, tau=1.0, seed=0),
        "lpips_distance": lambda: ops.lpips_distance([image], [image], [row]),
        "mse": lambda: ops.mse(image, image),
        "group_norm_silu": lambda: ops.group_norm_silu(image, row, row, 4, 1e-6),
        "bias_group_norm_silu": lambda: ops.bias_group_norm_silu(image, row, row, row, 4, 1e-6),
        "add_group_norm_silu": lambda: ops.add_group_norm_silu(image, row, row, 4, 1e-6),
        "rms_norm": lambda: ops.rms_norm(x, row),
        "rotary_2d": lambda: ops.rotary_2d(cache, torch.zeros(4, 4, 2)),
        "swiglu": lambda: ops.swiglu(x, x),
        "append_to_cache": lambda: ops.append_to_cache(
            torch.zeros(2, 3, 4, 8), torch.zeros(6, 4, 2), cache, cache.clone(), 0
        ),
        "decode_attention": lambda: ops.decode_attention(x, cache, cache, 0),
    }


@pytest.mark.parametrize("name", calls())
def test_every_operation_runs_on_the_chosen_backend(marked: str, name: str) -> None:
    with ops.use_backend(marked):
        assert calls()[name]() == name
        with ops.use_backend("reference"):
            assert calls()[name]() is not name
        assert calls()[name]() == name
    assert not isinstance(calls()[name](), str)


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
