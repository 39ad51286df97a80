"""The operations of `vapi_fast.ops` on Triton kernels, each registered as `torch.ops.vapi_fast.<name>`.

Each function has the name and the signature of the public operation, which documents it and checks its arguments;
here they are taken as right, except that the dtypes a kernel takes are fewer.
"""

from vapi_fast.reference import group_advantages

from .losses import linear_cross_entropy, noisy_prefix_cross_entropy, policy_loss
from .normalization import group_norm_silu, rms_norm
from .perceptual import lpips_distance, mse
from .quantization import codebook_lookup, straight_through_lookup, vq_lookup
from .residual import add_group_norm_silu, bias_group_norm_silu
from .sampling import group_sample, linear_group_sample, noisy_prefix
from .transformer import append_to_cache, decode_attention, rotary_2d, swiglu

__all__ = [
    "add_group_norm_silu",
    "append_to_cache",
    "bias_group_norm_silu",
    "codebook_lookup",
    "decode_attention",
    "group_advantages",
    "group_norm_silu",
    "group_sample",
    "linear_cross_entropy",
    "linear_group_sample",
    "lpips_distance",
    "mse",
    "noisy_prefix",
    "noisy_prefix_cross_entropy",
    "policy_loss",
    "rms_norm",
    "rotary_2d",
    "straight_through_lookup",
    "swiglu",
    "vq_lookup",
]
