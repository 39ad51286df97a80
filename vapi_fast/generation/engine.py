"""Token-by-token decoding with a static KV cache; on a GPU one token of all sequences is one CUDA graph.

What a step reads decides its time: all weights once, and each sequence's keys and values so far. LlamaGen-XXL at 384²
in bf16 has 2.77 GB of weights and 295 kB a sequence and slot (2 · 48 layers · 1536 · 2 bytes), so that 256 sequences
read 2.77 + 0.0755 · slots GB: 24.5 GB in the mean of the 576 steps, 8.2 ms at the 3.0 TB/s of an H100. That is 4.7 s or
54 images/s at most, and 98 with a cache in fp8, 93 in int8, whose scales are a sixteenth of it. With guidance both
halves have a cache: twice the second term.

So a step launches few kernels besides: projections of one input are one product, products add to the residual stream
themselves, and rotating the keys and filling the cache is one kernel. Guidance mixes hidden states, not logits: the LM
head is linear, and so runs for half of the rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.models import Condition, Generator, GeneratorConfig
from vapi_fast.models.transformer import Head
from vapi_fast.ops.backends import implementation
from vapi_fast.reference.attention import store
from vapi_fast.reference.filters import filter_logits
from vapi_fast.reference.head import head_logits
from vapi_fast.reference.precision import accumulation_dtype
from vapi_fast.runtime.graphs import RecordedGraph, graph_pool


class Generation(NamedTuple):
    """Sequences drawn: G for each of B conditions."""

    tokens: Tensor  # int64 [B,G,T]
    logprobs: Tensor  # float32 [B,G,T], in nats, of the distribution drawn from, after guidance and filters
    entropies: Tensor | None  # float32 [B,G,T], of the same, if asked for


class KVCache:
    """Keys and values of all layers, `[layers, B, heads, max_length, head_dim]`, filled up to `length`."""

    def __init__(self, model: Generator, batch: int, max_length: int) -> None:
        config = model.config
        shape = (config.layers, batch, config.heads, max_length, config.head_width)
        self.keys = torch.empty(shape, dtype=compute_dtype(model), device=model.head.weight.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # the model moves it on once all layers have written

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values `[B,heads,new,head_dim]`; return all it has so far."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def compute_dtype(model: Generator) -> torch.dtype:
    """The dtype of autocast inside of one, else that of the weights."""
    weight = model.head.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


class Layer(NamedTuple):
    """One block's weights; SwiGLU's w1 and w3 below one another, as they have the same input."""

    attention_norm: Tensor
    wqkv: Tensor
    wo: Tensor
    ffn_norm: Tensor
    w13: Tensor
    w2: Tensor


class Weights(NamedTuple):
    """A generator's weights in one dtype; those that have it already are not copied, w13 and the readout excepted."""

    embeddings: Tensor  # [V,D], of each token
    layers: list[Layer]
    norm: Tensor
    readout: nn.Module
    head: Head


def weights_of(model: Generator, dtype: torch.dtype) -> Weights:
    def cast(weight: Tensor) -> Tensor:
        return weight.detach().to(dtype)

    layers = [
        Layer(
            cast(block.attention_norm.weight),
            cast(block.attention.wqkv.weight),
            cast(block.attention.wo.weight),
            cast(block.ffn_norm.weight),
            torch.cat([cast(block.feed_forward.w1.weight), cast(block.feed_forward.w3.weight)]),
            cast(block.feed_forward.w2.weight),
        )
        for block in model.layers
    ]
    head = Head(*(None if part is None else cast(part) for part in model.head))
    readout = copy.deepcopy(model.readout).to(dtype)
    return Weights(cast(model.token_table()), layers, cast(model.norm.weight), readout, head)


class LayerCache(NamedTuple):
    """A layer's keys and values, each sequence's own, by the names that `vapi_fast.ops` has for them."""

    k_cache: Tensor  # [rows, heads, slots, head_dim]
    v_cache: Tensor
    k_scale: Tensor | None  # float32 [rows, heads, slots], of an int8 cache
    v_scale: Tensor | None

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> LayerCache:
        caches = torch.empty(2, *shape, dtype=dtype, device=device)
        scales = torch.empty(2, *shape[:-1], device=device) if dtype == torch.int8 else (None, None)
        return cls(*caches, *scales)

    def rows(self, start: int, stop: int) -> LayerCache:
        return LayerCache(*(None if each is None else each[start:stop] for each in self))


def slot_bytes(config: GeneratorConfig, dtype: torch.dtype) -> int:
    """What a sequence's keys and values of one slot take in all layers."""
    scales = config.heads * torch.float32.itemsize if dtype == torch.int8 else 0
    return 2 * config.layers * (config.width * dtype.itemsize + scales)


class Prefix(NamedTuple):
    """A caption's keys and values, shared by the sequences of a group: the conditional or the unconditional half's."""

    keys: Tensor  # [layers, groups, heads, prefix_len, head_dim]
    values: Tensor
    mask: Tensor  # bool [groups, prefix_len]


