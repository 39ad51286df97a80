"""The operations of `vapi_fast.ops` in plain PyTorch: the truth in tests, and the path on a CPU.

Each function has the name and the signature of the public operation, which documents it and checks its arguments;
here they are taken as right. Inputs in fp16 and bf16 are computed in fp32, float64 in float64. Some are not public: a
forward and a backward without autograd, of which `models/recompute` makes gradients of its own.
"""

from .attention import append_to_cache, decode_attention
from .bias_add import bias_add
from .codebook import codebook_lookup, vq_lookup
from .convolution import convolution, convolution_group_norm_silu
from .dropout import dropout, dropout_forward
from .group_norm import add_group_norm_silu, bias_group_norm_silu, group_norm_silu
from .group_sample import group_sample, linear_group_sample
from .losses import PolicyLoss, group_advantages, linear_cross_entropy, policy_loss
from .noisy_prefix import noisy_prefix, noisy_prefix_cross_entropy
from .perceptual import lpips_distance, lpips_distance_max_pool, mse, scaled_pixels
from .philox import fold_seed, philox
from .rms_norm import add_norm, add_norm_backward, norm_shares, rms_norm
from .rotary_swiglu import (
    rotary_2d,
    rotary_2d_table,
    rotate_heads,
    rotate_heads_backward,
    swiglu,
    swiglu_backward,
    swiglu_forward,
)
from .straight_through import straight_through_lookup

__all__ = [
    "PolicyLoss",
    "add_group_norm_silu",
    "add_norm",
    "add_norm_backward",
    "append_to_cache",
    "bias_add",
    "bias_group_norm_silu",
    "codebook_lookup",
    "convolution",
    "convolution_group_norm_silu",
    "decode_attention",
    "dropout",
    "dropout_forward",
    "fold_seed",
    "group_advantages",
    "group_norm_silu",
    "group_sample",
    "linear_cross_entropy",
    "linear_group_sample",
    "lpips_distance",
    "lpips_distance_max_pool",
    "mse",
    "noisy_prefix",
    "noisy_prefix_cross_entropy",
    "norm_shares",
    "philox",
    "policy_loss",
    "rms_norm",
    "rotary_2d",
    "rotary_2d_table",
    "rotate_heads",
    "rotate_heads_backward",
    "scaled_pixels",
    "straight_through_lookup",
    "swiglu",
    "swiglu_backward",
    "swiglu_forward",
    "vq_lookup",
]
