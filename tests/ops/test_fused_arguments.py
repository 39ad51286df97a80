"""Fuzzing of the operations' arguments: the reference and the interpreted kernels must answer alike.

Each example is a valid call of small random sizes, zero included, with up to two arguments spoilt. Either it succeeds
on both backends, with results of the same shapes, dtypes and values, or both raise the same one-line TypeError or
ValueError that begins with the operation's name. The one difference allowed: kernels take no float64.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fused_registration import OPERATIONS, TinyModel
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.ops.backends import BACKENDS
from vapi_fast.ops.checks import MAX_VOCABULARY

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, find, given, settings
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


EXAMPLES = {"linear_group_sample": 15, "group_sample": 30, "policy_loss": 40, "decode_attention": 30}  # others: 60
THE_MODELS_OWN = {"model", "condition"}
INFERENCE = {"add_group_norm_silu", "bias_group_norm_silu"}  # refuse what requires a gradient
WITHOUT_GRADIENT = {
    "model",
    "table",
    "q",
    "qkv",
    "k_cache",
    "v_cache",
    "prefix_k",
    "prefix_v",
}  # none is promised to these


class Call:
    """Draws the arguments of one call."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.dtype = draw(st.sampled_from((torch.float32, *LOW_PRECISION)))
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def sizes(self, count: int, *, zero: bool = True) -> list[int]:
        return [self.draw(st.sampled_from(SIZES if zero else SIZES[:-1])) for _ in range(count)]

    def floating(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(max(below, 1), shape, generator=self.generator)

    def optional(self, value: Any) -> Any:
        return value if self.draw(st.booleans()) else None

    def seed(self) -> int | Tensor:
        seed = self.draw(st.sampled_from((0, -1, 2**63 - 1, -(2**63))))
        return torch.tensor(seed) if self.draw(st.booleans()) else seed

    def sample_ids(self, batch: int) -> Tensor | None:
        return self.optional(self.integers(2**62, batch))

    def filters(self) -> Arguments:
        return {
            "temperature": self.draw(st.sampled_from((1.0, 0.5, 2))),
            "top_k": self.draw(st.sampled_from((0, 1, 3, 100))),
            "top_p": self.draw(st.sampled_from((1.0, 1, 0.5, 0.01))),
        }


def group_sample(call: Call) -> Arguments:
    batch, length, vocab_size = call.sizes(3)
    position = call.draw(st.sampled_from((0, 3, torch.tensor(5))))
    return {
        "logits": call.floating(batch, length, vocab_size),
        "group_size": call.sizes(1)[0],
        "seed": call.seed(),
        "sample_ids": call.sample_ids(batch),
        "first_position": position,
        "first_rollouts": call.sample_ids(batch),
        **call.filters(),
    }


def linear_group_sample(call: Call) -> Arguments:
    batch, length, width, vocab_size = call.sizes(4)
    return {
        "hidden": call.floating(batch, length, width),
        "weight": call.floating(vocab_size, width),
        "group_size": call.sizes(1)[0],
        "seed": call.seed(),
        "sample_ids": call.sample_ids(batch),
        "first_position": call.draw(st.sampled_from((0, torch.tensor(5)))),
        "first_rollouts": call.sample_ids(batch),
        **call.filters(),
    }


def noisy_prefix(call: Call) -> Arguments:
    batch, length, vocab_size = call.sizes(3)
    return {
        "tokens": call.integers(vocab_size, batch, length),
        "noise_prob": call.draw(st.sampled_from((0.0, 0.5, 1))),
        "vocab_size": vocab_size,
        "seed": call.seed(),
        "sample_ids": call.sample_ids(batch),
    }


def policy_loss(call: Call) -> Arguments:
    batch, group, length, width, vocab_size = call.sizes(5)
    return {
        "hidden": call.floating(batch, length, width),
        "weight": call.floating(vocab_size, width),
        "tokens": call.integers(vocab_size, batch, group, length),
        "advantages": call.floating(batch, group),
        "targets": call.integers(vocab_size, batch, length),
        "old_logprobs": call.optional(call.floating(batch, group, length)),
        "base_logprobs": call.optional(call.floating(batch, group, length)),
        "clip_range": 0.2,
        "prior_weight": call.draw(st.sampled_from((0, 0.1))),
        "kl_weight": call.draw(st.sampled_from((0.0, 1))),
        "temperature": call.draw(st.sampled_from((1, 0.7))),
    }


def linear_cross_entropy(call: Call) -> Arguments:
    batch, length, width, vocab_size = call.sizes(4)
    return {
        "hidden": call.floating(batch, length, width),
        "weight": call.floating(vocab_size, width),
        "targets": call.integers(vocab_size, batch, length),
    }


def noisy_prefix_cross_entropy(call: Call) -> Arguments:
    batch, length = call.sizes(2)
    width, vocab_size = call.sizes(2, zero=False)
    torch.manual_seed(0)
    return {
        "model": TinyModel(vocab_size, width),
        "tokens": call.integers(vocab_size, batch, length),
        "condition": torch.zeros(batch, dtype=torch.int64),
        "noise_prob": call.draw(st.sampled_from((0.0, 0.5, 1))),
        "seed": call.seed(),
        "sample_ids": call.sample_ids(batch),
    }


def vq_lookup(call: Call) -> Arguments:
    lead, (vocab_size, channels) = call.sizes(call.draw(st.integers(0, 3))), call.sizes(2)
    return {
        "z": call.floating(*lead, channels),
        "codebook": call.floating(vocab_size, channels),
        "l2_norm": call.draw(st.booleans()),
    }


def codebook_lookup(call: Call) -> Arguments:
    lead, (vocab_size, channels) = call.sizes(call.draw(st.integers(0, 3))), call.sizes(2)
    return {
        "indices": call.integers(vocab_size, *lead),
        "codebook": call.floating(vocab_size, channels),
        "l2_norm": call.draw(st.booleans()),
    }


def straight_through_lookup(call: Call) -> Arguments:
    batch, length, vocab_size, channels = call.sizes(4)
    return {
        "logits": call.floating(batch, length, vocab_size),
        "codebook": call.floating(vocab_size, channels),
        "tau": call.draw(st.sampled_from((1, 0.5))),
        "seed": call.seed(),
        "sample_ids": call.sample_ids(batch),
    }


def lpips_distance(call: Call) -> Arguments:
    batch, *group = call.sizes(call.draw(st.integers(1, 2)))
    levels = [call.sizes(3) for _ in range(call.draw(st.integers(0, 2)))]
    return {
        "features_a": [call.floating(batch, *group, *level) for level in levels],
        "features_b": [call.floating(batch, *level) for level in levels],
        "weights": [call.floating(level[0]) for level in levels],
    }


def mse(call: Call) -> Arguments:
    batch, *group = call.sizes(call.draw(st.integers(1, 2)))
    shape = call.sizes(3)
    return {"a": call.floating(batch, *group, *shape), "b": call.floating(batch, *shape)}


def group_norm_silu(call: Call) -> Arguments:
    batch, per_group, height, width = call.sizes(4)
    groups = call.draw(st.sampled_from((1, 2, 3)))
    channels = groups * per_group
    return {
        "x": call.floating(batch, channels, height, width),
        "weight": call.floating(channels),
        "bias": call.floating(channels),
        "groups": groups,
        "eps": 1e-3,
    }


def bias_group_norm_silu(call: Call) -> Arguments:
    norm = group_norm_silu(call)
    h = norm.pop("x")
    return {"h": h, "channel_bias": call.floating(h.shape[1]), **norm}


def add_group_norm_silu(call: Call) -> Arguments:
    norm = group_norm_silu(call)
    shape, phases = norm.pop("x").shape, call.draw(st.booleans())
    h = call.floating(shape[0], 4 * shape[1], shape[2] + 1, shape[3] + 1) if phases else call.floating(*shape)
    summed = (*shape[:2], 2 * shape[2], 2 * shape[3]) if phases else shape
    return {
        "h": h,
        "residual": call.optional(call.floating(*summed)),
        "channel_bias": call.optional(call.floating(shape[1])),
        "phases": phases,
        "silu": call.draw(st.booleans()),
        **norm,
    }


def rms_norm(call: Call) -> Arguments:
    lead, (width,) = call.sizes(call.draw(st.integers(0, 3))), call.sizes(1)
    return {"x": call.floating(*lead, width), "weight": call.floating(width), "eps": 1e-3}


def rotary_2d(call: Call) -> Arguments:
    batch, length, heads, pairs = call.sizes(4)
    return {"x": call.floating(batch, length, heads, 2 * pairs), "table": call.floating(length, pairs, 2)}


def swiglu(call: Call) -> Arguments:
    shape = call.sizes(call.draw(st.integers(1, 4)))
    return {"gate": call.floating(*shape), "up": call.floating(*shape)}


def append_to_cache(call: Call) -> Arguments:
    sequences, heads, slots, pairs = call.sizes(4)
    last = max(slots - 1, 0)
    return {
        "qkv": call.floating(sequences, 3, heads, 2 * pairs),
        "table": call.floating(slots, pairs, 2),
        "k_cache": call.floating(sequences, heads, slots, 2 * pairs),
        "v_cache": call.floating(sequences, heads, slots, 2 * pairs),
        "position": call.draw(st.sampled_from((0, last, torch.tensor(last)))),
    }


def decode_attention(call: Call) -> Arguments:
    prefixes, per_prefix, heads, length, prefix_len = call.sizes(5)
    head_dim = call.draw(st.sampled_from((8, 16, 1, 0)))
    sequences, last = prefixes * per_prefix, max(length - 1, 0)
    position = call.draw(st.sampled_from((0, last, torch.tensor(last))))
    arguments = {
        "q": call.floating(sequences, heads, head_dim),
        "k_cache": call.floating(sequences, heads, length, head_dim),
        "v_cache": call.floating(sequences, heads, length, head_dim),
        "position": position,
    }
    if call.draw(st.booleans()):
        arguments["prefix_k"] = call.floating(prefixes, heads, prefix_len, head_dim)
        arguments["prefix_v"] = call.floating(prefixes, heads, prefix_len, head_dim)
        arguments["prefix_mask"] = call.optional(call.integers(2, prefixes, prefix_len).bool())
    return arguments


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
    arguments = globals()[name](Call(draw))
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 2)))):
        victim = draw(st.sampled_from(sorted(arguments.keys() - THE_MODELS_OWN)))
        arguments[victim] = spoilt(draw, arguments[victim])
    return arguments