class Engine:
    """Draws `rollouts` sequences for each of `groups` conditions at a time, any number of times.

    The rows of all buffers are the groups' sequences, group by group; with guidance the unconditional ones follow. A
    class's one position lies in the first slot of each sequence's own cache, which spares a kernel a layer; a caption's
    positions are stored once a group.
    """

    def __init__(
        self,
        model: Generator,
        *,
        groups: int,
        rollouts: int,
        scales: Sequence[float],
        temperature: float,
        top_k: int,
        top_p: float,
        masked: bool,
        cache_dtype: torch.dtype | None = None,
        entropies: bool = False,
    ) -> None:
        """Allocates the cache; on a GPU also captures the graphs.

        Args:
            scales: guidance for each of the T tokens; the unconditional half is left out after the last that is not 1.
            masked: whether captions come with a mask. Without one all unconditional sequences share one prefix.
            cache_dtype: of keys and values, default that of the computation.
            entropies: also give the entropies.
        """
        config, device = model.config, model.head.weight.device
        self.model, self.dtype = model, compute_dtype(model)
        self.weights = weights_of(model, self.dtype)
        self.groups, self.rollouts, self.count, self.length = groups, rollouts, groups * rollouts, config.grid_size**2
        self.heads, self.eps = config.heads, config.norm_eps
        self.filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.guided = max((t + 1 for t, scale in enumerate(scales) if scale != 1), default=0)  # tokens that need both
        if self.guided:
            model.require_unconditional("guidance")
        halves = 2 if self.guided else 1
        wide = accumulation_dtype(self.weights.norm)
        self.scales = torch.tensor(scales, dtype=wide, device=device)

        self.apart = int(config.prefix_len > 1)  # 1 if the condition has a cache of its own, else it takes a slot
        slots = max(self.length - self.apart, 1)
        self.rotary = model.rotary[config.prefix_len - 1 + self.apart :][:slots].contiguous()
        shape = (halves * self.count, config.heads, slots, config.head_width)
        self.caches = [LayerCache.empty(shape, cache_dtype or self.dtype, device) for _ in model.layers]
        self.prefixes = []
        for members in (groups, groups if masked else 1)[:halves] if self.apart else ():
            shape = (2, config.layers, members, config.heads, config.prefix_len, config.head_width)
            mask = torch.ones(members, config.prefix_len, dtype=torch.bool, device=device)
            self.prefixes.append(Prefix(*torch.empty(shape, dtype=self.dtype, device=device), mask))

        self.tokens = torch.zeros(self.length, self.count, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(self.length, self.count, dtype=wide, device=device)
        self.entropies = torch.zeros_like(self.logprobs) if entropies else None
        self.sample_ids, self.first_rollouts = torch.zeros(2, self.count, dtype=torch.int64, device=device)
        self.seed, self.positions = torch.zeros_like(self.tokens[0, 0]), torch.arange(self.length, device=device)
        self.graphs: dict[bool, RecordedGraph] = {}
        if device.type == "cuda":
            with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.cuda.device(device):
                pool, example = graph_pool(device), (self.positions[-1],)
                for guided in {t < self.guided for t in range(1, self.length)}:
                    self.graphs[guided] = RecordedGraph(partial(self.step, guided=guided), example, pool)

    @torch.no_grad()
    def draw(
        self,
        condition: Condition,
        *,
        sample_ids: Tensor,
        first_rollout: int,
        seed: Tensor | int,
    ) -> Generation:
        """Draw rollouts first_rollout… of each condition; nothing waits for the GPU.

        condition: of `groups` rows; sample_ids: int64 `[groups]`.
        """
        rollouts = torch.arange(first_rollout, first_rollout + self.rollouts, device=self.tokens.device)
        self.sample_ids.copy_(sample_ids.repeat_interleave(self.rollouts))
        self.first_rollouts.copy_(rollouts.repeat(self.groups))
        self.seed.copy_(seed) if isinstance(seed, Tensor) else self.seed.fill_(seed)
        hidden = self.prefill(condition)
        with torch.autocast(hidden.device.type, enabled=False):
            self.draw_token(hidden, self.positions[0] if self.graphs else 0, self.guided > 0)
            for t in range(1, self.length):
                if self.graphs:
                    self.graphs[t < self.guided].replay((self.positions[t],))
                else:
                    self.step(t, t < self.guided)
        return Generation(self.result(self.tokens), self.result(self.logprobs), self.result(self.entropies))

    def result(self, buffer: Tensor | None) -> Tensor | None:
        """A copy of `[T, rows]` as `[groups, rollouts, T]`: the next draw overwrites the buffer."""
        if buffer is None:
            return None
        return buffer.T.clone(memory_format=torch.contiguous_format).unflatten(0, (self.groups, self.rollouts))

    def prefill(self, condition: Condition) -> Tensor:
        """Fill the caches with the condition, once a group; hidden states `[rows, D]` that predict the first token."""
        halves, mask = [condition.rows], condition.mask
        if self.guided:  # the mask is the condition's in both halves, as in LlamaGen
            halves.append(self.model.unconditional(condition.rows if mask is not None else condition.rows[:1]))
        training, hidden = self.model.training, []
        self.model.eval()
        for half, rows in enumerate(halves):
            cache = KVCache(self.model, len(rows), self.model.config.prefix_len)
            with torch.autocast(rows.device.type, self.dtype, self.has_autocast(), cache_enabled=False):
                last = self.model(None, rows, condition_mask=mask, cache=cache, return_hidden=True)[:, -1]
            repeats = self.count // len(rows)
            hidden.append(last.to(self.dtype).repeat_interleave(repeats, dim=0))
            self.keep(cache, half, repeats, mask)
        self.model.train(training)
        return torch.cat(hidden)

    def has_autocast(self) -> bool:
        """Whether the model computes in another dtype than its weights'."""
        return self.dtype != self.model.head.weight.dtype

    def keep(self, cache: KVCache, half: int, repeats: int, mask: Tensor | None) -> None:
        """Put one half's condition where the steps look for it."""
        if self.apart:
            prefix = self.prefixes[half]
            prefix.keys.copy_(cache.keys)
            prefix.values.copy_(cache.values)
            if mask is not None:
                prefix.mask.copy_(mask)
            return
        for each, keys, values in zip(self.caches, cache.keys, cache.values, strict=True):
            own = each.rows(half * self.count, (half + 1) * self.count)
            for mine, new, scale in ((own.k_cache, keys, own.k_scale), (own.v_cache, values, own.v_scale)):
                store(mine, 0, new[:, :, 0].repeat_interleave(repeats, dim=0), scale)

    def step(self, t: int | Tensor, guided: bool) -> Tensor:
        """Draw token t ≥ 1 of all sequences, `[rows]`: t is an int, or on a GPU a 0-d tensor that the graph reads."""
        before = torch.as_tensor(t - 1, device=self.tokens.device).view(1)
        last = self.tokens.index_select(0, before)[0]
        h = F.embedding(last.repeat(2 if guided else 1), self.weights.embeddings)
        for index, layer in enumerate(self.weights.layers):
            h = self.block(h, layer, index, t - self.apart)
        hidden = self.weights.readout(ops.rms_norm(h, self.weights.norm, self.eps))
        return self.draw_token(hidden, t, guided)

    def block(self, h: Tensor, layer: Layer, index: int, slot: int | Tensor) -> Tensor:
        """One transformer block for one position of each row; `[rows, D]`, changed in place."""
        fast = implementation(h)  # unchecked: checks of what is right by design took a quarter of the time on a CPU
        cache = self.caches[index].rows(0, len(h))
        qkv = F.linear(fast.rms_norm(h, layer.attention_norm, self.eps), layer.wqkv).unflatten(-1, (3, self.heads, -1))
        q = fast.append_to_cache(qkv, self.rotary, position=slot, **cache._asdict())
        h.addmm_(self.attend(q, cache, slot, index).flatten(1), layer.wo.T)
        gate, up = F.linear(fast.rms_norm(h, layer.ffn_norm, self.eps), layer.w13).chunk(2, dim=-1)
        return h.addmm_(fast.swiglu(gate, up), layer.w2.T)

    def attend(self, q: Tensor, cache: LayerCache, slot: int | Tensor, layer: int) -> Tensor:
        attention = implementation(q).decode_attention
        if not self.apart:
            return attention(q, position=slot, **cache._asdict())
        return torch.cat(
            [
                attention(
                    half,
                    position=slot,
                    **cache.rows(start, start + self.count)._asdict(),
                    prefix_k=prefix.keys[layer],
                    prefix_v=prefix.values[layer],
                    prefix_mask=prefix.mask,
                )
                for prefix, half, start in zip(
                    self.prefixes, q.split(self.count), range(0, len(q), self.count), strict=False
                )
            ]
        )

    def draw_token(self, hidden: Tensor, t: int | Tensor, guided: bool) -> Tensor:
        """Draw token t from the states `[rows, D]` that the head takes, and note it."""
        index = torch.as_tensor(t, device=hidden.device).view(1)
        if guided:
            conditional, unconditional = hidden.to(self.scales.dtype).chunk(2)
            scale = self.scales.index_select(0, index)
            hidden = torch.lerp(unconditional, conditional, scale).to(hidden.dtype)
        tokens, logprobs = ops.linear_group_sample(
            **self.weights.head.operands(hidden[:, None]),
            group_size=1,
            seed=self.seed,
            sample_ids=self.sample_ids,
            first_position=t,
            first_rollouts=self.first_rollouts,
            **self.filters,
        )
        self.tokens.index_copy_(0, index, tokens[:, 0].T)
        self.logprobs.index_copy_(0, index, logprobs[:, 0].T)
        if self.entropies is not None:
            self.entropies.index_copy_(0, index, self.entropy(hidden)[None])
        return tokens[:, 0, 0]

    def entropy(self, hidden: Tensor) -> Tensor:
        """Entropy `[rows]`, in nats, of the distribution that a token is drawn from."""
        logits = head_logits(**self.weights.head.operands(hidden)) / self.filters["temperature"]
        logits = filter_logits(logits, self.filters["top_k"], self.filters["top_p"])
        return torch.special.entr(logits.softmax(-1)).sum(-1)
