"""The calls by which `patch_llamagen` compares a part of a model with ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .recognition import PLAIN, Case, integers, uniform

BATCH, LENGTH = 2, 5  # of most calls
LONGEST = 1200  # positions of the one at the model's full length
LOUD = 30.0  # shows what clamps and caps
QUIET = 1e-2  # shows a norm's epsilon
Method = Callable[..., Any]


def one_call(x: Tensor) -> Case:
    return Case("activations", (x,), lambda method, twin, x: method(twin, x))


def norm_cases(root: nn.Module, module: nn.Module) -> list[Case]:
    """Of three sizes; and the dtype that bf16 activations come out in."""
    shape = (BATCH, LENGTH, len(module.weight))
    x = uniform("x", shape, -1, 1)
    dtype = Case("bf16 activations", (x,), lambda method, twin, x: method(twin, x.bfloat16()).dtype, (False,))
    return [*(one_call(scale * x) for scale in (1, QUIET, LOUD)), dtype]


def feed_forward_cases(root: nn.Module, module: nn.Module) -> list[Case]:
    x = uniform("x", (BATCH, LENGTH, module.w1.in_features), -1, 1)
    return [one_call(scale * x) for scale in (1, LOUD)]


class SlotCache(nn.Module):
    """What LlamaGen's attention asks of a KV cache; random numbers in each slot at first."""

    def __init__(self, batch: int, heads: int, slots: int, head_dim: int) -> None:
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, uniform(name, (batch, heads, slots, head_dim), -1, 1))

    def update(self, input_pos: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = self.keys.index_copy(2, input_pos, keys)
        self.values = self.values.index_copy(2, input_pos, values)
        return self.keys, self.values


def attention_cases(root: nn.Module, module: nn.Module) -> list[Case]:
    """Without a cache, causal and with a mask; with a cache, several positions and one; at the model's length."""
    heads, head_dim = module.n_kv_head, module.head_dim
    x = uniform("x", (BATCH, LENGTH, module.dim), -1, 1)
    table = uniform("table", (LENGTH, head_dim // 2, 2), -1, 1)
    mask = uniform("mask", (BATCH, 1, LENGTH, LENGTH), 0, 1) < 0.5
    mask = mask | torch.eye(LENGTH, dtype=torch.bool, device="cpu")
    positions = min(root.block_size + root.cls_token_num, LONGEST)
    sequence = uniform("sequence", (1, positions, module.dim), -1, 1)
    long_table = uniform("table", (positions, head_dim // 2, 2), -1, 1)

    def bare(method: Method, twin: nn.Module, x: Tensor, table: Tensor) -> Tensor:
        return method(twin, x, table)

    def masked(method: Method, twin: nn.Module, x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        return method(twin, x, table, None, mask)

    def cached(method: Method, twin: nn.Module, x: Tensor, table: Tensor, mask: Tensor) -> list[Tensor]:
        twin.kv_cache = SlotCache(BATCH, heads, LENGTH, head_dim)
        parts = torch.arange(LENGTH, device="cpu").split([LENGTH - 1, 1])
        return [method(twin, x[:, part], table[part], part, mask[:, :, part]) for part in parts]

    @torch.no_grad()
    def whole(method: Method, twin: nn.Module, x: Tensor, table: Tensor) -> list[Tensor]:
        results = [method(twin, x, table)]
        twin.kv_cache = SlotCache(1, heads, positions, head_dim)
        last = torch.tensor([positions - 1], device="cpu")
        seen = torch.ones(1, 1, 1, positions, dtype=torch.bool, device="cpu")
        return [*results, method(twin, x[:, last], table[last], last, seen)]

    return [
        Case("no mask", (x, table), bare),
        Case("large activations", (LOUD * x, table), bare),
        Case("mask", (x, table, mask), masked),
        Case("KV cache", (x, table, mask), cached),
        Case(f"{positions} positions", (sequence, long_table), whole, (False,)),
    ]


class StandIn(nn.Module):
    """In place of a block in the check of `Transformer.forward`: quick; depends on its place and all it is given.

    And on the size of its activations, which the norm that follows would hide.
    """

    def __init__(self, place: int, block: nn.Module) -> None:
        super().__init__()
        self.place = place
        self.attention = nn.Module()  # gets a cache, by what it says of its heads
        self.attention.__dict__.update((k, v) for k, v in vars(block.attention).items() if isinstance(v, PLAIN))

    def forward(self, x: Tensor, freqs_cis: Tensor, start_pos: Tensor | None, mask: Tensor | None = None) -> Tensor:
        given = [g.float().mean() for g in (freqs_cis, start_pos, mask) if g is not None]
        weight = torch.stack(given).cumsum(0).sin().sum()
        return x + x.roll(1, dims=-1).tanh() + weight * x.roll(2 + self.place, dims=-1)


def model_cases(root: nn.Module, keep_logits: bool) -> list[Case]:
    """The decoding loop, and the loss where it is to be replaced; a caption is cut down to a few positions."""
    tokens = integers("tokens", (BATCH, 3), root.vocab_size)
    tokens[0, 0], tokens[-1, -1] = 0, root.vocab_size - 1  # a fork's loss may leave one out
    prefix = 1 if root.model_type == "c2i" else 3
    if root.model_type == "c2i":
        condition = integers("condition", (BATCH,), root.num_classes)
    else:
        condition = uniform("condition", (BATCH, prefix, root.cls_embedding.uncond_embedding.shape[1]), -1, 1)

    def prepare(twin: nn.Module, scale: float) -> None:
        twin.layers = nn.ModuleList(StandIn(*numbered) for numbered in enumerate(twin.layers))
        twin.norm.weight = nn.Parameter(scale * twin.norm.weight.detach())

    @torch.no_grad()
    def decoding(scale: float, method: Method, twin: nn.Module, tokens: Tensor, condition: Tensor) -> list[Any]:
        prepare(twin, scale)
        twin.setup_caches(BATCH, root.cls_token_num + root.block_size, torch.float32)
        results = [method(twin, None, condition, torch.arange(prefix, device="cpu"))]
        for t, token in zip((0, 1, root.block_size - 1), tokens.split(1, dim=1), strict=True):
            results.append(method(twin, token, None, torch.tensor([root.cls_token_num + t], device="cpu")))
        return results

    def loss(scale: float, method: Method, twin: nn.Module, tokens: Tensor, condition: Tensor) -> Tensor:
        prepare(twin, scale)
        if prefix > 1:
            twin.cls_token_num = prefix
            twin.cls_embedding.uncond_embedding = twin.cls_embedding.uncond_embedding[:prefix]
        targets, positions = tokens, None
        if not twin.training:  # then there are logits, and so targets, for the condition's positions too
            targets = torch.cat([tokens[:, : prefix - 1], tokens], dim=1)
            positions = torch.arange(targets.shape[1], device="cpu")
        return method(twin, tokens[:, :-1], condition, input_pos=positions, targets=targets)[1]

    inputs = (tokens, condition)
    cases = [Case("decoding", inputs, functools.partial(decoding, scale), (False,)) for scale in (1, LOUD)]
    if not keep_logits:
        cases.append(Case("loss", inputs, functools.partial(loss, 1), (True,)))
        cases.append(Case("loss of large logits", inputs, functools.partial(loss, LOUD), (False,)))
    return cases
