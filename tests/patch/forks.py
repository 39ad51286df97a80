"""Forks of the public models: each computes something else in one respect, some only for large values or sizes."""

from __future__ import annotations

from typing import Any

import public_models
import torch
import torch.nn.functional as F
from public_models import LPIPS, Transformer
from torch import Tensor

from vapi_fast.patch import llamagen as llamagen_patch


class OneMoreRMSNorm(public_models.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.weight * (1 + self.weight)


class OtherEpsilon(public_models.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


class GatedGELU(public_models.FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.gelu(self.w1(x)) * self.w3(x)))


class SwappedGate(public_models.FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(self.w1(x) * F.silu(self.w3(x))))


class TwiceDropped(public_models.FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class HalfPrecisionRMSNorm(public_models.RMSNorm):
    """In Hugging Face's order: the result is of the activations' dtype whatever the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.float().pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt()
        return (x.float() * scale * self.weight).type_as(x)


class ClampedInput(public_models.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-10, 10))


class ClampedGate(public_models.FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)).clamp(max=7) * self.w3(x)))


class Counting(public_models.FeedForward):
    """The same results, and one buffer more that has to be kept."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


Arguments = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]


class OtherAttention(public_models.Attention):
    def changed(self, x: Tensor, freqs_cis: Tensor, input_pos: Tensor | None, mask: Tensor | None) -> Arguments:
        raise NotImplementedError

    def forward(
        self, x: Tensor, freqs_cis: Tensor = None, input_pos: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        return super().forward(*self.changed(x, freqs_cis, input_pos, mask))


class NormalisedQueries(OtherAttention):
    def changed(self, x: Tensor, *others: Any) -> Arguments:
        return F.normalize(x, dim=-1), *others


class StoppedGradient(OtherAttention):
    def changed(self, x: Tensor, *others: Any) -> Arguments:
        return x.detach(), *others


class ClampedActivations(OtherAttention):
    def changed(self, x: Tensor, *others: Any) -> Arguments:
        return x.clamp(-10, 10), *others


class SlidingWindow(OtherAttention):
    """Of eight positions, where there is no cache."""

    def changed(self, x: Tensor, freqs_cis: Tensor, input_pos: Tensor | None, mask: Tensor | None) -> Arguments:
        if mask is None:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(-7)
        return x, freqs_cis, input_pos, mask


class DoubledUnderMask(OtherAttention):
    def changed(self, x: Tensor, freqs_cis: Tensor, input_pos: Tensor | None, mask: Tensor | None) -> Arguments:
        return x * 2 if mask is not None and self.kv_cache is None else x, freqs_cis, input_pos, mask


class DoubledIntoCache(OtherAttention):
    """Where several positions are written at once."""

    def changed(self, x: Tensor, *others: Any) -> Arguments:
        return x * 2 if self.kv_cache is not None and x.shape[1] > 1 else x, *others


class DoubledAtLateSlots(OtherAttention):
    def changed(self, x: Tensor, freqs_cis: Tensor, input_pos: Tensor | None, mask: Tensor | None) -> Arguments:
        return x * 2 if input_pos is not None and input_pos[0] > 8 else x, freqs_cis, input_pos, mask


class WindowedModel(Transformer):
    """A fork whose steps see the last three slots alone."""

    def setup_caches(self, *arguments: Any) -> None:
        super().setup_caches(*arguments)
        self.causal_mask &= ~self.causal_mask.tril(-3)


class OtherTransformer(Transformer):
    def changed(self, logits: Tensor, loss: Tensor | None, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def forward(
        self,
        idx: Tensor | None,
        cond_idx: Tensor | None,
        input_pos: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return self.changed(*super().forward(idx, cond_idx, input_pos, targets, mask, valid), targets)


class ScaledLogits(OtherTransformer):
    def changed(self, logits: Tensor, loss: Tensor | None, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return logits if logits.shape[1] > 1 else logits / 2, loss


class CappedLogits(OtherTransformer):
    def changed(self, logits: Tensor, loss: Tensor | None, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return 300 * (logits / 300).tanh(), loss


class SmoothedLabels(OtherTransformer):
    """In training alone."""

    def changed(self, logits: Tensor, loss: Tensor | None, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if loss is not None and self.training:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
        return logits, loss


class IgnoredToken(OtherTransformer):
    def changed(self, logits: Tensor, loss: Tensor | None, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if loss is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)
        return logits, loss


class ClampedLoss(OtherTransformer):
    def changed(self, logits: Tensor, loss: Tensor | None, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return logits, loss if loss is None else loss.clamp(max=15)


class ScaledEmbeddings(OtherTransformer):
    """By a factor that the norm at the end hides where blocks are linear."""

    def forward(
        self,
        idx: Tensor | None,
        cond_idx: Tensor | None,
        input_pos: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if cond_idx is not None:
            return Transformer.forward(self, idx, cond_idx, input_pos, targets, mask, valid)
        self.norm.eps, mask = 1e-8, self.causal_mask[: len(idx), None, input_pos]
        h = self.tok_dropout(self.tok_embeddings(idx) * 5)
        h = llamagen_patch.hidden_states(self, h, self.freqs_cis[input_pos], input_pos, mask)
        return self.output(h).float(), None


class ClampedPixels(public_models.Encoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-2, 2))


class ClampedImage(public_models.Decoder):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z).clamp(-9, 9)


class TiledEncoder(public_models.Encoder):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(TiledEncoder, self).forward(part) for part in x.split(32, -1)], -1)


class TiledDecoder(public_models.Decoder):
    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([super(TiledDecoder, self).forward(part) for part in z.split(16, -1)], -1)


class OwnEntries(public_models.VectorQuantizer):
    def get_codebook_entry(
        self, indices: Tensor, shape: tuple[int, ...] | None = None, channel_first: bool = True
    ) -> Tensor:
        return super().get_codebook_entry(indices, shape, channel_first) * 2


class ClampedImages(LPIPS):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input.clamp(-1, 1), target.clamp(-1, 1))


class ClampedDistance(LPIPS):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target).clamp(-3, 3)
