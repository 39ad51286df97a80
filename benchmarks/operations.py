"""The operations that are measured: inputs, call, least bytes and FLOPs, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from peers import PEERS
from shapes import Sizes, Source, changed, tensors
from torch import Tensor

from vapi_fast import reference

SEED = 20251219


@dataclass(frozen=True)
class Operation:
    """inputs: `(sizes, source)` → arguments. call: `(implementation, *arguments)` → results, a tensor or several.

    bytes_moved, flops: `(sizes, bytes of an element)` → those of the forward and those that the backward adds. Bytes
    are the least that device memory must see: each input read once, each output written once; GroupNorm's map and
    the inputs of its backward twice, as the statistics of a group come first and do not fit on the chip.
    gradients: positions of the arguments that get one, of one of the results. peer: key of `PEERS`, if not `name`.
    """

    name: str
    inputs: Callable[[Sizes, Source], tuple[Any, ...]]
    call: Callable[..., Any]
    bytes_moved: Callable[[Sizes, int], tuple[int, int]]
    flops: Callable[[Sizes], tuple[int, int]] = lambda s: (0, 0)
    gradients: tuple[int, ...] = ()
    forward: bool = True
    peer: str = ""

    @property
    def plain(self) -> tuple[str, Callable[..., Any]]:
        """Name and call of the plain form; its results are ours, or the first of them."""
        return PEERS[self.peer or self.name]

    @property
    def passes(self) -> list[str]:
        return [FORWARD] * self.forward + [BOTH] * bool(self.gradients)


FORWARD, BOTH = "forward", "forward+backward"


def head_inputs(s: Sizes, new: Source) -> tuple[Tensor, Tensor]:
    """Hidden states and the head's weight, for logits of standard deviation 2."""
    return new.normal(s.images, s.tokens, s.width), new.normal(s.vocabulary, s.width, scale=2 * s.width**-0.5)


def policy_inputs(s: Sizes, new: Source) -> tuple[Tensor, ...]:
    return (
        *head_inputs(s, new),
        new.integers(s.images, s.group, s.tokens, below=s.vocabulary),
        new.normal(s.images, s.group, dtype=torch.float32),
        new.integers(s.images, s.tokens, below=s.vocabulary),
    )


def off_policy_inputs(s: Sizes, new: Source) -> tuple[Tensor, ...]:
    shape, level = (s.images, s.group, s.tokens), math.log(s.vocabulary) + 2
    return (*policy_inputs(s, new), *(new.normal(*shape, scale=0.1, dtype=torch.float32) - level for _ in range(2)))


def off_policy_loss(m: ModuleType, *inputs: Tensor) -> tuple[Tensor, ...]:
    *inputs, old, base = inputs
    options = {"clip_range": 0.2, "kl_weight": 0.1, "temperature": 0.9}
    return m.policy_loss(*inputs, old_logprobs=old, base_logprobs=base, **options)


class Head:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


class GivenHidden:
    """A model that returns the hidden states that it was given, so that its loss alone is measured."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.output = hidden, Head(weight)

    def __call__(self, prefix: Tensor, condition: None, return_hidden: bool) -> Tensor:
        return self.hidden


def noisy_prefix_cross_entropy(m: ModuleType, hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return m.noisy_prefix_cross_entropy(GivenHidden(hidden, weight), tokens, None, noise_prob=0.5, seed=SEED)


def cross_entropy_inputs(s: Sizes, new: Source) -> tuple[Tensor, ...]:
    return *head_inputs(s, new), new.integers(s.images, s.tokens, below=s.vocabulary)


def head_loss(name: str, inputs: Callable[..., Any], call: Callable[..., Any], forward: bool = True) -> Operation:
    return Operation(
        name,
        inputs,
        call,
        lambda s, e: (e * s.width * (s.rows + s.vocabulary), 2 * e * s.width * (s.rows + s.vocabulary)),
        lambda s: (s.gemm, 2 * s.gemm),
        gradients=(0, 1),
        forward=forward,
    )


def lpips_levels(s: Sizes) -> list[tuple[int, int]]:
    """Channels and side of VGG16's five levels."""
    half = s.channels // 2
    return [(half * factor, s.pixels >> level) for level, factor in enumerate((1, 2, 4, 8, 8))]


