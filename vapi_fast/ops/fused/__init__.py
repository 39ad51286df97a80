"""The operations of `vapi_fast.ops` on Triton kernels, each registered as `torch.ops.vapi_fast.<name>`.

Each function has the name and the signature of the public operation, which documents it and checks its arguments;
here they are taken as right, except that the dtypes a kernel takes are fewer.
"""

from vapi_fast.reference import group_advantages

from .losses import linear_cross_entropy, policy_loss
from .normalization import group_norm_silu, rms_norm
from .perceptual import lpips_distance, mse

__all__ = [
    "group_advantages",
    "group_norm_silu",
    "linear_cross_entropy",
    "lpips_distance",
    "mse",
    "policy_loss",
    "rms_norm",
]
