"""`patch_llamagen`: RMSNorm, rotary positions, SwiGLU, attention and the LM head's loss of a live `Transformer`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vapi_fast import ops

from .modules import hooked, replaces, unwrapped
from .patching import Candidate, Patch, checked_root
from .recognition import PLAIN, Case, integers, uniform

NEEDED = ("tok_embeddings", "cls_embedding", "layers", "norm", "output")
BATCH, LENGTH, FEW = 2, 5, 3  # of the calls compared; FEW positions for the whole model
Method = Callable[..., Any]
SCALES = (1.0, 1e-2)  # of their activations: the second one shows a norm's epsilon


def patch_llamagen(model: nn.Module, *, keep_logits: bool = True) -> Patch:
    """Run our operations in a LlamaGen `Transformer`: the same results, parameters, state dict and signatures.

    Replaced are RMSNorm, SwiGLU (`feed_forward`), attention (rotary positions in one pass over queries and keys; a
    token-by-token step reads the filled part of the KV cache alone) and, on request, the LM head's loss. Dropout is
    the model's own, with the same random numbers. A second call changes nothing, unless `keep_logits` differs.

    Args:
        model: the Transformer, also inside of DDP, torch.compile or with its parameters sharded by FSDP2. FSDP1
            flattens parameters: patch before wrapping.
        keep_logits: False changes what `forward` returns where `targets` are given without `valid`: `(None, loss)`,
            the loss by `ops.linear_cross_entropy` without logits in memory (for 16 images of 24×24 tokens they and
            their gradient are 604 MB each). Targets must then be token ids: -100 is not ignored.

    Returns:
        the Patch: `.report()` names what was replaced and what was not recognised, and it is a context manager.

    Raises:
        TypeError: not a `torch.nn.Module`.
        ValueError: not of LlamaGen's structure.
    """
    root = checked_root("patch_llamagen", model, NEEDED)
    patch = Patch("patch_llamagen", model)
    for index in range(len(root.layers)):
        for name in ("attention_norm", "attention", "ffn_norm", "feed_forward"):
            patch_part(patch, f"layers.{index}.{name}", *PARTS[name])
    patch_part(patch, "norm", *PARTS["norm"])
    forward = forward_with_logits if keep_logits else forward_without_logits
    what = "the decoding step's mask" if keep_logits else "the decoding step's mask, loss → ops.linear_cross_entropy"
    patch.replace("", Candidate(what, (forward,), functools.partial(model_cases, root, keep_logits)))
    return patch.finished()


def patch_part(patch: Patch, path: str, what: str, method: Method, cases: Callable[[nn.Module], list[Case]]) -> None:
    try:
        module = unwrapped(patch.root.get_submodule(path))
    except AttributeError:
        patch.leave(path, "there is no such module")
    else:
        patch.replace(path, Candidate(what, (method,), functools.partial(cases, module)))


@replaces("forward")
def rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    return ops.rms_norm(x, self.weight, self.eps)


@replaces("forward")
def feed_forward(self: nn.Module, x: Tensor) -> Tensor:
    return self.ffn_dropout(self.w2(ops.swiglu(self.w1(x), self.w3(x))))


@replaces("forward")
def attention(
    self: nn.Module, x: Tensor, freqs_cis: Tensor, input_pos: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """LlamaGen's `Attention.forward`: x `[B,S,D]`, freqs_cis `[S, head_dim / 2, 2]`, mask bool `[B,1,S,keys]`."""
    turned = self.n_head + self.n_kv_head
    heads = self.wqkv(x).unflatten(-1, (turned + self.n_kv_head, self.head_dim))
    qk = ops.rotary_2d(heads[:, :, :turned], freqs_cis.view(x.shape[1], -1, 2)).transpose(1, 2)
    q, k = qk.split([self.n_head, self.n_kv_head], dim=1)
    v = heads[:, :, turned:].transpose(1, 2)
    if self.kv_cache is not None:
        k, v = self.kv_cache.update(input_pos, k, v)
    dropout = self.attn_dropout_p if self.training else 0.0
    if self.kv_cache is not None and is_filled_part(mask) and attends_in_one_pass(q, k, dropout):
        out = ops.decode_attention(q[:, :, 0], k, v, input_pos[0].long())[:, None]
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, enable_gqa=turned != 2 * self.n_head
        ).transpose(1, 2)
    return self.resid_dropout(self.wo(out.flatten(2)))


def attends_in_one_pass(q: Tensor, keys: Tensor, dropout: float) -> bool:
    """Whether `ops.decode_attention` takes these: one query for each sequence of the cache, no gradient wanted."""
    wanted = (*keys.shape[:2], 1, keys.shape[3])
    return q.shape == wanted and q.dtype == keys.dtype and not dropout and not q.requires_grad


