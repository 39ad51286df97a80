"""The operations of `vapi_fast.ops` on Triton kernels, each registered as `torch.ops.vapi_fast.<name>`.

One file a stem: device code (functions named `…_kernel`, and what they call), launch settings as constants, launches,
registration with PyTorch and gradients. Headers count bytes moved through device memory and floating-point operations,
and name the bound that governs. Settings are the same for every GPU: nobody has measured others to be better on one.

Each function here has the name and the signature of the public operation, which documents it and checks its arguments;
here they are taken as right, except that the dtypes a kernel takes are fewer. Those that launch without autograd, for
`models/recompute`, which has gradients of its own, are as `reference` documents them.
"""

# In a checkout's root this folder is also found as `kernels`, which is the name of a package of Hugging Face's: whoever
# looks for that one must not register the operations a second time.
if __name__ == "vapi_fast.kernels":
    from vapi_fast.reference import group_advantages

    from .attention import append_to_cache, decode_attention
    from .bias_add import bias_add
    from .codebook import codebook_lookup, vq_lookup
    from .convolution import convolution, convolution_group_norm_silu
    from .dropout import dropout, dropout_forward
    from .group_norm import add_group_norm_silu, bias_group_norm_silu, group_norm_silu
    from .group_sample import group_sample, linear_group_sample
    from .losses import linear_cross_entropy, policy_loss
    from .noisy_prefix import noisy_prefix, noisy_prefix_cross_entropy
    from .perceptual import lpips_distance, lpips_distance_max_pool, mse, scaled_pixels
    from .rms_norm import add_norm, add_norm_backward, norm_shares, rms_norm
    from .rotary_swiglu import (
        rotary_2d,
        rotate_heads,
        rotate_heads_backward,
        swiglu,
        swiglu_backward,
        swiglu_forward,
    )
    from .straight_through import straight_through_lookup

__all__ = [
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
    "policy_loss",
    "rms_norm",
    "rotary_2d",
    "rotate_heads",
    "rotate_heads_backward",
    "scaled_pixels",
    "straight_through_lookup",
    "swiglu",
    "swiglu_backward",
    "swiglu_forward",
    "vq_lookup",
]
