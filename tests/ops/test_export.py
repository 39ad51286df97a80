"""The raw operators: documented as they are registered, and exported programs of them run elsewhere as here."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import tensors
from fused import DEVICE
from test_registration import arguments, every_operation
from torch import Tensor, nn

from vapi_fast import ops

DOCUMENT = Path(__file__).parents[2] / "docs" / "ops.md"
SIZES = dict(zip("BGTVDCIHWKNSPL", (2, 3, 4, 24, 16, 8, 4, 4, 6, 2, 6, 7, 3, 5), strict=True))
DTYPES = {"float": torch.bfloat16, "fp32": torch.float32, "int64": torch.int64, "bool": torch.bool}
OPTIONS = {
    "channels": 8,
    "groups": 2,
    "pad": 0,
    "group_size": 3,
    "top_k": 0,
    "vocab_size": 24,
    "phases": False,
    "site": 3,
    "dtype": torch.float32,
}
KINDS = "|".join(DTYPES)
LOADER = """
import sys
from pathlib import Path
from typing import Any
import torch
import vapi_fast.ops

for program in Path(sys.argv[1]).glob("*.pt2"):
    module = torch.export.load(program).module()
    torch.save(module(*torch.load(program.with_suffix(".inputs"))), program.with_suffix(".results"))
"""


def documented() -> dict[str, tuple[str, str, str]]:
    """The document's table: schema, shapes and public functions by operator."""
    rows = re.findall(r"^\| `((\w+)\(.*\) -> .*?)` \| (.*) \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {name: (schema, shapes, public) for schema, name, shapes, public in rows}


def registered() -> set[str]:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vapi_fast::")}
    return {name.removeprefix("vapi_fast::").partition(".")[0] for name in names}


def test_every_operator_is_documented() -> None:
    assert set(documented()) == registered()


@pytest.mark.parametrize("name", sorted(registered()))
def test_schema_is_documented(name: str) -> None:
    schema, _, public = documented()[name]
    assert f"vapi_fast::{schema}" == str(getattr(torch.ops.vapi_fast, name).default._schema)
    functions = re.findall(r"`(\w+)`", public)
    assert functions or public == "backward of the two losses"
    assert set(functions) <= set(ops.__all__)


def shape(text: str) -> list[int]:
    """A documented shape in numbers; "..." stands for two dimensions."""
    sizes: list[int] = []
    for dimension in filter(None, text.split(", ")):
        if dimension == "...":
            sizes += [2, 3]
        else:
            sizes.append(size(dimension))
    return sizes


def size(dimension: str) -> int:
    """Of a documented dimension: `T`, `2`, `B·T`, `T-1` or `D/2`."""
    if "-" in dimension or "/" in dimension:
        letter, operator, number = dimension
        return SIZES[letter] - int(number) if operator == "-" else SIZES[letter] // int(number)
    return math.prod(SIZES[each] if each in SIZES else int(each) for each in dimension.split("·"))


def documented_tensors(text: str, named: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the documented dtypes and shapes, without data; the first of several dtypes."""
    pattern = rf"`(\w+)` ({KINDS})(?:(?:, \w+)* or \w+)? `\[(.*?)\]`" if named else rf"()\b({KINDS}) `\[(.*?)\]`"
    for name, dtype, dimensions in re.findall(pattern, text):
        yield name, torch.empty(shape(dimensions), dtype=DTYPES[dtype], device="meta")


@pytest.mark.parametrize("name", sorted(registered()))
def test_shapes_and_dtypes_are_documented(name: str) -> None:
    """The operator, given tensors as its row says, infers results as its row says."""
    before, after = documented()[name][1].split(" → ")
    given = dict(documented_tensors(before, named=True))
    operator = getattr(torch.ops.vapi_fast, name).default
    arguments = []
    for argument in operator._schema.arguments:
        kind = str(argument.type)
        if "Tensor" in kind:
            value = given.pop(argument.name)
            arguments.append([value] if kind.startswith("List") else value)
        else:
            usual = None if kind.startswith("Optional") else True if kind == "bool" else 0.5
            arguments.append(usual if usual is None else OPTIONS.get(argument.name, usual))
    assert not given
    results = operator(*arguments)
    results = [results] if isinstance(results, Tensor) else list(results)
    expected = [value for _, value in documented_tensors(after, named=False)]
    assert [(x.dtype, list(x.shape)) for x in results] == [(x.dtype, list(x.shape)) for x in expected]


class EveryOperation(nn.Module):
    """Each on its case's inputs."""

    def forward(self, inputs: dict[str, dict[str, Any]]) -> dict[str, list[Tensor]]:
        return {name: list(tensors(results)) for name, results in every_operation(inputs).items()}


def test_an_exported_program_runs_in_another_process(tmp_path: Path) -> None:
    inputs = {name: given for name, given in arguments().items() if "model" not in given}  # which is no tensor
    with ops.use_backend("triton"):
        exported = torch.export.export(EveryOperation(), (inputs,))
        torch.save((inputs,), tmp_path / "every.inputs")
        expected = EveryOperation()(inputs)
    graphs = [each.graph for each in exported.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    forward = {name for name, (_, _, public) in documented().items() if "backward" not in name + public}
    assert {each.split(".")[1] for each in called if each.startswith("vapi_fast.")} == forward
    torch.export.save(exported, tmp_path / "every.pt2")
    variables = os.environ | ({} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"})
    subprocess.run([sys.executable, "-c", LOADER, tmp_path], check=True, env=variables)
    torch.testing.assert_close(torch.load(tmp_path / "every.results"), expected, rtol=0, atol=0)
