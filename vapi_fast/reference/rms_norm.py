"""RMSNorm, the transformer's normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm, the weight multiplied after the cast back; see `vapi_fast.ops.rms_norm`."""
    wide = x.to(accumulation_dtype(x))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight


def add_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream's next state and its norm, without autograd.

        sum = x + branch, or x itself where there is none
        normed = RMSNorm(sum) · weight

    x and branch floating `[..., D]`, weight floating `[D]` → both `[..., D]` in x's dtype; the norm is that of the sum
    as it is returned, rounded.
    """
    total = x if branch is None else x + branch
    return total, rms_norm(total, weight, eps).to(x.dtype)


def norm_shares(device: torch.device) -> int:
    """Parts that the gradient of a norm's weight is summed up in."""
    return 1


def add_norm_backward(
    dy: Tensor, total: Tensor, weight: Tensor, eps: float, dtotal: Tensor | None, shares: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of `add_norm` to x, which is that to the branch too, and to the weight, in fp32; and the norm again.

    dy and dtotal: to the norm and to the sum, `[..., D]` (None: nothing comes to the sum). shares: fp32
    `[norm_shares, D]`, to which the weight's gradient is added in so many parts; None in its place.
    """
    dtype = accumulation_dtype(total, weight)
    wide, dy_wide = total.to(dtype), dy.to(dtype)
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = wide * rstd
    rounded = normed.to(total.dtype)
    dnormed = dy_wide * weight
    dx = rstd * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    if dtotal is not None:
        dx += dtotal
    dweight = (dy_wide * rounded).flatten(0, -2).sum(0)
    if shares is not None:
        shares[0] += dweight
        dweight = None
    return dx.to(total.dtype), dweight, (rounded * weight).to(dy.dtype)
