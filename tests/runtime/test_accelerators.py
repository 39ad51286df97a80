"""Which attention and optimizer are chosen with which packages installed; PyTorch's attention against its formula."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accuracy import assert_accurate, relative_l2
from torch import Tensor

from vapi_fast.runtime.accelerators import (
    apex_fused_adam,
    attention_backend,
    attention_for,
    causal_attention,
    cudnn_attention,
    optional_attention,
)
from vapi_fast.runtime.forms import taking

CUDA = torch.device("cuda")
PACKAGES = ("flash_attn", "flash_attn_interface", "xformers", "apex")
NOT_INSTALLED = "raise ImportError('no such package')"
BROKEN = "raise OSError('libcudart.so.11.0: cannot open shared object file')"

FLASH_ATTN = """
def flash_attn_func(q, k, v, causal=False):
    return "flash-attn", q, k, v, causal
"""
XFORMERS_OPS = """
class LowerTriangularMask:
    pass

def memory_efficient_attention(query, key, value, attn_bias=None):
    return "xformers", query, key, value, type(attn_bias).__name__
"""
MULTI_TENSOR_APPLY = """
class multi_tensor_applier:
    available = {}
"""
FUSED_ADAM = """
class FusedAdam:
    pass
"""


class Packages:
    """Packages in a folder that comes first on sys.path, so that they hide installed ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in PACKAGES:
            self.write(f"{name}/__init__.py", NOT_INSTALLED)

    def write(self, path: str, source: str = "") -> None:
        (self.folder / path).parent.mkdir(exist_ok=True, parents=True)
        (self.folder / path).write_text(source)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packages]:
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    for choice in (optional_attention, apex_fused_adam):
        choice.cache_clear()
    yield Packages(tmp_path)
    for choice in (optional_attention, apex_fused_adam):
        choice.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


def test_nothing_installed(packages: Packages) -> None:
    assert attention_backend(CUDA) == "sdpa"
    assert apex_fused_adam() is None


def test_flash_attn_comes_first(packages: Packages) -> None:
    packages.write("flash_attn/__init__.py", FLASH_ATTN)
    packages.write("xformers/__init__.py")
    packages.write("xformers/ops/__init__.py", XFORMERS_OPS)
    assert attention_backend(CUDA) == "flash-attn"
    q, k, v = torch.randn(3, 2, 5, 4, 8).unbind(0)
    name, *heads, causal = attention_for(CUDA, torch.bfloat16, 8).function(q, k, v)
    assert (name, causal) == ("flash-attn", True)
    assert all(given is taken for given, taken in zip((q, k, v), heads, strict=True))  # as they lie in memory


@pytest.mark.parametrize("flash_attn", [NOT_INSTALLED, BROKEN, "flash_attn_interface = None"])
def test_xformers_where_flash_attn_cannot_be_imported(packages: Packages, flash_attn: str) -> None:
    packages.write("flash_attn/__init__.py", flash_attn)
    packages.write("xformers/__init__.py")
    packages.write("xformers/ops/__init__.py", XFORMERS_OPS)
    assert attention_backend(CUDA) == "xformers"
    q, k, v = torch.randn(3, 2, 5, 4, 8).unbind(0)
    name, *heads, mask = attention_for(CUDA, torch.float16, 8).function(q, k, v)
    assert (name, mask) == ("xformers", "LowerTriangularMask")
    assert all(given is taken for given, taken in zip((q, k, v), heads, strict=True))


def test_measured_forms_come_before_what_is_installed(packages: Packages) -> None:
    packages.write("flash_attn/__init__.py", FLASH_ATTN)
    with taking(attention="cudnn"):
        assert attention_backend(CUDA) == "cudnn"
        assert attention_for(CUDA, torch.float32, 64).name == "sdpa"
    with taking(attention="flash-attn-3"):
        assert attention_backend(CUDA) == "flash-attn"  # the other is not installed


