"""The pixel-space reward: decode the rollouts, compare them with the image they were rolled out from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vapi_fast import ops
from vapi_fast.models import LPIPS, VQTokenizer
from vapi_fast.models.frozen import FrozenLPIPS, PixelCodec
from vapi_fast.runtime.clock import Clock
from vapi_fast.runtime.graphs import Replayed


class Reward(NamedTuple):
    """Per rollout `[B,G]` (or `[B]`), or per token of it `[B,G,T]`, fp32: R = −(w_mse · MSE + w_lpips · LPIPS) and its
    two distances."""

    total: Tensor
    mse: Tensor
    lpips: Tensor


class PixelReward:
    """R = −(w_mse · MSE(D(x), I) + w_lpips · LPIPS(D(x), I)), from frozen copies of tokenizer and LPIPS.

    `tokenizer` and `lpips` are plain modules on the device on which the reward is computed; `lpips` remains one: what
    changes in it later changes `compare` only.

    Args:
        chunk, dtype: of `codec`, a `PixelCodec`; the frozen LPIPS computes in the dtype of the codec's maps too.
    """

    def __init__(
        self,
        tokenizer: VQTokenizer,
        lpips: LPIPS,
        mse_weight: float = 1.0,
        lpips_weight: float = 1.0,
        chunk: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.lpips = lpips
        self.mse_weight = mse_weight
        self.lpips_weight = lpips_weight
        self.codec = PixelCodec(tokenizer, chunk, dtype)
        self.dtype = self.codec.dtype
        self.frozen_lpips = FrozenLPIPS(lpips, self.dtype)
        self._distances = Replayed(self.distances, self.codec.pool)
        self._token_distances = Replayed(self.token_distances, self.codec.pool)

    def score(
        self, tokens: Tensor, images: Tensor, clock: Clock = contextlib.nullcontext, *, by_token: bool = False
    ) -> Reward:
        """Rewards `[B,G]` of token sequences int64 `[B,G,T]` for images `[B,3,H,W]`; no gradient.

        clock: times the stages "decode" and "lpips"; the MSE belongs to the second.
        by_token: rewards `[B,G,T]`, each of the token's own pixels; a rollout's is their mean.
        """
        with clock("decode"):
            decoded = self.codec.decode(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        return self.compared(decoded, images, clock, by_token=by_token)

    def compared(
        self, decoded: Tensor, images: Tensor, clock: Clock = contextlib.nullcontext, *, by_token: bool = False
    ) -> Reward:
        """As `score`, of decoded images `[B,G,3,H,W]`."""
        chunk = self.codec.chunk_size(images[0, 0].numel(), self.frozen_lpips.itemsize)
        with clock("lpips"):
            distances = self._token_distances if by_token else self._distances
            return self.weighted(*distances(decoded, images, chunk=max(1, chunk // decoded.shape[1])))

    def distances(self, decoded: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """MSE and LPIPS `[B,G]` of decoded images `[B,G,3,H,W]` from images `[B,3,H,W]`."""
        return ops.mse(decoded, images), self.frozen_lpips(decoded, images)

    def token_distances(self, decoded: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """MSE and LPIPS `[B,G,T]` of decoded images `[B,G,3,H,W]` from images `[B,3,H,W]`, each in a token's cell.

        Over the tokens their means are the distances of the images.
        """
        grid = images.shape[-1] // self.codec.frozen.downsample
        levels = zip(*self.frozen_lpips.features(decoded, images), self.frozen_lpips.heads, strict=True)
        lpips = sum(in_cells(lambda a, b, w=w: ops.lpips_distance([a], [b], [w]), a, b, grid) for a, b, w in levels)
        return in_cells(ops.mse, decoded, images, grid), lpips

    def compare(self, decoded: Tensor, images: Tensor) -> Reward:
        """Rewards of decoded images `[B,G,3,H,W]` or `[B,3,H,W]`, differentiable: computed by the plain LPIPS."""
        lead = decoded.shape[:-3]
        maps = self.lpips.feature_maps(decoded.flatten(0, -4))
        with torch.no_grad():
            targets = self.lpips.feature_maps(images)
        return self.weighted(
            ops.mse(decoded, images), self.lpips.distance([m.unflatten(0, lead) for m in maps], targets)
        )

    def weighted(self, mse: Tensor, lpips: Tensor) -> Reward:
        return Reward(-(self.mse_weight * mse + self.lpips_weight * lpips), mse, lpips)


def in_cells(distance: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, grid: int) -> Tensor:
    """A mean distance of maps `[B,G,C,H,W]` from `[B,C,H,W]` in each cell of a grid, `[B,G,grid²]` in row order.

    Where a map has fewer pixels than cells, each pixel's is that of all cells it lies over. The maps are copied cell
    by cell: three times the bytes that the distance of the whole moves.
    """
    side = min(grid, b.shape[-1])
    found = distance(cells(a, side), cells(b, side)).view(len(b), side, side, -1).movedim(-1, 1)
    return F.interpolate(found, size=(grid, grid)).flatten(2).contiguous()


def cells(maps: Tensor, side: int) -> Tensor:
    """`[B,(G,)C,H,W]` as `[B·side²,(G,)C,H/side,W/side]`, channels last in memory."""
    parts = maps.unflatten(-1, (side, -1)).unflatten(-3, (side, -1))  # [B,(G,)C,side,h,side,w]
    return parts.movedim((-4, -2, -5), (1, 2, -1)).flatten(0, 2).movedim(-1, -3)
