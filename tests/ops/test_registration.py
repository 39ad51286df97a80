"""Every operation has a Triton implementation under its own signature, and compiles without a graph break."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, SMALLEST, Source, tensors
from fused import DEVICE
from torch import Tensor

from vapi_fast import ops, reference
from vapi_fast.ops.backends import implementation

NOT_KERNELS = {"PolicyLoss", "fold_seed", "group_advantages", "rotary_2d_table", "use_backend"}
OPERATIONS = sorted(set(ops.__all__) - NOT_KERNELS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_a_triton_implementation_of_the_same_signature(name: str) -> None:
    with ops.use_backend("triton"):
        public, fused = inspect.signature(getattr(ops, name)), implementation(torch.zeros(1))
    assert inspect.signature(getattr(fused, name)) == public
    assert inspect.signature(getattr(reference, name)) == public
    assert getattr(fused, name) is not getattr(reference, name)
    assert name in fused.__all__


def arguments() -> dict[str, dict[str, Any]]:
    """Of every case, and of filtered draws from a position and rollouts that are known on the device alone."""
    torch.manual_seed(0)
    found = {case.name: case.inputs(SMALLEST, Source(DEVICE, torch.float32)) for case in CASES}
    ids = torch.arange(SMALLEST.images, device=DEVICE)
    later = {"seed": torch.tensor(7, device=DEVICE), "sample_ids": ids, "top_k": 5}
    later |= {"first_position": torch.tensor(3, device=DEVICE), "first_rollouts": ids}
    found |= {f"{name} later": found[name] | later for name in ("group_sample", "linear_group_sample")}
    prefixed = found["decode_attention prefix"]
    mask = torch.ones(prefixed["prefix_k"].shape[::2], dtype=torch.bool, device=DEVICE)
    found |= {"decode_attention masked": prefixed | {"prefix_mask": mask}}
    whole = dict(found["append_to_cache"])
    for name in ("k", "v"):
        whole[f"{name}_cache"] = torch.zeros_like(whole[f"{name}_cache"], dtype=torch.int8)
        whole[f"{name}_scale"] = whole[f"{name}_cache"][..., 0].float()
    return found | {"append_to_cache int8": whole}


def every_operation(inputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Results by case."""
    found = {}
    for name, given in inputs.items():
        if name in BY_NAME:
            found[name] = BY_NAME[name].call(ops, given)
        else:
            found[name] = getattr(ops, name.split()[0])(**given)
    return found


def results_and_gradients(function: Callable[..., dict[str, Any]]) -> dict[str, list[Tensor]]:
    inputs, leaves = arguments(), {}
    for case in CASES:
        inputs[case.name], leaves[case.name] = case.differentiable(inputs[case.name])
    found = {name: list(tensors(results)) for name, results in function(inputs).items()}
    differentiable = [each for results in found.values() for each in results if each.requires_grad]
    every_leaf = [leaf for several in leaves.values() for leaf in several]
    assert len(differentiable) == sum(map(bool, leaves.values()))
    ones = [torch.ones_like(each) for each in differentiable]
    return found | {"gradients": list(torch.autograd.grad(differentiable, every_leaf, ones))}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_every_operation_compiles_without_a_graph_break(backend: str) -> None:
    compiled = torch.compile(every_operation, fullgraph=True, backend=backend)
    with ops.use_backend("triton"):
        expected = results_and_gradients(every_operation)
        actual = results_and_gradients(compiled)
    assert {name.split()[0] for name in expected} == {*OPERATIONS, "group_advantages", "gradients"}
    for name, values in expected.items():
        torch.testing.assert_close(actual[name], values, msg=lambda text, name=name: f"{name}: {text}")
