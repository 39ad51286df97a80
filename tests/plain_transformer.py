"""A generator's blocks by the textbook's formulas, all kept for the backward: what the core is tested against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def plain_states(
    layers: nn.ModuleList,
    norm: nn.Module,
    h: Tensor,
    turns: Tensor,
    *,
    eps: float,
    mask: Tensor | None = None,
    dropped: Callable[[Tensor, int], Tensor] = lambda x, site: x,
) -> Tensor:
    """The normalised states `[B,S,D]` of embedded positions h `[B,S,D]`.

    turns: complex `[S, head_width / 2]`, what the pairs of queries and keys are multiplied with. mask: bool `[B,P]`,
    False at those of the first P positions that only they themselves see. dropped: of what enters a residual sum, and
    its place there.
    """
    seen = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril().repeat(len(h), 1, 1)
    if mask is not None:
        seen[:, :, : mask.shape[1]] &= mask[:, None]
    seen |= torch.eye(h.shape[1], dtype=torch.bool)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    def normed(x: Tensor, norm: nn.Module) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight

    h = dropped(h, 0)
    for i, block in enumerate(layers):
        attention, mlp = block.attention, block.feed_forward
        qkv = F.linear(normed(h, block.attention_norm), attention.wqkv.weight)
        q, k, v = qkv.unflatten(-1, (3, attention.heads, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", turned(q), turned(k)) / q.shape[-1] ** 0.5
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)
        h = h + dropped(F.linear(attended.flatten(2), attention.wo.weight), 2 * i + 1)
        x = normed(h, block.ffn_norm)
        hidden = F.silu(F.linear(x, mlp.w1.weight)) * F.linear(x, mlp.w3.weight)
        h = h + dropped(F.linear(hidden, mlp.w2.weight), 2 * i + 2)
    return normed(h, norm)