def lpips_inputs(s: Sizes, new: Source, group: tuple[int, ...]) -> tuple[list[Tensor], ...]:
    levels = lpips_levels(s)
    a = [new.maps(s.images, *group, channels, side, side) for channels, side in levels]
    b = [new.maps(s.images, channels, side, side) for channels, side in levels]
    return a, b, [new.normal(channels, dtype=torch.float32).abs() for channels, _ in levels]


def lpips_elements(s: Sizes) -> int:
    """Of one image's five maps."""
    return sum(channels * side**2 for channels, side in lpips_levels(s))


def image_elements(s: Sizes) -> int:
    return 3 * s.pixels**2


def norm_maps(s: Sizes, factor: int, shrink: int) -> tuple[int, ...]:
    """Shape of the decoder's maps with `factor` times the channels and 1 / `shrink` of the image's side."""
    return s.images, factor * s.channels, s.pixels // shrink, s.pixels // shrink


def level(factor: int, shrink: int) -> str:
    """Name of such maps by channels C and side S at full resolution, 128 and 384 of LlamaGen-XXL: "2C@S/2"."""
    return f"{factor if factor > 1 else ''}C@S{f'/{shrink}' if shrink > 1 else ''}"


def norm_parameters(s: Sizes, new: Source, factor: int) -> tuple[Tensor, Tensor, int]:
    return 1 + new.normal(factor * s.channels, scale=0.1), new.normal(factor * s.channels), s.norm_groups


def group_norm_silu(factor: int, shrink: int) -> Operation:
    def bytes_moved(s: Sizes, e: int) -> tuple[int, int]:
        size = e * math.prod(norm_maps(s, factor, shrink))
        return 3 * size, 5 * size

    return Operation(
        f"group_norm_silu {level(factor, shrink)}",
        lambda s, new: (new.maps(*norm_maps(s, factor, shrink)), *norm_parameters(s, new, factor)),
        lambda m, x, weight, bias, groups: m.group_norm_silu(x, weight, bias, groups, 1e-6),
        bytes_moved,
        gradients=(0, 1, 2),
        peer="group_norm_silu",
    )


def bias_group_norm_silu(factor: int, shrink: int) -> Operation:
    def inputs(s: Sizes, new: Source) -> tuple[Any, ...]:
        shape = norm_maps(s, factor, shrink)
        return new.maps(*shape), new.normal(shape[1]), *norm_parameters(s, new, factor)

    return Operation(
        f"bias_group_norm_silu {level(factor, shrink)}",
        inputs,
        lambda m, h, channel_bias, *norm: m.bias_group_norm_silu(h, channel_bias, *norm, 1e-6),
        lambda s, e: (3 * e * math.prod(norm_maps(s, factor, shrink)), 0),
        peer="bias_group_norm_silu",
    )


