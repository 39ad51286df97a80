"""Fuzzing of the operations' arguments: the reference and the interpreted kernels must answer alike.

Each example is a valid call of small random sizes, zero included, with up to two arguments spoilt. Either it succeeds
on both backends, with results of the same shapes, dtypes and values, or both raise the same one-line TypeError or
ValueError that begins with the operation's name. The one difference allowed: kernels take no float64.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case, Sizes, Source, changed, policy, tensors
from test_registration import OPERATIONS
from torch import Tensor

from vapi_fast import ops
from vapi_fast.ops.backends import BACKENDS
from vapi_fast.ops.checks import MAX_VOCABULARY

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the values of tokens are not checked")

Arguments = dict[str, Any]
Draw = Callable[[st.SearchStrategy], Any]

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 0)
LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *LOW_PRECISION, torch.int64, torch.int32, torch.bool, torch.complex64)
WRONG_TYPES = (None, "1", [1.0], 1 + 0j)
WRONG_NUMBERS = (math.nan, math.inf, -math.inf, -1, 0, 1, 0.5, 2.5, True)
HUGE_NUMBERS = (2**31, 2**63, 10**400)
PARAMETERS = {name: inspect.signature(getattr(ops, name)).parameters for name in OPERATIONS}


EXAMPLES = {"decode_attention": 30}  # others: 40
MANY_STEPS_A_ROW = {"group_sample", "linear_group_sample"}  # interpreted one by one: few rows are given to them
THE_MODELS_OWN = {"model", "condition"}
# These refuse what requires a gradient.
INFERENCE = {
    "add_group_norm_silu",
    "bias_add",
    "bias_group_norm_silu",
    "convolution",
    "convolution_group_norm_silu",
    "scaled_pixels",
}
CACHE = {f"{name}_{part}" for name in "kv" for part in ("cache", "scale")} | {"prefix_k", "prefix_v"}
WITHOUT_GRADIENT = {"table", "q", "qkv"} | CACHE  # none is promised to these


class Drawn(Source):
    """All of one dtype, that of what is fp32 in production too."""

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return super().normal(*shape, scale=scale)

    def integers(self, *shape: int, below: int) -> Tensor:
        return super().integers(*shape, below=max(below, 1))


def whole_cache(s: Sizes, new: Source) -> Arguments:
    keys, values = (new.normal(s.sequences, s.heads, s.tokens, s.head_dim) for _ in range(2))
    table = new.rotations(s.tokens, s.head_dim)
    qkv = new.normal(s.sequences, 3, s.heads, s.head_dim)
    return {"qkv": qkv, "table": table, "k_cache": keys, "v_cache": values, "position": 0}


def by_token(s: Sizes, new: Source) -> Arguments:
    return policy(s, new) | {"advantages": new.normal(s.images, s.group, s.tokens)}


CALLS = [
    *CASES,
    Case("policy_loss", by_token),
    Case("append_to_cache", whole_cache),
    Case("rms_norm", lambda s, new: {"x": new.normal(s.width)} | {"weight": new.normal(s.width)}),
]


@st.composite
def sizes(draw: Draw, few_rows: bool) -> Sizes:
    """Small ones, of which each may be zero."""
    found = {each.name: draw(st.sampled_from(SIZES)) for each in dataclasses.fields(Sizes)}
    if few_rows:
        found |= {name: draw(st.sampled_from((1, 2, 3, 0))) for name in ("images", "tokens")}
    groups, per_prefix = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2)))
    found |= {
        "head_dim": draw(st.sampled_from((8, 16, 2, 0))),
        "norm_groups": groups,
        "channels": 2 * groups * draw(st.sampled_from((1, 2, 0))),
    }
    return Sizes(**found | {"group": per_prefix, "sequences": per_prefix * found["sequences"]})


def options(draw: Draw, given: Arguments, s: Sizes) -> Arguments:
    """Values for the parameters of operations that a case leaves out, or fixes."""
    seed = draw(st.sampled_from((0, -1, 2**63 - 1, -(2**63))))
    batch = len(next(tensors(list(given.values()))))
    ids = torch.randint(2**62, (batch,)) if draw(st.booleans()) else None
    last = max(s.tokens - 1, 0)
    return {
        "seed": torch.tensor(seed) if draw(st.booleans()) else seed,
        "sample_ids": ids,
        "first_rollouts": ids,
        "first_position": draw(st.sampled_from((0, 3, torch.tensor(5)))),
        "position": draw(st.sampled_from((0, last, torch.tensor(last)))),
        "temperature": draw(st.sampled_from((1.0, 0.5, 2))),
        "top_k": draw(st.sampled_from((0, 1, 3, 100))),
        "top_p": draw(st.sampled_from((1.0, 1, 0.5, 0.01))),
        "noise_prob": draw(st.sampled_from((0.0, 0.5, 1))),
        "prior_weight": draw(st.sampled_from((0, 0.1))),
        "kl_weight": draw(st.sampled_from((0.0, 1))),
        "tau": draw(st.sampled_from((1, 0.5))),
        "bias": given["weight"][:, :1].sum(1) if "hidden" in given and draw(st.booleans()) else None,
        "eps": 1e-3,
        "l2_norm": draw(st.booleans()),
        "silu": draw(st.booleans()),
        "prefix_mask": torch.randint(2, given["prefix_k"].shape[::2]).bool()
        if "prefix_k" in given and draw(st.booleans())
        else None,
    }


def spoilt(draw: Draw, value: Any) -> Any:
    """The argument in another form, which may be as valid as before."""
    if isinstance(value, Tensor):
        return draw(st.sampled_from(SPOILERS))(draw, value)
    if isinstance(value, list) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], spoilt(draw, value[index]), *value[index + 1 :]]
    if isinstance(value, list):
        return draw(st.sampled_from((value[1:], value + value[:1], tuple(value), *WRONG_TYPES, 3)))
    return draw(st.sampled_from(WRONG_NUMBERS + WRONG_TYPES))


def resized(draw: Draw, x: Tensor) -> Tensor:
    if x.ndim == 0:
        return x
    shape = list(x.shape)
    shape[draw(st.integers(0, x.ndim - 1))] = draw(st.sampled_from(SIZES))
    return torch.ones(shape).to(x.dtype)


SPOILERS: tuple[Callable[[Draw, Tensor], Any], ...] = (
    lambda draw, x: x.to(draw(st.sampled_from(DTYPES))),
    lambda draw, x: x[None],
    lambda draw, x: x[0] if x.ndim and len(x) else x,
    resized,
    lambda draw, x: x.flatten(),
    lambda draw, x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim else x,
    lambda draw, x: (x.to(torch.float32) - draw(st.sampled_from((1, -100, 0)))).to(x.dtype),  # tokens out of range
    lambda draw, x: draw(st.sampled_from((*WRONG_TYPES, 3, 0.5))),
)


@st.composite
def calls(draw: Draw, name: str) -> Arguments:
    case, parameters = draw(st.sampled_from([each for each in CALLS if each.operation == name])), PARAMETERS[name]
    torch.manual_seed(draw(st.integers(0, 1000)))
    some, source = (
        draw(sizes(name in MANY_STEPS_A_ROW)),
        Drawn(torch.device("cpu"), draw(st.sampled_from((torch.float32, *LOW_PRECISION)))),
    )
    arguments = case.inputs(some, source)
    further = options(draw, arguments, some)
    arguments |= case.options
    arguments |= {
        key: x for key, x in further.items() if key in parameters and (key != "bias" or "hidden" in arguments)
    }
    for optional in [key for key in arguments if parameters[key].default is None]:
        if draw(st.booleans()):
            del arguments[optional]
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 2)))):
        victim = draw(st.sampled_from(sorted(arguments.keys() - THE_MODELS_OWN)))
        arguments[victim] = spoilt(draw, arguments[victim])
    return arguments


def outcome(name: str, arguments: Arguments, backend: str) -> list[Tensor] | Exception:
    """Results and gradients, or the error."""
    without = arguments.keys() if name in INFERENCE else WITHOUT_GRADIENT
    arguments = {key: x if key in without else changed(x, with_gradient) for key, x in arguments.items()}
    leaves = [x for x in tensors(arguments) if x.requires_grad]
    with ops.use_backend(backend):
        try:
            results = list(tensors([getattr(ops, name)(**arguments)]))
        except Exception as error:
            return error
        results_sum = sum((result.sum() for result in results if result.requires_grad), torch.zeros(()))
        if results_sum.requires_grad:
            results_sum.backward()
    return [x.detach() for x in results] + [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def with_gradient(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


def assert_alike(name: str, arguments: Arguments) -> None:
    expected, actual = (outcome(name, arguments, backend) for backend in BACKENDS)
    owners = ("noisy_prefix", "linear_cross_entropy") if name == "noisy_prefix_cross_entropy" else (name,)
    for error in (expected, actual):
        if isinstance(error, Exception):
            assert type(error) in (TypeError, ValueError), repr(error)
            assert re.fullmatch(rf"({'|'.join(owners)}): .+", str(error)), repr(error)
    dtypes = {x.dtype for x in tensors(arguments)}
    if torch.float64 in dtypes and not isinstance(expected, Exception):
        assert isinstance(actual, TypeError)
        assert "on the 'triton' backend, got float64" in str(actual)
        return
    if isinstance(expected, Exception) or isinstance(actual, Exception):
        assert (type(actual), str(actual)) == (type(expected), str(expected))
        return
    tolerance = 2e-2 if dtypes & set(LOW_PRECISION) else 1e-4
    for found, right in zip(actual, expected, strict=True):
        assert (found.shape, found.dtype) == (right.shape, right.dtype)
        if not found.is_floating_point():
            assert torch.equal(found, right)
            continue
        assert right.isfinite().all()
        assert (found.double() - right.double()).norm() <= tolerance * (1 + right.double().norm())


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_arguments(name: str) -> None:
    @settings(
        max_examples=EXAMPLES.get(name, 40), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(calls(name))
    def check(arguments: Arguments) -> None:
        assert_alike(name, arguments)

    check()


@pytest.mark.parametrize("name", OPERATIONS)
def test_huge_numbers(name: str) -> None:
    first = settings(database=None, derandomize=True, phases=[Phase.generate])  # which is the simplest
    smallest = find(calls(name), lambda _: True, settings=first)
    numbers = {key for key, value in smallest.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    for key, number in itertools.product(sorted(numbers - {"group_size", "vocab_size"}), HUGE_NUMBERS):
        assert_alike(name, smallest | {key: number})
    for key in numbers & {"group_size", "vocab_size"}:  # an int that fits is taken, whatever memory it needs
        assert_alike(name, smallest | {key: 10**400})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("group_sample", {"logits": torch.zeros(1, 1, MAX_VOCABULARY + 1), "group_size": 1, "seed": 0}),
        (
            "linear_cross_entropy",
            {
                "hidden": torch.zeros(1, 1, 1),
                "weight": torch.zeros(MAX_VOCABULARY + 1, 1),
                "targets": torch.zeros(1, 1, dtype=torch.int64),
            },
        ),
    ],
)
def test_a_vocabulary_beyond_the_limit(name: str, arguments: Arguments) -> None:
    with pytest.raises(ValueError, match=f"{name}: .* V <= 65536, got V=65537"):
        getattr(ops, name)(**arguments)
    assert_alike(name, arguments)