def is_filled_part(mask: Tensor | None) -> bool:
    """Whether a mask is known to show all slots up to the query's own: `forward` marks the ones that do."""
    return not torch.compiler.is_compiling() and getattr(mask, "shows_filled_part", False)


@replaces("forward")
def forward_with_logits(
    self: nn.Module,
    idx: Tensor | None,
    cond_idx: Tensor | None,
    input_pos: Tensor | None = None,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """LlamaGen's `Transformer.forward`; a step of its decoding loop tells attention that the mask is causal."""
    step = idx is not None and cond_idx is None and targets is None and valid is None
    if not (step and idx.shape[1] == 1 and not self.training and mask_is_causal(self)):
        return type(self).forward(self, idx, cond_idx, input_pos, targets, mask, valid)
    mask = self.causal_mask[: len(idx), None, input_pos]
    mask.shows_filled_part = True
    h = self.tok_dropout(self.tok_embeddings(idx))
    return self.output(hidden_states(self, h, self.freqs_cis[input_pos], input_pos, mask)).float(), None


@replaces("forward")
def forward_without_logits(
    self: nn.Module,
    idx: Tensor | None,
    cond_idx: Tensor | None,
    input_pos: Tensor | None = None,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """LlamaGen's `Transformer.forward`, but `(None, loss)` where there are targets for every position."""
    if idx is None or cond_idx is None or targets is None or valid is not None or not plain_head(self.output):
        return forward_with_logits(self, idx, cond_idx, input_pos, targets, mask, valid)
    condition = self.cls_embedding(cond_idx, train=self.training)[:, : self.cls_token_num]
    h = self.tok_dropout(torch.cat([condition, self.tok_embeddings(idx)], dim=1))
    self.freqs_cis = self.freqs_cis.to(h.device)
    freqs_cis = self.freqs_cis[: h.shape[1]] if self.training else self.freqs_cis[input_pos]
    h = hidden_states(self, h, freqs_cis, input_pos, mask)
    if self.training:
        h = h[:, self.cls_token_num - 1 :]
    weight = self.output.weight
    if torch.is_autocast_enabled(h.device.type):  # as it would cast the head's inputs
        dtype = torch.get_autocast_dtype(h.device.type)
        h, weight = h.to(dtype), weight.to(dtype)
    return None, ops.linear_cross_entropy(h, weight, targets.view(h.shape[:2]))


def hidden_states(
    self: nn.Module, h: Tensor, freqs_cis: Tensor, input_pos: Tensor | None, mask: Tensor | None
) -> Tensor:
    for layer in self.layers:
        h = layer(h, freqs_cis, input_pos, mask)
    return self.norm(h)


def plain_head(output: nn.Module) -> bool:
    """Whether the LM head is nothing but a weight that can be read here."""
    bare = isinstance(output, nn.Linear) and output.bias is None and not hooked(output)
    return bare and not isinstance(output.weight, DTensor)


def mask_is_causal(model: nn.Module) -> bool:
    """Whether the model's mask for decoding hides nothing but the future, as it does without caption masks.

    Looked at once after each change: `generate` makes a new mask, and edits it before its first step.
    """
    mask = model.causal_mask
    if torch.compiler.is_compiling() or mask.is_inference():  # the latter have no version to see a change by
        return False
    state = id(mask), mask._version
    seen, causal = getattr(mask, "seen_causal", (None, False))
    if seen != state:
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        causal = torch.equal(mask, torch.ones_like(mask).tril())
        mask.seen_causal = state, causal
    return causal


def one_call(x: Tensor) -> Case:
    return Case("activations", (x,), lambda method, twin, x: method(twin, x))


def norm_cases(module: nn.Module) -> list[Case]:
    return [one_call(uniform("x", (BATCH, LENGTH, len(module.weight)), -scale, scale)) for scale in SCALES]


def feed_forward_cases(module: nn.Module) -> list[Case]:
    return [one_call(uniform("x", (BATCH, LENGTH, module.w1.in_features), -1, 1))]


class SlotCache(nn.Module):
    """What LlamaGen's attention asks of a KV cache."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)

    def update(self, input_pos: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = self.keys.index_copy(2, input_pos, keys)
        self.values = self.values.index_copy(2, input_pos, values)
        return self.keys, self.values


def attention_cases(module: nn.Module) -> list[Case]:
    """Without a cache, causal and with a mask; with a cache, several positions and one."""
    x = uniform("x", (BATCH, LENGTH, module.dim), -1, 1)
    table = uniform("table", (LENGTH, module.head_dim // 2, 2), -1, 1)
    mask = uniform("mask", (BATCH, 1, LENGTH, LENGTH), 0, 1) < 0.5
    mask = mask | torch.eye(LENGTH, dtype=torch.bool, device="cpu")

    def bare(method: Method, twin: nn.Module, x: Tensor, table: Tensor) -> Tensor:
        return method(twin, x, table)

    def masked(method: Method, twin: nn.Module, x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        return method(twin, x, table, None, mask)

    def cached(method: Method, twin: nn.Module, x: Tensor, table: Tensor, mask: Tensor) -> list[Tensor]:
        shape = (BATCH, module.n_head, LENGTH, module.head_dim)
        twin.kv_cache = SlotCache(uniform("keys", shape, -1, 1), uniform("values", shape, -1, 1))
        parts = torch.arange(LENGTH, device="cpu").split([LENGTH - 1, 1])
        return [method(twin, x[:, part], table[part], part, mask[:, :, part]) for part in parts]

    cases = [Case("no mask", (x, table), bare), Case("mask", (x, table, mask), masked)]
    if module.n_kv_head == module.n_head:  # LlamaGen's cache has room for as many heads as there are queries'
        cases.append(Case("KV cache", (x, table, mask), cached))
    return cases


class StandIn(nn.Module):
    """In place of a block in the check of `Transformer.forward`: quick; depends on its place and all it is given."""

    def __init__(self, place: int, block: nn.Module) -> None:
        super().__init__()
        self.place = place
        self.attention = nn.Module()  # gets a cache, by what it says of its heads
        self.attention.__dict__.update((k, v) for k, v in vars(block.attention).items() if isinstance(v, PLAIN))

    def forward(self, x: Tensor, freqs_cis: Tensor, start_pos: Tensor | None, mask: Tensor | None = None) -> Tensor:
        given = [g.float().mean() for g in (freqs_cis, start_pos, mask) if g is not None]
        return x.roll(1, dims=-1) + torch.stack(given).cumsum(0).sin().sum() * x.roll(2 + self.place, dims=-1)


def model_cases(model: nn.Module, keep_logits: bool) -> list[Case]:
    """The decoding loop, and the loss where it is to be replaced; a caption is cut down to a few positions."""
    tokens = integers("tokens", (BATCH, FEW), model.vocab_size)
    prefix = 1 if model.model_type == "c2i" else FEW
    if model.model_type == "c2i":
        condition = integers("condition", (BATCH,), model.num_classes)
    else:
        condition = uniform("condition", (BATCH, prefix, model.cls_embedding.uncond_embedding.shape[1]), -1, 1)

    def decoding(method: Method, twin: nn.Module, tokens: Tensor, condition: Tensor) -> list[Any]:
        twin.layers = nn.ModuleList(StandIn(*numbered) for numbered in enumerate(twin.layers))
        twin.setup_caches(BATCH, model.cls_token_num + model.block_size, torch.float32)
        with torch.no_grad():
            results = [method(twin, None, condition, torch.arange(prefix, device="cpu"))]
            for t, token in enumerate(tokens.split(1, dim=1)):
                results.append(method(twin, token, None, torch.tensor([model.cls_token_num + t], device="cpu")))
        return results

    def loss(method: Method, twin: nn.Module, tokens: Tensor, condition: Tensor) -> Tensor:
        twin.layers = nn.ModuleList(StandIn(*numbered) for numbered in enumerate(twin.layers))
        if prefix > 1:
            twin.cls_token_num = prefix
            twin.cls_embedding.uncond_embedding = twin.cls_embedding.uncond_embedding[:prefix]
        targets, positions = tokens, None
        if not twin.training:  # then there are logits, and so targets, for the condition's positions too
            targets = torch.cat([tokens[:, : prefix - 1], tokens], dim=1)
            positions = torch.arange(targets.shape[1], device="cpu")
        return method(twin, tokens[:, :-1], condition, input_pos=positions, targets=targets)[1]

    cases = []
    first = model.layers[0].attention
    if first.n_kv_head == first.n_head:  # LlamaGen's cache has room for as many heads as there are queries'
        cases.append(Case("decoding", (tokens, condition), decoding, (False,)))
    if not keep_logits:
        cases.append(Case("loss", (tokens, condition), loss))
    return cases


PARTS = {
    "attention_norm": ("RMSNorm → ops.rms_norm", rms_norm, norm_cases),
    "ffn_norm": ("RMSNorm → ops.rms_norm", rms_norm, norm_cases),
    "norm": ("RMSNorm → ops.rms_norm", rms_norm, norm_cases),
    "attention": ("attention → ops.rotary_2d, ops.decode_attention", attention, attention_cases),
    "feed_forward": ("SwiGLU → ops.swiglu", feed_forward, feed_forward_cases),
}
