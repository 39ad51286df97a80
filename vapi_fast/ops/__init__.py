"""The public operations: argument checks and choice of backend in front of an implementation."""

from vapi_fast.reference import PolicyLoss, fold_seed

from .attention import append_to_cache, decode_attention
from .backends import use_backend
from .bias_add import bias_add
from .codebook import codebook_lookup, vq_lookup
from .convolution import convolution, convolution_group_norm_silu
from .dropout import dropout
from .group_norm import add_group_norm_silu, bias_group_norm_silu, group_norm_silu
from .group_sample import group_sample, linear_group_sample
from .losses import group_advantages, linear_cross_entropy, policy_loss
from .noisy_prefix import noisy_prefix, noisy_prefix_cross_entropy
from .perceptual import lpips_distance, lpips_distance_max_pool, mse, scaled_pixels
from .rms_norm import rms_norm
from .rotary_swiglu import rotary_2d, rotary_2d_table, swiglu
from .straight_through import straight_through_lookup

__all__ = [
    "PolicyLoss",
    "add_group_norm_silu",
    "append_to_cache",
    "bias_add",
    "bias_group_norm_silu",
    "codebook_lookup",
    "convolution",
    "convolution_group_norm_silu",
    "decode_attention",
    "dropout",
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
    "policy_loss",
    "rms_norm",
    "rotary_2d",
    "rotary_2d_table",
    "scaled_pixels",
    "straight_through_lookup",
    "swiglu",
    "use_backend",
    "vq_lookup",
]