@pytest.mark.parametrize("result", ["q - k + v", "(q - k + v, None)"])
def test_flash_attn_3(packages: Packages, result: str) -> None:
    packages.write(
        "flash_attn_interface/__init__.py", f"def flash_attn_func(q, k, v, causal=False):\n    return {result}\n"
    )
    q, k, v = torch.randn(3, 2, 5, 4, 8).unbind(0)
    with taking(attention="flash-attn-3"):
        name, function = attention_for(CUDA, torch.bfloat16, 8)
    assert name == "flash-attn-3"
    assert torch.equal(function(q, k, v), q - k + v)


def test_packages_that_fail_to_load_count_as_absent(packages: Packages) -> None:
    for name in PACKAGES:
        packages.write(f"{name}/__init__.py", BROKEN)
    assert attention_backend(CUDA) == "sdpa"
    assert apex_fused_adam() is None


def test_the_optional_packages_are_for_16_bits_on_cuda(packages: Packages) -> None:
    packages.write("flash_attn/__init__.py", FLASH_ATTN)
    assert attention_backend(torch.device("cpu")) == "sdpa"
    assert "flash_attn" not in sys.modules  # not even imported
    assert attention_for(CUDA, torch.float32, 64).name == "sdpa"
    assert attention_for(CUDA, torch.bfloat16, 100).name == "sdpa"  # LlamaGen-3B's heads
    assert attention_for(torch.device("cuda", 1), torch.float16, 64).name == "flash-attn"


def test_the_choice_is_made_once(packages: Packages) -> None:
    assert attention_backend(CUDA) == "sdpa"
    packages.write("flash_attn/__init__.py", FLASH_ATTN)
    sys.modules.pop("flash_attn", None)
    assert attention_backend(CUDA) == "sdpa"


@pytest.mark.parametrize(("available", "found"), [(True, True), (False, False)])
def test_apex_needs_its_cuda_extensions(packages: Packages, available: bool, found: bool) -> None:
    packages.write("apex/__init__.py")
    packages.write("apex/optimizers/__init__.py", FUSED_ADAM)
    packages.write("apex/multi_tensor_apply/__init__.py", MULTI_TENSOR_APPLY.format(available))
    assert (apex_fused_adam() is not None) == found


def test_the_apex_of_pypi_is_another_project(packages: Packages) -> None:
    packages.write("apex/__init__.py", "def forms(): pass")
    assert apex_fused_adam() is None


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("attention", [causal_attention, cudnn_attention])
@pytest.mark.parametrize("shape", [(2, 1, 3, 8), (1, 65, 2, 16), (3, 7, 1, 20)])
def test_attention_is_the_formula(shape: tuple[int, ...], attention: Callable[..., Tensor]) -> None:
    heads = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out, expected = attention(*heads), softmax_attention(*heads)
    direction = torch.randn(shape, dtype=torch.float64)
    assert relative_l2(out.detach(), expected.detach()) < 1e-12
    gradients, expected_gradients = (torch.autograd.grad(y, heads, direction) for y in (out, expected))
    for gradient, exactly in zip(gradients, expected_gradients, strict=True):
        assert (gradient - exactly).norm() < 1e-12 * direction.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_low_precision(dtype: torch.dtype) -> None:
    assert_accurate(causal_attention, [torch.randn(2, 33, 3, 16) for _ in range(3)], dtype)


def test_the_output_needs_no_copy_to_join_its_heads() -> None:
    qkv = torch.randn(2, 9, 3, 4, 8, requires_grad=True)
    out = causal_attention(*qkv.unbind(2))
    assert out.shape == (2, 9, 4, 8)
    assert out.is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_at_production_size(dtype: torch.dtype) -> None:
    """With whatever is installed; the expected values on the CPU."""
    heads = [torch.randn(2, 577, 24, 64).to(dtype) for _ in range(3)]
    expected = softmax_attention(*(x.double() for x in heads))
    out = causal_attention(*(x.cuda() for x in heads))
    assert relative_l2(out.cpu(), expected) < {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
