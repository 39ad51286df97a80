"""The core of all generators: Llama-style blocks over a prefix, which the condition fills, and the image's tokens.

A family (`llamagen`, `janus`) is a `Generator` with its embeddings, its head and its file format. What lies above
`models/` is written against `Generator` and its `GeneratorConfig` alone.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.models.sizes import GeneratorConfig
from vapi_fast.reference.philox import LABEL_DROPOUT, default_sample_ids, philox, seed_key
from vapi_fast.runtime.accelerators import causal_attention
from vapi_fast.runtime.checkpoint import save_generator

from .recompute import Draw, add_norm, linear, norm_heads, norm_swiglu, taken


class Condition(NamedTuple):
    """What images are drawn from, a row each, on one device.

    Of captions, which lie behind their padding, the last positions alone are the same condition where the mask hides
    all others.
    """

    # As `GeneratorConfig.condition` says: class ids int64 [B], caption features [B, prefix_len, ·], or prompts' token
    # ids int64 [B, prefix_len].
    rows: Tensor
    mask: Tensor | None = None  # bool [B, prefix_len], False at positions without content; None: there are none

    def take(self, index: Tensor | slice) -> Condition:
        return Condition(self.rows[index], None if self.mask is None else self.mask[index])


class Dropout(NamedTuple):
    """What a training forward leaves out, drawn by seed and sample id alone: not by batch, rank or backend."""

    share: float  # of the embeddings' elements and of both residual branches', all others scaled: LlamaGen's 0.1
    label_share: float  # of the images, whose whole condition becomes "none": LlamaGen's 0.1
    seed: int | Tensor
    sample_ids: Tensor | None = None  # int64 [B]

    def states(self, x: Tensor, site: int) -> Tensor:
        """States `[B,S,D]` of one of the model's places."""
        if not self.share:
            return x
        return ops.dropout(x, self.share, seed=self.seed, site=site, sample_ids=self.sample_ids)

    def draw(self, site: int) -> Draw | None:
        """What `states` would leave out of one of the model's places, for who leaves it out by himself."""
        return Draw(self.share, site, self.seed, self.sample_ids) if self.share else None

    def on(self, device: torch.device) -> Dropout:
        """The same, with the seed in the device's memory once, where kernels read it."""
        if isinstance(self.seed, Tensor):
            return self
        return self._replace(seed=torch.full((), self.seed, dtype=torch.int64, device=device))

    def condition(self, rows: Tensor, unconditional: Tensor) -> Tensor:
        """The condition's rows `[B,…]`, some of them those of `unconditional`."""
        ids = default_sample_ids(len(rows), self.sample_ids, rows.device)
        word = philox((0, 0, ids, LABEL_DROPOUT), seed_key(self.seed))[0]
        dropped = (word >> 8) < math.ceil(self.label_share * 2**24)
        return torch.where(dropped.view(-1, *[1] * (rows.ndim - 1)), unconditional, rows)


