"""The pixel-space reward: decode the rollouts, compare them with the image they were rolled out from."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from vapi_fast import ops
from vapi_fast.models import LPIPS, VQTokenizer
from vapi_fast.models.frozen import FrozenLPIPS, FrozenTokenizer
from vapi_fast.runtime.clock import Clock
from vapi_fast.runtime.graphs import Replayed, graph_pool

MAX_CHUNK = 64  # sequences decoded at once
MAX_PIXELS = 1 << 21  # decoded at once


class Reward(NamedTuple):
    """Per rollout `[B,G]` (or `[B]`), fp32: R = −(w_mse · MSE + w_lpips · LPIPS) and its two distances."""

    total: Tensor
    mse: Tensor
    lpips: Tensor


class PixelReward:
    """R = −(w_mse · MSE(D(x), I) + w_lpips · LPIPS(D(x), I)), from frozen copies of tokenizer and LPIPS.

    `tokenizer` and `lpips` remain the plain modules, on the device on which the reward is computed; what changes in
    them later changes `compare` only.

    Args:
        chunk: sequences decoded at once; it bounds the memory and changes nothing else. None: by the image size.
        dtype: of the frozen decoder and LPIPS. None: bfloat16 on CUDA, float32 elsewhere.
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
        self.tokenizer = tokenizer
        self.lpips = lpips
        self.mse_weight = mse_weight
        self.lpips_weight = lpips_weight
        self.chunk = chunk
        self.device = lpips.shift.device
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        # In bf16 the encoder would give 1.7 % of the tokens of held-out images another code (tiny tokenizer), and so
        # the transformer other inputs and targets; in float32 none. cuDNN then computes in TF32, as published.
        encoder_dtype = torch.promote_types(self.dtype, torch.float32)
        self.frozen_tokenizer = FrozenTokenizer(tokenizer, self.dtype, encoder_dtype)
        self.frozen_lpips = FrozenLPIPS(lpips, self.dtype)
        self.pool = graph_pool(self.device)
        self._encode = Replayed(self.frozen_tokenizer.encode, self.pool)
        self._decode = Replayed(self.frozen_tokenizer.decode, self.pool)
        self._distances = Replayed(self.distances, self.pool)

    def encode(self, images: Tensor) -> Tensor:
        """Images `[B,3,H,W]` in [−1, 1] → their tokens int64 `[B,T]`; no gradient."""
        # The encoder's maps are as large as the decoder's, in a dtype that is up to twice as wide.
        return self._encode(images, chunk=max(1, self.chunk_size(images[0, 0].numel()) // 2))

    def decode(self, tokens: Tensor) -> Tensor:
        """Token sequences int64 `[N,T]` → images `[N,3,H,W]`, approximately in [−1, 1]; no gradient."""
        pixels = tokens.shape[1] * self.frozen_tokenizer.downsample**2
        return self._decode(tokens, chunk=self.chunk_size(pixels))

    def score(self, tokens: Tensor, images: Tensor, clock: Clock = contextlib.nullcontext) -> Reward:
        """Rewards `[B,G]` of token sequences int64 `[B,G,T]` for images `[B,3,H,W]`; no gradient.

        clock: times the stages "decode" and "lpips"; the MSE belongs to the second.
        """
        group_size = tokens.shape[1]
        chunk = self.chunk_size(images[0, 0].numel())
        with clock("decode"):
            decoded = self.decode(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        with clock("lpips"):
            return self.weighted(*self._distances(decoded, images, chunk=max(1, chunk // group_size)))

    def distances(self, decoded: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """MSE and LPIPS `[B,G]` of decoded images `[B,G,3,H,W]` from images `[B,3,H,W]`."""
        return ops.mse(decoded, images), self.frozen_lpips(decoded, images)

    def compare(self, decoded: Tensor, images: Tensor) -> Reward:
        """Rewards of decoded images `[B,G,3,H,W]` or `[B,3,H,W]`, differentiable: computed by the plain LPIPS."""
        lead = decoded.shape[:-3]
        maps = self.lpips.feature_maps(decoded.flatten(0, -4))
        with torch.no_grad():
            reference = self.lpips.feature_maps(images)
        return self.weighted(
            ops.mse(decoded, images), self.lpips.distance([m.unflatten(0, lead) for m in maps], reference)
        )

    def weighted(self, mse: Tensor, lpips: Tensor) -> Reward:
        return Reward(-(self.mse_weight * mse + self.lpips_weight * lpips), mse, lpips)

    def chunk_size(self, pixels: int) -> int:
        """Sequences to decode at once to images of so many pixels."""
        return self.chunk or max(1, min(MAX_CHUNK, MAX_PIXELS // pixels))
