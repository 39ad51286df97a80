"""Calls of every operation, by size: what benchmarks, the memory check and tests give to `vapi_fast.ops`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

SEED = 20251219


@dataclass(frozen=True)
class Sizes:
    """Shapes; the defaults are LlamaGen-XXL's at 384²."""

    images: int = 16
    group: int = 8
    tokens: int = 576
    vocabulary: int = 16384
    width: int = 1536
    heads: int = 24
    head_dim: int = 64
    hidden: int = 4096
    code_width: int = 8
    pixels: int = 384  # a side
    channels: int = 128  # of the decoder at full resolution; LPIPS has half as many there
    norm_groups: int = 32
    sequences: int = 256  # decoded at once
    prefix: int = 120  # positions that a group of sequences shares

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    @property
    def logits(self) -> int:
        return self.rows * self.vocabulary

    @property
    def gemm(self) -> int:
        """FLOPs of the language-model head."""
        return 2 * self.logits * self.width

    @property
    def levels(self) -> list[tuple[int, int]]:
        """Channels and side of VGG16's five levels."""
        return [(self.channels // 2 * factor, self.pixels >> level) for level, factor in enumerate((1, 2, 4, 8, 8))]

    def maps(self, factor: int, shrink: int) -> tuple[int, ...]:
        """Shape of the decoder's maps with `factor` times the channels and 1 / `shrink` of the image's side."""
        return self.images, factor * self.channels, self.pixels // shrink, self.pixels // shrink

    def of(self, images: int) -> Sizes:
        """The same for fewer images, as comparisons with float64 need it."""
        return dataclasses.replace(self, images=images, sequences=images * self.group)


XXL = Sizes()
# The tiny preset's, in a batch of eight.
SMALL = Sizes(8, 8, 64, 512, 192, 6, 32, 512, pixels=32, channels=32, norm_groups=8, sequences=64, prefix=12)
# No multiples of a block, so that every mask is needed.
ODD = Sizes(2, 3, 49, 1000, 72, 3, 20, 100, 6, 36, 24, norm_groups=8, sequences=6, prefix=7)
SMALLEST = Sizes(2, 3, 2, 24, 16, 2, 8, 16, pixels=16, channels=8, norm_groups=4, sequences=6, prefix=2)


@dataclass(frozen=True)
class Source:
    """Makes random inputs; `dtype` is that of activations and weights in production."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype) * scale

    def integers(self, *shape: int, below: int) -> Tensor:
        return torch.randint(below, shape, device=self.device)

    def maps(self, *shape: int) -> Tensor:
        """`[B, (G,) C, H, W]`, channels last in memory."""
        flat = self.normal(math.prod(shape[:-3]), *shape[-3:])
        return flat.to(memory_format=torch.channels_last).view(shape)

    def rotations(self, positions: int, head_dim: int) -> Tensor:
        """Cosines and sines of any angles, as `rotary_2d_table` gives those of its own."""
        angles = self.normal(positions, head_dim // 2, dtype=torch.float32)
        return torch.stack([angles.cos(), angles.sin()], dim=-1)


@dataclass(frozen=True)
class Case:
    """A call of `vapi_fast.ops.<operation>`.

    inputs: `(sizes, source)` → arguments by name. options: more of them, the same at all sizes. variant: behind the
    operation's name in the case's own. gradients: names of the inputs that get one, of one of the results. written:
    those of the inputs that the operation changes, which are results too.
    """

    operation: str
    inputs: Callable[[Sizes, Source], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    gradients: tuple[str, ...] = ()
    written: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.operation} {self.variant}".rstrip()

    def call(self, module: Any, inputs: dict[str, Any]) -> Any:
        """Results of the module's function of this name, a tensor or several."""
        results = getattr(module, self.operation)(**inputs, **self.options)
        return (results, *(inputs[name] for name in self.written)) if self.written else results

    def differentiable(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
        """The same inputs, those that get a gradient as new leaves, and these leaves."""
        leaves = {name: changed(inputs[name], lambda x: x.detach().requires_grad_()) for name in self.gradients}
        return inputs | leaves, list(tensors(list(leaves.values())))


class GivenHidden(NamedTuple):
    """A model that returns the hidden states that it was given, so that its loss alone is called."""

    hidden: Tensor
    weight: Tensor

    @property
    def output(self) -> GivenHidden:
        return self

    def __call__(self, prefix: Tensor, condition: None, return_hidden: bool) -> Tensor:
        return self.hidden


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, those in lists, tuples and dicts too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple | dict):
        for each in values.values() if isinstance(values, dict) else values:
            yield from tensors(each)


def changed(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with another tensor for each tensor."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, dict):
        return {name: changed(each, change) for name, each in values.items()}
    if isinstance(values, list | tuple):
        several = [changed(each, change) for each in values]
        return type(values)(*several) if hasattr(values, "_fields") else type(values)(several)
    return values


# ---- inputs


def logits(s: Sizes, new: Source) -> dict[str, Any]:
    return {"logits": new.normal(s.images, s.tokens, s.vocabulary, scale=2.0), "group_size": s.group}


def head(s: Sizes, new: Source) -> dict[str, Any]:
    """Hidden states and the head's weight, for logits of standard deviation 2."""
    hidden, scale = new.normal(s.images, s.tokens, s.width), 2 * max(s.width, 1) ** -0.5
    return {"hidden": hidden, "weight": new.normal(s.vocabulary, s.width, scale=scale)}


def targets(s: Sizes, new: Source) -> Tensor:
    return new.integers(s.images, s.tokens, below=s.vocabulary)


def policy(s: Sizes, new: Source) -> dict[str, Any]:
    return head(s, new) | {
        "tokens": new.integers(s.images, s.group, s.tokens, below=s.vocabulary),
        "advantages": new.normal(s.images, s.group, dtype=torch.float32),
        "targets": targets(s, new),
    }


def off_policy(s: Sizes, new: Source) -> dict[str, Any]:
    shape, level = (s.images, s.group, s.tokens), math.log(max(s.vocabulary, 1)) + 2
    names = ("old_logprobs", "base_logprobs")
    return policy(s, new) | {name: new.normal(*shape, scale=0.1, dtype=torch.float32) - level for name in names}


def model(s: Sizes, new: Source) -> dict[str, Any]:
    return {"model": GivenHidden(**head(s, new)), "tokens": targets(s, new), "condition": None}


def codebook(s: Sizes, new: Source) -> Tensor:
    return new.normal(s.vocabulary, s.code_width, dtype=torch.float32)


def features(s: Sizes, new: Source, *group: int) -> dict[str, Any]:
    """LPIPS's, of a group beside the image's own or of a pair."""
    return {
        "features_a": [new.maps(s.images, *group, channels, side, side) for channels, side in s.levels],
        "features_b": [new.maps(s.images, channels, side, side) for channels, side in s.levels],
        "weights": [new.normal(channels, dtype=torch.float32).abs() for channels, _ in s.levels],
    }


def first_level(s: Sizes, new: Source) -> dict[str, Any]:
    """LPIPS's largest maps, of a group beside the image's own, and a distance that theirs is added to."""
    (channels, side), *_ = s.levels
    weight = new.normal(channels, dtype=torch.float32).abs()
    return {
        "features_a": new.maps(s.images, s.group, channels, side, side),
        "features_b": new.maps(s.images, channels, side, side),
        "weight": weight,
        "before": new.normal(s.images, s.group, dtype=torch.float32),
    }


def images(s: Sizes, new: Source, *group: int) -> dict[str, Any]:
    one = (3, s.pixels, s.pixels)
    return {"a": new.maps(s.images, *group, *one), "b": new.maps(s.images, *one)}


def pixels(s: Sizes, new: Source) -> dict[str, Any]:
    shift, scale = new.normal(3, dtype=torch.float32), 1 + new.normal(3, scale=0.1, dtype=torch.float32)
    return {"images": new.maps(s.images, 3, s.pixels, s.pixels), "shift": shift, "scale": scale}


def norm(s: Sizes, new: Source, channels: int) -> dict[str, Any]:
    return {"weight": 1 + new.normal(channels, scale=0.1), "bias": new.normal(channels), "groups": s.norm_groups}


def level_name(factor: int, shrink: int) -> str:
    """One of the decoder's sizes by channels C and side S at full resolution, 128 and 384 of LlamaGen-XXL: `2C@S/2`."""
    return f"{factor if factor > 1 else ''}C@S{f'/{shrink}' if shrink > 1 else ''}"


def group_norms(factor: int, shrink: int) -> dict[str, Case]:
    """The four ways of a GroupNorm at one of the decoder's sizes.

    They are: alone, behind a bias, behind a sum, and behind the four phases of an upsampling.
    """
    level = level_name(factor, shrink)

    def maps(s: Sizes, new: Source) -> Tensor:
        return new.maps(*s.maps(factor, shrink))

    def parameters(s: Sizes, new: Source) -> dict[str, Any]:
        return norm(s, new, factor * s.channels)

    def bias(s: Sizes, new: Source) -> dict[str, Any]:
        return {"channel_bias": new.normal(factor * s.channels)} | parameters(s, new)

    def summed(s: Sizes, new: Source) -> dict[str, Any]:
        return {"h": maps(s, new), "residual": maps(s, new)} | bias(s, new)

    def phases(s: Sizes, new: Source) -> dict[str, Any]:
        batch, channels, height, width = s.maps(factor, shrink)
        return {"h": new.maps(batch, 4 * channels, height // 2 + 1, width // 2 + 1)} | bias(s, new)

    eps = {"eps": 1e-6}
    gradients = ("x", "weight", "bias")
    return {
        "alone": Case("group_norm_silu", lambda s, n: {"x": maps(s, n)} | parameters(s, n), eps, level, gradients),
        "bias": Case("bias_group_norm_silu", lambda s, n: {"h": maps(s, n)} | bias(s, n), eps, level),
        "sum": Case("add_group_norm_silu", summed, eps, level),
        "phases": Case("add_group_norm_silu", phases, {"phases": True, **eps}, f"{level} phases"),
    }


def added(s: Sizes, new: Source) -> dict[str, Any]:
    h, residual = (new.maps(*s.maps(1, 1)) for _ in range(2))
    return {"h": h, "channel_bias": new.normal(s.channels), "residual": residual}


def convolutions(factor: int, shrink: int) -> dict[str, Case]:
    """The 3×3 convolution at the end of a residual block of one of these sizes, alone and with the norm behind it."""

    def alone(s: Sizes, new: Source) -> dict[str, Any]:
        batch, channels, height, width = s.maps(factor, shrink)
        scale = max(9 * channels, 1) ** -0.5
        return {
            "x": new.maps(batch, channels, height, width),
            "kernel": new.normal(channels, channels, 3, 3, scale=scale).to(memory_format=torch.channels_last),
            "channel_bias": new.normal(channels, dtype=torch.float32),
            "residual": new.maps(batch, channels, height, width),
        }

    def normed(s: Sizes, new: Source) -> dict[str, Any]:
        return alone(s, new) | norm(s, new, factor * s.channels)

    level = level_name(factor, shrink)
    return {
        "alone": Case("convolution", alone, variant=level),
        "norm": Case("convolution_group_norm_silu", normed, {"eps": 1e-6}, level),
    }


def one_slot(s: Sizes, new: Source) -> dict[str, Any]:
    """One slot of a cache: neighbours in it are far apart in memory."""
    keys, values = (new.normal(s.sequences, s.heads, 64, s.head_dim)[:, :, 5:6] for _ in range(2))
    position = torch.zeros((), dtype=torch.int64, device=new.device)
    qkv, table = new.normal(s.sequences, 3, s.heads, s.head_dim), new.rotations(1, s.head_dim)
    return {"qkv": qkv, "table": table, "k_cache": keys, "v_cache": values, "position": position}


def cache(s: Sizes, new: Source) -> dict[str, Any]:
    """As many own entries as tokens, one of them the condition's, and all of them valid."""
    q, position = new.normal(s.sequences, s.heads, s.head_dim), torch.full((), s.tokens, device=new.device)
    keys, values = (new.normal(s.sequences, s.heads, s.tokens + 1, s.head_dim) for _ in range(2))
    return {"q": q, "k_cache": keys, "v_cache": values, "position": position}


def whole_numbers(s: Sizes, new: Source) -> dict[str, Any]:
    """The same in int8, with a scale for each slot and head."""
    given, slots = cache(s, new), (s.sequences, s.heads, s.tokens + 1)
    for name in ("k", "v"):
        given[f"{name}_cache"] = (new.integers(*slots, s.head_dim, below=255) - 127).to(torch.int8)
        given[f"{name}_scale"] = new.normal(*slots, scale=0.02, dtype=torch.float32).abs()
    return given


def prefixed(s: Sizes, new: Source) -> dict[str, Any]:
    prefix = (s.sequences // max(s.group, 1), s.heads, s.prefix, s.head_dim)
    return cache(s, new) | {"prefix_k": new.normal(*prefix), "prefix_v": new.normal(*prefix)}


FULL, HALF, EIGHTH = group_norms(1, 1), group_norms(2, 2), group_norms(4, 8)
SEEDED, HEAD = {"seed": SEED}, ("hidden", "weight")
OFF_POLICY = {"clip_range": 0.2, "kl_weight": 0.1, "temperature": 0.9}
FILTERS = {"temperature": 0.9, "top_k": 100, "top_p": 0.9}
NOISY = {"noise_prob": 0.5, **SEEDED}
CASES = [
    Case("group_sample", logits, SEEDED),
    Case("group_sample", logits, SEEDED | FILTERS, "top-k, top-p"),
    Case("linear_group_sample", lambda s, new: head(s, new) | {"group_size": s.group}, SEEDED),
    Case("noisy_prefix", lambda s, new: {"tokens": targets(s, new), "vocab_size": s.vocabulary}, NOISY),
    Case("policy_loss", policy, gradients=HEAD),
    Case("policy_loss", off_policy, OFF_POLICY, "off-policy", HEAD),
    Case("linear_cross_entropy", lambda s, new: head(s, new) | {"targets": targets(s, new)}, gradients=HEAD),
    Case("noisy_prefix_cross_entropy", model, NOISY, gradients=("model",)),
    Case("group_advantages", lambda s, new: {"rewards": new.normal(s.images, s.group, dtype=torch.float32)}),
    Case(
        "vq_lookup",
        lambda s, new: {"z": new.normal(s.rows, s.code_width, dtype=torch.float32), "codebook": codebook(s, new)},
        gradients=("z",),
    ),
    Case(
        "codebook_lookup",
        lambda s, new: {
            "indices": new.integers(s.images * s.group, s.tokens, below=s.vocabulary),
            "codebook": codebook(s, new),
        },
        gradients=("codebook",),
    ),
    Case(
        "straight_through_lookup",
        lambda s, new: {"logits": logits(s, new)["logits"], "codebook": codebook(s, new)},
        {"tau": 0.9, **SEEDED},
        gradients=("logits",),
    ),
    Case("lpips_distance", lambda s, new: features(s, new, s.group)),
    Case("lpips_distance", features, variant="of pairs", gradients=("features_a",)),
    Case("lpips_distance_max_pool", first_level),
    Case("mse", lambda s, new: images(s, new, s.group)),
    Case("scaled_pixels", pixels, {"channels": 8}),
    Case("mse", images, variant="of pairs", gradients=("a",)),
    *(each["alone"] for each in (FULL, HALF, EIGHTH)),
    FULL["bias"],
    FULL["sum"],
    HALF["sum"],
    FULL["phases"],
    Case("bias_add", added, variant="C@S"),
    Case("bias_add", added, {"pad": 1}, "C@S padded"),
    *convolutions(1, 1).values(),
    convolutions(4, 8)["norm"],
    Case(
        "rms_norm",
        lambda s, new: {"x": new.normal(s.images, s.tokens, s.width), "weight": 1 + new.normal(s.width, scale=0.1)},
        {"eps": 1e-5},
        gradients=("x", "weight"),
    ),
    Case(
        "dropout",
        lambda s, new: {"x": new.normal(s.images, s.tokens, s.width)},
        {"p": 0.1, "site": 1, **SEEDED},
        gradients=("x",),
    ),
    Case(
        "rotary_2d",
        lambda s, new: {
            "x": new.normal(s.images, s.tokens, s.heads, s.head_dim),
            "table": new.rotations(s.tokens, s.head_dim),
        },
        gradients=("x",),
    ),
    Case(
        "swiglu",
        lambda s, new: {name: new.normal(s.images, s.tokens, s.hidden) for name in ("gate", "up")},
        gradients=("gate", "up"),
    ),
    Case("append_to_cache", one_slot, written=("k_cache", "v_cache")),
    Case("decode_attention", cache),
    Case("decode_attention", prefixed, variant="prefix"),
    Case("decode_attention", whole_numbers, variant="int8"),
]
BY_NAME = {each.name: each for each in CASES}