def add_group_norm_silu(factor: int, shrink: int, phases: bool = False) -> Operation:
    """The end of a residual block, or with phases that of an upsampling, to such maps."""

    def inputs(s: Sizes, new: Source) -> tuple[Any, ...]:
        batch, channels, height, width = shape = norm_maps(s, factor, shrink)
        h = new.maps(batch, 4 * channels, height // 2 + 1, width // 2 + 1) if phases else new.maps(*shape)
        residual = None if phases else new.maps(*shape)
        return h, residual, new.normal(channels), *norm_parameters(s, new, factor)

    def call(m: ModuleType, h: Tensor, residual: Tensor | None, channel_bias: Tensor, *norm: Any) -> tuple[Tensor, ...]:
        return m.add_group_norm_silu(h, *norm, 1e-6, residual=residual, channel_bias=channel_bias, phases=phases)

    return Operation(
        f"add_group_norm_silu {level(factor, shrink)}{' phases' * phases}",
        inputs,
        call,
        lambda s, e: ((4 if phases else 5) * e * math.prod(norm_maps(s, factor, shrink)), 0),
        peer=f"add_group_norm_silu{' phases' * phases}",
    )


def append_inputs(s: Sizes, new: Source) -> tuple[Any, ...]:
    """One slot of a cache: neighbours in it are far apart in memory."""
    keys, values = (new.normal(s.sequences, s.heads, 64, s.head_dim)[:, :, 5:6] for _ in range(2))
    table = reference.rotary_2d_table(3, s.head_dim, 0)[5:6].to(new.device)
    position = torch.zeros((), dtype=torch.int64, device=new.device)
    return new.normal(s.sequences, 3, s.heads, s.head_dim), table, keys, values, position


def decode_inputs(s: Sizes, new: Source) -> tuple[Tensor, ...]:
    """As many own entries as tokens, one of them the condition's, and all of them valid."""
    cache = (s.sequences, s.heads, s.tokens + 1, s.head_dim)
    position = torch.full((), s.tokens, device=new.device)
    return new.normal(s.sequences, s.heads, s.head_dim), new.normal(*cache), new.normal(*cache), position


def prefix_inputs(s: Sizes, new: Source) -> tuple[Tensor, ...]:
    prefix = (s.sequences // s.group, s.heads, s.prefix, s.head_dim)
    return *decode_inputs(s, new), new.normal(*prefix), new.normal(*prefix)


def cache_bytes(s: Sizes, e: int, prefix: int) -> tuple[int, int]:
    entries = s.sequences * (s.tokens + 1) + s.sequences // s.group * prefix
    return 2 * e * s.heads * s.head_dim * (entries + s.sequences), 0


OPERATIONS = [
    Operation(
        "group_sample",
        lambda s, new: (new.normal(s.images, s.tokens, s.vocabulary, scale=2.0), s.group),
        lambda m, logits, group: m.group_sample(logits, group, seed=SEED),
        lambda s, e: (e * s.logits + 12 * s.group * s.rows, 0),
    ),
    Operation(
        "group_sample top-k, top-p",
        lambda s, new: (new.normal(s.images, s.tokens, s.vocabulary, scale=2.0), s.group),
        lambda m, logits, group: m.group_sample(logits, group, seed=SEED, temperature=0.9, top_k=100, top_p=0.9),
        lambda s, e: (e * s.logits + 12 * s.group * s.rows, 0),
    ),
    Operation(
        "linear_group_sample",
        lambda s, new: (*head_inputs(s, new), s.group),
        lambda m, hidden, weight, group: m.linear_group_sample(hidden, weight, group, seed=SEED),
        lambda s, e: (e * s.width * (s.rows + s.vocabulary) + 12 * s.group * s.rows, 0),
        lambda s: (s.gemm, 0),
    ),
    head_loss("policy_loss", policy_inputs, lambda m, *inputs: m.policy_loss(*inputs)),
    head_loss("policy_loss off-policy", off_policy_inputs, off_policy_loss, forward=False),
    head_loss("linear_cross_entropy", cross_entropy_inputs, lambda m, *inputs: m.linear_cross_entropy(*inputs)),
    head_loss("noisy_prefix_cross_entropy", cross_entropy_inputs, noisy_prefix_cross_entropy, forward=False),
    Operation(
        "noisy_prefix",
        lambda s, new: (new.integers(s.images, s.tokens, below=s.vocabulary), 0.5, s.vocabulary),
        lambda m, tokens, noise_prob, vocab_size: m.noisy_prefix(tokens, noise_prob, vocab_size, seed=SEED),
        lambda s, e: (16 * s.rows, 0),
    ),
    Operation(
        "vq_lookup",
        lambda s, new: (
            new.normal(s.rows, s.code_width, dtype=torch.float32),
            new.normal(s.vocabulary, s.code_width, dtype=torch.float32),
        ),
        lambda m, z, codebook: m.vq_lookup(z, codebook),
        lambda s, e: (4 * s.code_width * (2 * s.rows + s.vocabulary) + 8 * s.rows, 12 * s.code_width * s.rows),
        lambda s: (2 * s.logits * s.code_width, 0),
        gradients=(0,),
    ),
    Operation(
        "codebook_lookup",
        lambda s, new: (
            new.integers(s.images * s.group, s.tokens, below=s.vocabulary),
            new.normal(s.vocabulary, s.code_width, dtype=torch.float32),
        ),
        lambda m, indices, codebook: m.codebook_lookup(indices, codebook),
        lambda s, e: (
            8 * s.group * s.rows + 4 * s.code_width * (s.vocabulary + s.group * s.rows),
            8 * s.group * s.rows + 4 * s.code_width * (2 * s.vocabulary + s.group * s.rows),
        ),
        gradients=(1,),
    ),
    Operation(
        "straight_through_lookup",
        lambda s, new: (
            new.normal(s.images, s.tokens, s.vocabulary, scale=2.0),
            new.normal(s.vocabulary, s.code_width, dtype=torch.float32),
        ),
        lambda m, logits, codebook: m.straight_through_lookup(logits, codebook, tau=0.9, seed=SEED),
        lambda s, e: (
            e * s.logits + 4 * s.code_width * (s.vocabulary + s.rows) + 8 * s.rows,
            2 * e * s.logits + 4 * s.code_width * (s.vocabulary + s.rows),
        ),
        gradients=(0,),
    ),
    Operation(
        "lpips_distance",
        lambda s, new: lpips_inputs(s, new, (s.group,)),
        lambda m, a, b, weights: m.lpips_distance(a, b, weights),
        lambda s, e: (e * s.images * (s.group + 1) * lpips_elements(s), 0),
    ),
    Operation(
        "lpips_distance of pairs",
        lambda s, new: lpips_inputs(s, new, ()),
        lambda m, a, b, weights: m.lpips_distance(a, b, weights),
        lambda s, e: (2 * e * s.images * lpips_elements(s), 3 * e * s.images * lpips_elements(s)),
        gradients=(0,),
        forward=False,
        peer="lpips_distance",
    ),
    Operation(
        "mse",
        lambda s, new: (
            new.maps(s.images, s.group, 3, s.pixels, s.pixels),
            new.maps(s.images, 3, s.pixels, s.pixels),
        ),
        lambda m, a, b: m.mse(a, b),
        lambda s, e: (e * s.images * (s.group + 1) * image_elements(s), 0),
    ),
    Operation(
        "mse of pairs",
        lambda s, new: tuple(new.maps(s.images, 3, s.pixels, s.pixels) for _ in range(2)),
        lambda m, a, b: m.mse(a, b),
        lambda s, e: (2 * e * s.images * image_elements(s), 3 * e * s.images * image_elements(s)),
        gradients=(0,),
        forward=False,
        peer="mse",
    ),
    group_norm_silu(factor=1, shrink=1),
    group_norm_silu(factor=2, shrink=2),
    group_norm_silu(factor=4, shrink=8),
    bias_group_norm_silu(factor=1, shrink=1),
    add_group_norm_silu(factor=1, shrink=1),
    add_group_norm_silu(factor=2, shrink=2),
    add_group_norm_silu(factor=1, shrink=1, phases=True),
    Operation(
        "rms_norm",
        lambda s, new: (new.normal(s.images, s.tokens, s.width), 1 + new.normal(s.width, scale=0.1)),
        lambda m, x, weight: m.rms_norm(x, weight, 1e-5),
        lambda s, e: (2 * e * s.rows * s.width, 3 * e * s.rows * s.width),
        gradients=(0, 1),
    ),
    Operation(
        "rotary_2d",
        lambda s, new: (
            new.normal(s.images, s.tokens, s.heads, s.head_dim),
            reference.rotary_2d_table(math.isqrt(s.tokens), s.head_dim, 0).to(new.device),
        ),
        lambda m, x, table: m.rotary_2d(x, table),
        lambda s, e: (2 * e * s.rows * s.heads * s.head_dim, 2 * e * s.rows * s.heads * s.head_dim),
        gradients=(0,),
    ),
    Operation(
        "swiglu",
        lambda s, new: tuple(new.normal(s.images, s.tokens, s.hidden) for _ in range(2)),
        lambda m, gate, up: m.swiglu(gate, up),
        lambda s, e: (3 * e * s.rows * s.hidden, 5 * e * s.rows * s.hidden),
        gradients=(0, 1),
    ),
    Operation(
        "append_to_cache",
        append_inputs,
        lambda m, *arguments: (m.append_to_cache(*arguments), *arguments[2:4]),
        lambda s, e: (6 * e * s.sequences * s.heads * s.head_dim, 0),
    ),
    Operation(
        "decode_attention",
        decode_inputs,
        lambda m, q, k, v, position: m.decode_attention(q, k, v, position),
        lambda s, e: cache_bytes(s, e, 0),
    ),
    Operation(
        "decode_attention prefix",
        prefix_inputs,
        lambda m, q, k, v, position, pk, pv: m.decode_attention(q, k, v, position, prefix_k=pk, prefix_v=pv),
        lambda s, e: cache_bytes(s, e, s.prefix),
    ),
    Operation(
        "group_advantages",
        lambda s, new: (new.normal(s.images, s.group, dtype=torch.float32),),
        lambda m, rewards: m.group_advantages(rewards),
        lambda s, e: (8 * s.images * s.group, 0),
    ),
]


def differentiable(operation: Operation, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The same arguments, those that get a gradient as new leaves, and these leaves."""
    marked = tuple(
        changed(each, lambda x: x.detach().requires_grad_()) if position in operation.gradients else each
        for position, each in enumerate(arguments)
    )
    return marked, [leaf for position in operation.gradients for leaf in tensors(marked[position])]
