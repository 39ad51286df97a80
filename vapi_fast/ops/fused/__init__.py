"""The operations of `vapi_fast.ops` on Triton kernels, each registered as `torch.ops.vapi_fast.<name>`.

Each function has the name and the signature of the public operation, which documents it and checks its arguments;
here they are taken as right, except that the dtypes a kernel takes are fewer.
"""

from vapi_fast.reference import group_advantages

from .normalization import group_norm_silu, rms_norm

__all__ = ["group_advantages", "group_norm_silu", "rms_norm"]
