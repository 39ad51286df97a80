"""What others offer for the same work: plain PyTorch, as a user would write it, and where installed Liger-Kernel.

Each takes the inputs of the operation in `operations.py` that names it. The plain form is what our speed on a CPU and,
in float64, our exactness are held to, so that it shares nothing with `vapi_fast`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def multinomial(logits: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    probabilities = wide(logits).softmax(-1)
    tokens = torch.multinomial(probabilities.flatten(0, 1), group_size, replacement=True).view(*logits.shape[:2], -1)
    return tokens.transpose(1, 2), probabilities.gather(-1, tokens).log().transpose(1, 2)


def filtered(logits: Tensor) -> Tensor:
    """Temperature 0.9, then the 100 largest, then the fewest of these with a probability of more than 0.9."""
    logits = wide(logits) / 0.9
    logits = logits.masked_fill(logits < logits.topk(100).values[..., -1:], -math.inf)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # which of equal logits goes is fixed
    removed = (ordered.softmax(-1).cumsum(-1) > 0.9).roll(1, -1)
    removed[..., 0] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)


def filtered_multinomial(logits: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return multinomial(filtered(logits), group_size)


def linear_multinomial(hidden: Tensor, weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return multinomial(F.linear(hidden, weight), group_size)


def bernoulli_prefix(tokens: Tensor, noise_prob: float, vocab_size: int) -> Tensor:
    inputs = tokens[:, :-1]
    replaced = torch.rand(inputs.shape, device=tokens.device) < noise_prob
    return torch.where(replaced, torch.randint_like(inputs, vocab_size), inputs)


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    targets: Tensor,
    old: Tensor | None = None,
    base: Tensor | None = None,
    *,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """Loss, policy, prior, KL, ratio and clipped share, from logits in the head's own precision."""
    logits = wide(F.linear(hidden, weight))
    tempered = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    chosen = tempered.gather(-1, tokens.transpose(1, 2)).transpose(1, 2)
    ratio = (chosen - (chosen.detach() if old is None else old)).exp()
    policy = torch.maximum(-advantages[..., None] * ratio, -advantages[..., None] * ratio.clamp(0.8, 1.2)).mean()
    logprobs = tempered if temperature == 1 else logits.log_softmax(-1)
    prior = -logprobs.gather(-1, targets[..., None]).mean()
    kl = policy.new_zeros(()) if base is None else ((base - chosen).exp() - (base - chosen) - 1).mean()
    loss = policy + 0.1 * prior + (kl_weight * kl if kl_weight else 0)
    clipped = ((ratio - 1).abs() > 0.2).to(ratio.dtype)
    return loss, *(term.detach() for term in (policy, prior, kl, ratio.mean(), clipped.mean()))


def off_policy_loss(*inputs: Tensor) -> tuple[Tensor, ...]:
    return policy_loss(*inputs, kl_weight=0.1, temperature=0.9)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten())


def noisy_prefix_cross_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """The hidden states are given, whatever the prefix."""
    bernoulli_prefix(tokens, 0.5, len(weight))
    return linear_cross_entropy(hidden, weight, tokens)


def expanded_distances(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """|z|² + |e|² − 2 z·e with one matrix product, as LlamaGen's quantizer has it."""
    z, codes = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    distances = z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * z @ codes.t()
    indices = distances.argmin(-1)
    return z + (codes[indices] - z).detach(), indices


def normalized_embedding(indices: Tensor, codebook: Tensor) -> Tensor:
    return F.embedding(indices, F.normalize(codebook, dim=-1))


def gumbel_softmax(logits: Tensor, codebook: Tensor) -> Tensor:
    return F.gumbel_softmax(wide(logits), tau=0.9, hard=True) @ codebook


def normalized_differences(a: list[Tensor], b: list[Tensor], weights: list[Tensor]) -> Tensor:
    """LPIPS in the features' own precision, the reference broadcast over the group."""

    def level(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        b = F.normalize(b, dim=-3, eps=1e-10)
        difference = F.normalize(a, dim=-3, eps=1e-10) - (b[:, None] if a.ndim > b.ndim else b)
        return (difference.square().mean((-2, -1)) * weight).sum(-1)

    return sum(level(*each) for each in zip(a, b, weights, strict=True))


def mse_loss(a: Tensor, b: Tensor) -> Tensor:
    b = (b[:, None] if a.ndim > b.ndim else b).expand_as(a)
    return F.mse_loss(a, b, reduction="none").mean((-3, -2, -1))


def group_norm_then_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, 1e-6))


