"""Argument checks of the public operations: shapes and dtypes always, values only where reading them is free.

A wrong type or dtype is a TypeError, a wrong shape, device or value a ValueError; each message is one line with the
operation, the argument, what was expected and what came.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A kernel holds one row of logits in registers; LlamaGen's and Janus-Pro's vocabularies are 16384.
MAX_VOCABULARY = 65536
SMALLEST = 1e-20  # that logits are divided by
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def described(value: object) -> str:
    """`float32 [4, 7]` for a tensor, the type's name for anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


class ArgumentChecks:
    """Checks the tensors of one call. A dimension's letter must mean the same size in all of them.

    Dimensions are given as "B T V"; a leading "..." stands for any number of dimensions, the same sizes each time.
    """

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.sizes: dict[str, int | tuple[int, ...]] = {}
        self.device: tuple[str, torch.device] | None = None

    def floating(self, name: str, value: object, dims: str, *, beside: tuple[torch.dtype, ...] = ()) -> None:
        """float16, bfloat16, float32 or float64, or one of those beside them."""
        right = isinstance(value, Tensor) and value.dtype in (*FLOATING, *beside)
        self._tensor(name, value, dims, "floating", right)

    def integers(self, name: str, value: object, dims: str) -> None:
        self._tensor(name, value, dims, "int64", isinstance(value, Tensor) and value.dtype == torch.int64)

    def booleans(self, name: str, value: object, dims: str) -> None:
        self._tensor(name, value, dims, "bool", isinstance(value, Tensor) and value.dtype == torch.bool)

    def _tensor(self, name: str, value: object, dims: str, kind: str, right_dtype: bool) -> None:
        expected = f"{self.operation}: {name} must be {kind} [{', '.join(dims.split())}]"
        if not right_dtype:
            raise TypeError(f"{expected}, got {described(value)}")
        if value.layout != torch.strided or value.is_nested:
            raise ValueError(f"{expected}, dense, got one that is {'nested' if value.is_nested else 'sparse'}")
        if not self._bind(value.shape, dims.split()):
            known = ", ".join(f"{d}={self.sizes[d]}" for d in dims.split() if d in self.sizes)
            raise ValueError(f"{expected}{' with ' + known if known else ''}, got {described(value)}")
        if self.device is None:
            self.device = name, value.device
        elif self.device[1] != value.device:
            first, device = self.device
            raise ValueError(f"{self.operation}: {name} must be on {first}'s device {device}, got {value.device}")

    def _bind(self, shape: torch.Size, dims: list[str]) -> bool:
        """Match a shape with dimension letters; the sizes met for the first time are kept if all of it fits."""
        sizes = list(shape)
        if dims[0] == "...":
            leading = len(sizes) - len(dims) + 1
            sizes = [tuple(sizes[: max(leading, 0)]), *sizes[max(leading, 0) :]]
        if len(sizes) != len(dims):
            return False
        found = dict(self.sizes)
        if any(found.setdefault(dim, size) != size for dim, size in zip(dims, sizes, strict=True)):
            return False
        self.sizes = found
        return True

    def written(self, name: str, value: Tensor) -> None:
        """A tensor that is written in place: no two of its elements share memory, as those of an expanded one do."""
        if any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)):
            raise ValueError(f"{self.operation}: {name} is written to and must not be expanded: pass a copy of it")

    def not_empty(self, name: str, *dims: str) -> None:
        for dim in dims:
            if self.sizes[dim] == 0:
                raise ValueError(f"{self.operation}: {name} must have {dim} > 0, got {dim}=0")

    def count(self, name: str, value: object, minimum: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{self.operation}: {name} must be an int >= {minimum}, got {described(value)}")
        if value < minimum:
            raise ValueError(f"{self.operation}: {name} must be an int >= {minimum}, got {value}")
        if value >= 2**63:
            raise ValueError(f"{self.operation}: {name} must be an int below 2^63, got {value}")

    def position(self, name: str, value: object) -> None:
        """An int ≥ 0, or a 0-d int64 tensor, whose value stays unread."""
        if not isinstance(value, Tensor):
            self.count(name, value, 0)
        elif value.dtype != torch.int64 or value.ndim != 0:
            expected = f"{self.operation}: {name} must be an int or a 0-d int64 tensor"
            raise TypeError(f"{expected}, got {described(value)}")

    def slot(self, position: object, cache: str, slots: int) -> None:
        """A slot of a cache: an int in [0, slots), or a 0-d int64 tensor, whose value stays unread."""
        self.position("position", position)
        if isinstance(position, int) and position >= slots:
            raise ValueError(f"{self.operation}: position must be below {cache}'s S={slots}, got {position}")

    def vocabulary(self, name: str) -> None:
        """Size V of the vocabulary: at least 1, and within what a kernel can hold."""
        self.not_empty(name, "V")
        if self.sizes["V"] > MAX_VOCABULARY:
            raise ValueError(f"{self.operation}: {name} must have V <= {MAX_VOCABULARY}, got V={self.sizes['V']}")

    def positive(self, name: str, value: float) -> None:
        self._number(name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"{self.operation}: {name} must be positive and finite, got {value}")
        if value < SMALLEST:
            raise ValueError(f"{self.operation}: {name} must be at least {SMALLEST}, got {value}: float32 overflows")

    def not_negative(self, name: str, value: float) -> None:
        self._number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{self.operation}: {name} must be finite and not negative, got {value}")

    def probability(self, name: str, value: float, *, zero: bool = True, one: bool = True) -> None:
        """A number in [0, 1], without its ends where they are not allowed."""
        self._number(name, value)
        if not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
            raise ValueError(
                f"{self.operation}: {name} must be in {'[' if zero else '('}0, 1{']' if one else ')'}, got {value}"
            )

    def _number(self, name: str, value: object) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{self.operation}: {name} must be a number, got {described(value)}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{self.operation}: {name} must be a float or an int in [-2^63, 2^63), got {value}")

    def flag(self, name: str, value: object) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"{self.operation}: {name} must be a bool, got {described(value)}")

    def seed(self, seed: object) -> None:
        expected = f"{self.operation}: seed must be an int in [-2^63, 2^63) or a 0-d int64 tensor"
        if isinstance(seed, Tensor):
            if seed.dtype != torch.int64 or seed.ndim != 0:
                raise TypeError(f"{expected}, got {described(seed)}")
        elif not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"{expected}, got {described(seed)}")
        elif not -(2**63) <= seed < 2**63:
            raise ValueError(f"{expected}, got {seed}")

    def sample_ids(self, sample_ids: Tensor | None) -> None:
        if sample_ids is not None:
            self.integers("sample_ids", sample_ids, "B")

    def no_gradient(self, instead: str, **tensors: Tensor | None) -> None:
        """No tensor of an operation for inference may want a gradient."""
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{self.operation}: has no gradient, and {name} requires one: call it under torch.no_grad(), or "
                    f"{instead}, which has one"
                )

    def token_range(self, name: str, tokens: Tensor, vocab_size: int) -> None:
        """Tokens in 0…V−1. On a GPU reading them back would stall it: there a kernel turns what they touch into NaN."""
        if tokens.device.type != "cpu" or tokens.numel() == 0 or torch.compiler.is_compiling():
            return
        low, high = tokens.aminmax()
        if low < 0 or high >= vocab_size:
            wrong = int(low) if low < 0 else int(high)
            raise ValueError(f"{self.operation}: {name} must be in [0, {vocab_size}), got {wrong}")
