"""Tensors that no kernel can read: the same error, or the same value, on every backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vapi_fast import ops

BACKENDS = ("reference", "triton")
CALLS: dict[str, Callable[[Tensor], object]] = {
    "rms_norm": lambda x: ops.rms_norm(x, torch.ones(8)),
    "swiglu": lambda x: ops.swiglu(x, torch.ones(2, 3, 8)),
    "group_sample": lambda x: ops.group_sample(x, 2, seed=0),
    "mse": lambda x: ops.mse(x[None], x[None]) if x.layout == torch.strided and not x.is_nested else ops.mse(x, x),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x, torch.ones(5, 8), torch.zeros(2, 3).long()),
}


def made(kind: str) -> Tensor:
    x = torch.ones(2, 3, 8)
    if kind == "sparse":
        return x.to_sparse()
    if kind == "nested":
        return torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(2, 8)])
    return x.to(
        {"float8": torch.float8_e4m3fn, "int": torch.int32, "complex": torch.complex64, "bool": torch.bool}[kind]
    )


@pytest.mark.parametrize("kind", ["sparse", "nested", "float8", "int", "complex", "bool"])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_refused_is_refused_alike(name: str, kind: str) -> None:
    said = set()
    for backend in BACKENDS:
        with ops.use_backend(backend), pytest.raises((TypeError, ValueError)) as refused:
            CALLS[name](made(kind))
        said.add((refused.type, str(refused.value)))
    ((_, message),) = said
    assert "floating" in message
    assert "\n" not in message


def test_shapes_without_values_give_shapes() -> None:
    x, weight = torch.ones(2, 3, 8, device="meta"), torch.ones(8, device="meta")
    for backend in BACKENDS:
        with ops.use_backend(backend):
            out = ops.rms_norm(x, weight)
        assert (out.shape, out.device.type) == (x.shape, "meta")


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs_are_read_and_expanded_outputs_refused(backend: str) -> None:
    x = torch.randn(1, 1, 8).expand(2, 3, 8)
    with ops.use_backend(backend):
        torch.testing.assert_close(ops.rms_norm(x, torch.ones(1).expand(8)), ops.rms_norm(x.clone(), torch.ones(8)))
        qkv, table = torch.randn(2, 3, 2, 8), torch.randn(5, 4, 2)
        caches = torch.zeros(2, 2, 5, 8), torch.zeros(1, 2, 5, 8).expand(2, 2, 5, 8)
        with pytest.raises(ValueError, match="v_cache is written to and must not be expanded: pass a copy of it"):
            ops.append_to_cache(qkv, table, *caches, 0)


@pytest.mark.parametrize("slots", [0, 5])
@pytest.mark.parametrize("prefix", [False, True])
def test_attention_to_nothing_is_zero(slots: int, prefix: bool) -> None:
    """No own entry yet, an empty cache, a prefix that is masked as a whole."""
    q, cache, shared = torch.randn(2, 3, 16), torch.randn(2, 3, slots, 16), torch.randn(1, 3, 4, 16)
    options = {"prefix_k": shared, "prefix_v": shared, "prefix_mask": torch.zeros(1, 4, dtype=torch.bool)}
    for backend in BACKENDS:
        with ops.use_backend(backend):
            out = ops.decode_attention(q, cache, cache, torch.tensor(-1), **(options if prefix else {}))
        assert (out == 0).all()