def bias_then_group_norm(h: Tensor, channel_bias: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return group_norm_then_silu(h + channel_bias[:, None, None], weight, bias, groups)


def sum_then_group_norm(
    h: Tensor, residual: Tensor, channel_bias: Tensor, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    total = h + channel_bias[:, None, None] + residual
    return total, group_norm_then_silu(total, weight, bias, groups)


def shuffle_then_group_norm(
    h: Tensor, _: None, channel_bias: Tensor, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """F.pixel_shuffle after each phase is cut to its pixels."""
    height, width = h.shape[2] - 1, h.shape[3] - 1
    phases = h.unflatten(1, (2, 2, -1))
    cut = [phases[:, a, b, :, a : a + height, b : b + width] for a in (0, 1) for b in (0, 1)]
    total = F.pixel_shuffle(torch.stack(cut, 2).flatten(1, 2), 2) + channel_bias[:, None, None]
    return total, group_norm_then_silu(total, weight, bias, groups)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def complex_rotation(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(wide(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(table)[:, None]).flatten(-2).to(x.dtype)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rotate_and_store(
    qkv: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Into the caches' only slot, whose position is 0."""
    q, k, v = qkv[:, None].unbind(2)
    slot = position.view(1)
    k_cache[:, :, slot] = complex_rotation(k, table).transpose(1, 2)
    v_cache[:, :, slot] = v.transpose(1, 2)
    return complex_rotation(q, table)[:, 0], k_cache, v_cache


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache)[:, :, 0]


def attention_with_prefix(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, prefix_k: Tensor, prefix_v: Tensor
) -> Tensor:
    """The prefix beside each sequence's own entries, as a plain cache holds it."""
    rollouts = q.shape[0] // prefix_k.shape[0]
    k = torch.cat([prefix_k.repeat_interleave(rollouts, 0), k_cache], dim=2)
    v = torch.cat([prefix_v.repeat_interleave(rollouts, 0), v_cache], dim=2)
    return F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]


def standardized(rewards: Tensor) -> Tensor:
    return ((rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-8)).clamp(-5, 5)


# Name of the form and the form, by the operation's `peer` or name.
PEERS: dict[str, tuple[str, Callable]] = {
    "group_sample": ("multinomial", multinomial),
    "group_sample top-k, top-p": ("multinomial", filtered_multinomial),
    "linear_group_sample": ("multinomial", linear_multinomial),
    "noisy_prefix": ("rand, randint, where", bernoulli_prefix),
    "policy_loss": ("own precision", policy_loss),
    "policy_loss off-policy": ("own precision", off_policy_loss),
    "linear_cross_entropy": ("own precision", linear_cross_entropy),
    "noisy_prefix_cross_entropy": ("own precision", noisy_prefix_cross_entropy),
    "vq_lookup": ("matrix product", expanded_distances),
    "codebook_lookup": ("F.embedding", normalized_embedding),
    "straight_through_lookup": ("F.gumbel_softmax", gumbel_softmax),
    "lpips_distance": ("own precision", normalized_differences),
    "mse": ("F.mse_loss", mse_loss),
    "group_norm_silu": ("F.group_norm", group_norm_then_silu),
    "bias_group_norm_silu": ("F.group_norm", bias_then_group_norm),
    "add_group_norm_silu": ("F.group_norm", sum_then_group_norm),
    "add_group_norm_silu phases": ("F.pixel_shuffle", shuffle_then_group_norm),
    "rms_norm": ("F.rms_norm", rms_norm),
    "rotary_2d": ("complex numbers", complex_rotation),
    "swiglu": ("F.silu", silu_times),
    "append_to_cache": ("complex numbers", rotate_and_store),
    "decode_attention": ("SDPA", attention),
    "decode_attention prefix": ("SDPA", attention_with_prefix),
    "group_advantages": ("mean and std", standardized),
}


def liger_grpo(hidden: Tensor, weight: Tensor, tokens: Tensor, advantages: Tensor, targets: Tensor) -> Tensor:
    """Without the prior; every rollout brings its own copy of the hidden states."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo")
    sequences = tokens.flatten(0, 1)
    repeated = hidden.repeat_interleave(tokens.shape[1], 0)
    return loss(repeated, weight, sequences, torch.ones_like(sequences), advantages.flatten())[0]


def liger_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())


def liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, 1e-5, in_place=False)


def liger_product(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


# A version that lacks one of them, or does not fit PyTorch or Triton, loses its turn when it is called.
LIGER: dict[str, Callable] = {
    "policy_loss": liger_grpo,
    "linear_cross_entropy": liger_cross_entropy,
    "rms_norm": liger_norm,
    "swiglu": liger_product,
}
if importlib.util.find_spec("liger_kernel") is None:
    LIGER = {}
