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

from .cases import attention_cases, feed_forward_cases, model_cases, norm_cases
from .modules import plain, replaces, unwrapped
from .patching import Candidate, Patch, checked_root
from .recognition import Case

NEEDED = ("tok_embeddings", "cls_embedding", "layers", "norm", "output")


def patch_llamagen(model: nn.Module, *, keep_logits: bool = True) -> Patch:
    """Run our operations in a LlamaGen `Transformer`: the same results, parameters, state dict and signatures.

    Replaced are RMSNorm, SwiGLU (`feed_forward`), attention (rotary positions in one pass over queries and keys; a
    token-by-token step reads the filled part of the KV cache alone, unless it has caption masks or grouped queries, or
    runs under torch.compile or inference_mode) and, on request, the LM head's loss. Dropout is the model's own, with
    the same random numbers. A second call changes nothing, unless `keep_logits` differs.

    Forks are told apart by calls on random numbers, up to the model's own length and to activations of 30: what they
    do differently only beyond that is not seen. Nor are edits of `causal_mask` through `.data`.

    Args:
        model: the Transformer, also inside of DDP, torch.compile or with its parameters sharded by FSDP2. FSDP1
            flattens parameters: patch before wrapping.
        keep_logits: False changes what `forward` returns where `targets` are given without `valid`: `(None, loss)`,
            the loss by `ops.linear_cross_entropy` without logits in memory (for 16 images of 24×24 tokens they and
            their gradient are 604 MB each). Targets must then be token ids: -100 is not ignored. Gradient checkpointing
            inside a fork's own `forward` is lost; wrap its blocks instead.

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
    loss = "the loss stays LlamaGen's own (keep_logits=True)" if keep_logits else "loss → ops.linear_cross_entropy"
    cases = functools.partial(model_cases, root, keep_logits)
    patch.replace("", Candidate(f"the decoding step's mask; {loss}", (forward,), cases))
    return patch.finished()


def patch_part(
    patch: Patch, path: str, what: str, method: Callable[..., Any], cases: Callable[[nn.Module, nn.Module], list[Case]]
) -> None:
    try:
        module = unwrapped(patch.root.get_submodule(path))
    except AttributeError:
        patch.leave(path, "there is no such module")
        return
    if method is attention and getattr(module, "n_kv_head", None) == getattr(module, "n_head", None):
        what += ", ops.decode_attention"
    patch.replace(path, Candidate(what, (method,), functools.partial(cases, patch.root, module)))


@replaces("forward")
def rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    return ops.rms_norm(x, self.weight, self.eps)


@replaces("forward")
def feed_forward(self: nn.Module, x: Tensor) -> Tensor:
    return self.ffn_dropout(self.w2(ops.swiglu(self.w1(x), self.w3(x))))


@replaces("forward")
def attention(
    self: nn.Module, x: Tensor, freqs_cis: Tensor = None, input_pos: Tensor | None = None, mask: Tensor | None = None
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
    if torch.compiler.is_compiling() or not hasattr(mask, "shows_filled_part"):
        return False
    return mask.shows_filled_part == mask._version  # a fork's block may have edited it in place


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
    mask.shows_filled_part = mask._version
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
    return plain(output, nn.Linear) and output.bias is None and not isinstance(output.weight, DTensor)


def mask_is_causal(model: nn.Module) -> bool:
    """Whether the model's mask for decoding hides nothing but the future, as it does without caption masks.

    Looked at once after each change: `generate` makes a new mask, and edits it before its first step.
    """
    mask = model.causal_mask
    if torch.compiler.is_compiling():
        return False
    if torch.is_inference_mode_enabled() or mask.is_inference():  # its tensors have no version to see a change by
        return False
    state = id(mask), mask._version
    seen, causal = getattr(mask, "seen_causal", (None, False))
    if seen != state:
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        causal = torch.equal(mask, torch.ones_like(mask).tril())
        mask.seen_causal = state, causal
    return causal


PARTS = {
    "attention_norm": ("RMSNorm → ops.rms_norm", rms_norm, norm_cases),
    "ffn_norm": ("RMSNorm → ops.rms_norm", rms_norm, norm_cases),
    "norm": ("RMSNorm → ops.rms_norm", rms_norm, norm_cases),
    "attention": ("attention → ops.rotary_2d", attention, attention_cases),
    "feed_forward": ("SwiGLU → ops.swiglu", feed_forward, feed_forward_cases),
}
