"""The pixel-space reward: decode the rollouts, compare them with the image they were rolled out from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vapi_fast import ops
from vapi_fast.models import LPIPS, VQTokenizer


class Reward(NamedTuple):
    """Per rollout `[B,G]` (or `[B]`): R = −(w_mse · MSE + w_lpips · LPIPS) and its two distances."""

    total: Tensor
    mse: Tensor
    lpips: Tensor


@dataclass(frozen=True)
class PixelReward:
    """R = −(w_mse · MSE(D(x), I) + w_lpips · LPIPS(D(x), I)).

    `chunk`: sequences decoded at once; it bounds the memory and changes nothing else.
    """

    tokenizer: VQTokenizer
    lpips: LPIPS
    mse_weight: float = 1.0
    lpips_weight: float = 1.0
    chunk: int = 8

    @torch.no_grad()
    def score(self, tokens: Tensor, images: Tensor) -> Reward:
        """Rewards `[B,G]` of token sequences `[B,G,T]` for images `[B,3,H,W]`; no gradient."""
        group_size = tokens.shape[1]
        per_chunk = max(1, self.chunk // group_size)
        parts = []
        for drawn, target in zip(tokens.split(per_chunk), images.split(per_chunk), strict=True):
            decoded = self.tokenizer.decode(drawn.flatten(0, 1))
            parts.append(self.compare(decoded.unflatten(0, (-1, group_size)), target))
        return Reward(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def compare(self, decoded: Tensor, images: Tensor) -> Reward:
        """Rewards of decoded images `[B,G,3,H,W]` or `[B,3,H,W]`; the image's own features are computed once."""
        lead = decoded.shape[:-3]
        maps = self.lpips.feature_maps(decoded.flatten(0, -4))
        with torch.no_grad():
            reference = self.lpips.feature_maps(images)
        lpips = self.lpips.distance([m.unflatten(0, lead) for m in maps], reference)
        mse = ops.mse(decoded, images)
        return Reward(-(self.mse_weight * mse + self.lpips_weight * lpips), mse, lpips)