def flat(values: Any) -> list[Any]:
    """The arguments or results, lists and tuples unpacked."""
    if isinstance(values, list | tuple):
        return [each for value in values for each in flat(value)]
    return [values]


def outcome(name: str, arguments: Arguments, backend: str) -> list[Tensor] | Exception:
    """Results and gradients, or the error."""
    if name not in INFERENCE:
        arguments = {key: x if key in WITHOUT_GRADIENT else with_gradient(x) for key, x in arguments.items()}
    leaves = [x for x in flat(list(arguments.values())) if isinstance(x, Tensor) and x.requires_grad]
    if isinstance(model := arguments.get("model"), nn.Module):
        model.zero_grad()
        leaves += model.parameters()
    with ops.use_backend(backend):
        try:
            results = flat(getattr(ops, name)(**arguments))
        except Exception as error:
            return error
        results_sum = sum((result.sum() for result in results if result.requires_grad), torch.zeros(()))
        if results_sum.requires_grad:
            results_sum.backward()
    return [x.detach() for x in results] + [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def with_gradient(value: Any) -> Any:
    if isinstance(value, list):
        return [with_gradient(each) for each in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def assert_alike(name: str, arguments: Arguments) -> None:
    expected, actual = (outcome(name, arguments, backend) for backend in BACKENDS)
    owners = ("noisy_prefix", "linear_cross_entropy") if name == "noisy_prefix_cross_entropy" else (name,)
    for error in (expected, actual):
        if isinstance(error, Exception):
            assert type(error) in (TypeError, ValueError), repr(error)
            assert re.fullmatch(rf"({'|'.join(owners)}): .+", str(error)), repr(error)
    tensors = [x for x in flat(list(arguments.values())) if isinstance(x, Tensor)]
    if any(x.dtype == torch.float64 for x in tensors) and not isinstance(expected, Exception):
        assert isinstance(actual, TypeError)
        assert "on the 'triton' backend, got float64" in str(actual)
        return
    if isinstance(expected, Exception) or isinstance(actual, Exception):
        assert (type(actual), str(actual)) == (type(expected), str(expected))
        return
    tolerance = 2e-2 if any(x.dtype in LOW_PRECISION for x in tensors) else 1e-4
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
        max_examples=EXAMPLES.get(name, 60), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(calls(name))
    def check(arguments: Arguments) -> None:
        assert_alike(name, arguments)

    check()


@pytest.mark.parametrize("name", OPERATIONS)
def test_huge_numbers(name: str) -> None:
    smallest = find(calls(name), lambda _: True, settings=settings(database=None, derandomize=True))
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
