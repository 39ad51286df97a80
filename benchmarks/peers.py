"""What others offer for the same work: PyTorch's own functions and, where installed, Liger-Kernel.

Each takes the inputs of the operation in `operations.py` that names it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

LIGER = importlib.util.find_spec("liger_kernel") is not None


def multinomial(logits: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    probabilities = logits.float().softmax(-1)
    tokens = torch.multinomial(probabilities.flatten(0, 1), group_size, replacement=True).view(*logits.shape[:2], -1)
    return tokens.transpose(1, 2), probabilities.gather(-1, tokens).log().transpose(1, 2)


def linear_multinomial(hidden: Tensor, weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return multinomial(F.linear(hidden, weight), group_size)


def bernoulli_prefix(tokens: Tensor, noise_prob: float, vocab_size: int) -> Tensor:
    inputs = tokens[:, :-1]
    replaced = torch.rand(inputs.shape, device=tokens.device) < noise_prob
    return torch.where(replaced, torch.randint_like(inputs, vocab_size), inputs)


def policy_loss(hidden: Tensor, weight: Tensor, tokens: Tensor, advantages: Tensor, targets: Tensor) -> Tensor:
    """On-policy, from logits in the head's own precision."""
    logits = F.linear(hidden, weight)
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, tokens.transpose(1, 2)).transpose(1, 2)
    ratio = (chosen - chosen.detach()).exp()
    policy = torch.maximum(-advantages[..., None] * ratio, -advantages[..., None] * ratio.clamp(0.8, 1.2)).mean()
    return policy - 0.1 * logprobs.gather(-1, targets[..., None]).mean()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten())


def expanded_distances(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """|z|² + |e|² − 2 z·e with one matrix product, as LlamaGen's quantizer has it."""
    z, codes = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    distances = z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * z @ codes.t()
    indices = distances.argmin(-1)
    return z + (codes[indices] - z).detach(), indices


def normalized_embedding(indices: Tensor, codebook: Tensor) -> Tensor:
    return F.embedding(indices, F.normalize(codebook, dim=-1))


def gumbel_softmax(logits: Tensor, codebook: Tensor) -> Tensor:
    return F.gumbel_softmax(logits.float(), tau=0.9, hard=True) @ codebook


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
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(table)[:, None]).flatten(-2).to(x.dtype)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


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


PEERS: dict[str, dict[str, Callable]] = {
    "group_sample": {"multinomial": multinomial},
    "linear_group_sample": {"multinomial": linear_multinomial},
    "noisy_prefix": {"rand, randint, where": bernoulli_prefix},
    "policy_loss": {"own precision": policy_loss},
    "linear_cross_entropy": {"own precision": linear_cross_entropy},
    "vq_lookup": {"matrix product": expanded_distances},
    "codebook_lookup": {"F.embedding": normalized_embedding},
    "straight_through_lookup": {"F.gumbel_softmax": gumbel_softmax},
    "lpips_distance": {"own precision": normalized_differences},
    "mse": {"F.mse_loss": mse_loss},
    "group_norm_silu": {"F.group_norm": group_norm_then_silu},
    "bias_group_norm_silu": {"F.group_norm": bias_then_group_norm},
    "add_group_norm_silu": {"F.group_norm": sum_then_group_norm},
    "add_group_norm_silu phases": {"F.pixel_shuffle": shuffle_then_group_norm},
    "rms_norm": {"F.rms_norm": rms_norm},
    "rotary_2d": {"complex numbers": complex_rotation},
    "swiglu": {"F.silu": silu_times},
    "decode_attention": {"SDPA": attention},
    "decode_attention prefix": {"SDPA": attention_with_prefix},
}

if LIGER:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.transformers import functional as liger

    def liger_grpo(hidden: Tensor, weight: Tensor, tokens: Tensor, advantages: Tensor, targets: Tensor) -> Tensor:
        """Without the prior; every rollout brings its own copy of the hidden states."""
        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo")
        sequences = tokens.flatten(0, 1)
        repeated = hidden.repeat_interleave(tokens.shape[1], 0)
        return loss(repeated, weight, sequences, torch.ones_like(sequences), advantages.flatten())[0]

    def liger_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return liger.liger_fused_linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())

    PEERS["policy_loss"]["Liger GRPO"] = liger_grpo
    PEERS["linear_cross_entropy"]["Liger"] = liger_cross_entropy
    PEERS["rms_norm"]["Liger"] = lambda x, weight: liger.liger_rms_norm(x, weight, 1e-5, in_place=False)
    PEERS["swiglu"]["Liger"] = liger.liger_swiglu