class Head(NamedTuple):
    """The last matrix: logits = hidden · weightᵀ + bias."""

    weight: Tensor  # [V,D]
    bias: Tensor | None = None  # [V]

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., V]` of the states `[..., D]`, in their dtype."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, taken(self.weight, hidden.dtype), bias)

    def operands(self, hidden: Tensor) -> dict[str, Tensor]:
        """The states and the head in their dtype, as `ops.policy_loss` and its like take them."""
        operands = {"hidden": hidden, "weight": taken(self.weight, hidden.dtype)}
        return operands if self.bias is None else operands | {"bias": self.bias.to(hidden.dtype)}


class Cache(Protocol):
    """Keys and values of earlier positions (see `vapi_fast.generation.engine.KVCache`)."""

    length: int

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


Stream = tuple[Tensor, Tensor]  # a state of the residual stream, and the branch that is still to be added to it


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor:
        """Of x, or of the sum of both."""
        return add_norm(x, branch, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        norm: RMSNorm,
        rotary: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        layer: int,
        draw: Draw | None,
    ) -> Stream:
        """x + branch, and attention over its norm."""
        x, q, k, v = norm_heads(x, branch, norm.weight, norm.eps, self.wqkv.weight, self.heads, rotary)
        if mask is None and cache is None:
            return x, linear(causal_attention(q, k, v).flatten(2), self.wo.weight, draw)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        causal = mask is None and x.shape[1] > 1  # a single query sees everything in the cache
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return x, linear(out.transpose(1, 2).flatten(2), self.wo.weight, draw)


class FeedForward(nn.Module):
    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.hidden_width, bias=False)
        self.w3 = nn.Linear(config.width, config.hidden_width, bias=False)
        self.w2 = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x: Tensor, branch: Tensor, norm: RMSNorm, draw: Draw | None) -> Stream:
        """x + branch, and SwiGLU of its norm."""
        weights = self.w1.weight, self.w3.weight, self.w2.weight
        return norm_swiglu(x, branch, norm.weight, norm.eps, *weights, draw)


class Block(nn.Module):
    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        rotary: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        layer: int,
        dropout: Dropout | None,
    ) -> Stream:
        """The residual stream x + branch after this block, again with its last branch still to be added."""
        draws = [None if dropout is None else dropout.draw(2 * layer + place) for place in (1, 2)]
        x, attended = self.attention(x, branch, self.attention_norm, rotary, mask, cache, layer, draws[0])
        return self.feed_forward(x, attended, self.ffn_norm, draws[1])


class Generator(nn.Module, ABC):
    """Autoregressive transformer π_θ(x_t | x_{<t}, condition) over T = grid_size² image tokens: base of the families.

    A family's constructor makes `layers` (of `Block`), `norm`, its embeddings and its head, in the order and under the
    names of its file format; it implements what is abstract below. Sharding wraps each of `layers`, the rest belongs to
    the root; weights with "norm" in their names do not decay. Training and evaluation mode are the same: what is
    dropped is an argument.
    """

    sizes: ClassVar[Mapping[str, GeneratorConfig]]  # of the family, by name

    layers: nn.ModuleList
    norm: RMSNorm
    rotary: Tensor  # float32 [prefix_len + T, head_width / 2, 2], on the device of the weights
    entry: nn.Module = nn.Identity()  # between a code's embedding and the first block, as `readout`
    readout: nn.Module = nn.Identity()  # between the last norm and the head; what it has of weights is the generator's

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("rotary", self.rotary_table(), persistent=False)

    @classmethod
    @abstractmethod
    def from_checkpoint(
        cls, path: str | Path, name: str, *, grid_size: int | None = None, averaged: bool = False
    ) -> Generator:
        """The generator `name` with the weights at `path`; raises CheckpointError where they do not fit."""

    @abstractmethod
    def rotary_table(self) -> Tensor:
        """Cosines and sines `[prefix_len + T, head_width / 2, 2]` of all positions, computed anew."""

    @abstractmethod
    def embed_condition(self, rows: Tensor) -> Tensor:
        """The prefix `[B, prefix_len, D]`."""

    @abstractmethod
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens int64 `[...]` as they enter, `[..., D]`."""

    @property
    @abstractmethod
    def head(self) -> Head:
        """Its parameters themselves."""

    @abstractmethod
    def unconditional(self, rows: Tensor) -> Tensor:
        """The rows that stand for "none", shaped like `rows`, under the same mask; alike where there is no mask."""

    @abstractmethod
    def checked_condition(self, rows: Tensor, mask: Tensor | None) -> Condition:
        """Both on the generator's device; ValueError or TypeError for what it cannot take."""

    def require_unconditional(self, what: str) -> None:
        """Raise ValueError where no condition stands for "none": `what` needs it."""
        if not self.config.has_unconditional:
            raise ValueError(f"{what} needs an unconditional class, and this model was built without one")

    def language_head(self, source: Path) -> Tensor | None:
        """Of a generator that also writes, what makes logits of text of `text_states`, `[V,D]`, from its checkpoint."""
        return None

    def text_states(self, ids: Tensor) -> Tensor:
        """Of a generator that also writes: the states `[B,n,D]` after each of a text's tokens, int64 `[B,n]`."""
        raise NotImplementedError(f"{type(self).__name__} has no text")

    def trained_names(self) -> set[str]:
        """Of the weights that training changes, those of adapters by the name of what they are added to."""
        names = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        return {re.sub(r"\.parametrizations\.(\w+)\..*", r".\1", name) for name in names}

    def save(self, folder: Path, weights: dict[str, Tensor], source: Path | None) -> None:
        """Write `weights` of the generator, whole ones by its names, as `aligned.pt`, or as a family has its files.

        source: the checkpoint that it was read from, if from one. An OSError names what could not be written.
        """
        save_generator(folder / "aligned.pt", weights)

    def fit_prefix(self, tokens: int) -> None:
        """Be of `config.fitted(tokens)` from now on."""

    def token_table(self) -> Tensor:
        """What each token of the vocabulary enters as, `[V,D]`."""
        return self.embed_tokens(torch.arange(self.config.vocab_size, device=self.head.weight.device))

    def hidden(self, context: Tensor, condition: Condition, dropout: Dropout | None = None) -> Tensor:
        """The states `[B,T,D]` that predict x_1 … x_T from the context x_1 … x_{T−1}, int64 `[B,T−1]`."""
        return self(context, condition.rows, condition_mask=condition.mask, dropout=dropout, return_hidden=True)

    def blocks(
        self,
        h: Tensor,
        rotary: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        dropout: Dropout | None = None,
    ) -> Stream:
        """The states `[B,S,D]` after all layers, of which the last norm takes the sum."""
        branch = None
        for i, layer in enumerate(self.layers):
            h, branch = layer(h, branch, rotary, mask, cache, i, dropout)
        return h, branch

    def forward(
        self,
        tokens: Tensor | None,
        condition: Tensor | None,
        *,
        condition_mask: Tensor | None = None,
        cache: Cache | None = None,
        dropout: Dropout | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Predict the token after each input position, from the last condition position on.

        Args:
            tokens: int64 `[B,S]`, S ≥ 0; None for the prefill of a cache.
            condition: `Condition.rows`; None when the cache holds it already.
            condition_mask: bool `[B,prefix_len]`, False at positions of the condition without content.
                Without a cache both may be cut on the left to the longest condition.
            cache: keys and values of earlier positions; the inputs continue where it ends.
            dropout: what is left out, of inputs that begin with the condition.
            return_hidden: skip the head.

        Returns:
            float32 logits `[B,S+1,V]` (`[B,S,V]` without condition), or the states that the head takes, `[B,·,D]`.
        """
        parts, skipped = [], 0
        if condition is not None:
            if dropout is not None and dropout.label_share:
                condition = dropout.condition(condition, self.unconditional(condition))
            parts.append(self.embed_condition(condition))
            skipped = self.config.prefix_len - parts[0].shape[1]
        if tokens is not None:
            parts.append(self.embed_tokens(tokens))
        if torch.is_autocast_enabled(parts[0].device.type):  # all blocks then keep this dtype, in sums and norms too
            parts = [part.to(torch.get_autocast_dtype(part.device.type)) for part in parts]
        h = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        start = cache.length if cache is not None else skipped
        end = start + h.shape[1]
        if end > self.rotary.shape[0]:
            raise ValueError(
                f"{end - self.config.prefix_len} image tokens do not fit a {self.config.grid_size}×"
                f"{self.config.grid_size} grid"
            )
        if condition_mask is None and 0 < start < end - 1:  # SDPA's own causal mask would start at the first key
            condition_mask = torch.ones(1, self.config.prefix_len, dtype=torch.bool, device=h.device)
        mask = None if condition_mask is None else attention_mask(condition_mask, start - skipped, end - skipped)
        if dropout is not None:
            dropout = dropout.on(h.device)
            h = dropout.states(h, 0)
        h, branch = self.blocks(h, self.rotary[start:end], mask, cache, dropout)
        if cache is not None:
            cache.length = end
        if condition is not None:
            first = self.config.prefix_len - skipped - 1
            h, branch = h[:, first:], branch[:, first:]
        h = self.readout(self.norm(h, branch))
        return h if return_hidden else self.head.logits(h).float()


def attention_mask(condition_mask: Tensor, start: int, end: int) -> Tensor:
    """Causal mask for queries start…end−1 that hides the condition's empty positions; bool `[B,1,end−start,end]`.

    A position always sees itself, so that rows of padding stay finite.
    """
    prefix = condition_mask.shape[1]
    positions = torch.arange(end, device=condition_mask.device)
    queries = positions[start:, None]
    visible = F.pad(condition_mask.bool(), (0, max(end - prefix, 0)), value=True)[:, :end]
    return ((positions <= queries) & visible[:, None] | (positions == queries))[:, None]
