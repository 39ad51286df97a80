"""The VQ tokenizer of LlamaGen: image → discrete tokens → image. Loads LlamaGen's own checkpoints unchanged."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.models import janus_files
from vapi_fast.models.sizes import VQ_CONFIGS, VQTokenizerConfig
from vapi_fast.runtime.checkpoint import load_into, load_state_dict


class GroupNorm(nn.GroupNorm):
    """GroupNorm with LlamaGen's epsilon; `silu` is the fused form that precedes every convolution."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=1e-6)

    def silu(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.widens = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1.silu(x))
        h = self.conv2(self.norm2.silu(h))
        return (self.nin_shortcut(x) if self.widens else x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # [B, 1, H·W, C]
        out = out.squeeze(1).transpose(1, 2).reshape(x.shape)  # a view, channels-last
        return x + self.proj_out(out if x.is_contiguous(memory_format=torch.channels_last) else out.contiguous())


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one row and column at the far edge only


class Level(nn.Module):
    """The residual (and, at the lowest resolution, attention) blocks of one resolution."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(out_channels, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


def middle(channels: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResidualBlock(channels, channels, groups),
            AttentionBlock(channels, groups),
            ResidualBlock(channels, channels, groups),
        ]
    )


class Encoder(nn.Module):
    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[i - 1] if i else config.channels, width, 2, config.norm_groups, attention=i == last)
            if i < last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1], config.norm_groups)
        self.norm_out = GroupNorm(config.norm_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.conv_blocks:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(self.norm_out.silu(h))


class Decoder(nn.Module):
    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], config.norm_groups)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, 3, config.norm_groups, attention=i == 0)
            if i < last:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = GroupNorm(config.norm_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in self.mid:
            h = block(h)
        for level in self.conv_blocks:
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(self.norm_out.silu(h))


class Quantizer(nn.Module):
    """Holds the codebook under LlamaGen's key `quantize.embedding.weight`; entries are L2-normalised when used."""

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_width)
        nn.init.normal_(self.embedding.weight)


class VQTokenizer(nn.Module):
    """Encoder, nearest-code quantizer and decoder.

    Images are `[B,3,H,W]` in [−1, 1]; tokens are int64 `[B,T]` with T = (H / downsample)² in row order.
    """

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)

    @classmethod
    def from_name(cls, name: str) -> VQTokenizer:
        """A randomly initialised tokenizer: `vq-16`, `vq-8` or `tiny`."""
        if name.lower() not in VQ_CONFIGS:
            raise ValueError(f"unknown tokenizer {name!r}: choose one of {', '.join(VQ_CONFIGS)}")
        return cls(VQ_CONFIGS[name.lower()])

    @classmethod
    def from_checkpoint(cls, path: str | Path, name: str) -> VQTokenizer:
        """The tokenizer `name` with the weights of a LlamaGen checkpoint (`.pt`), `.safetensors` file, or Janus-Pro."""
        tokenizer = cls.from_name(name)
        state = janus_files.tokenizer_weights(load_state_dict(path, skip=janus_files.NO_TOKENIZER))
        load_into(tokenizer, state, path, hint=f"pass the checkpoint of a {name} tokenizer")
        return tokenizer

    def codebook(self, *, normalised: bool = True) -> Tensor:
        """The codebook `[V, C]`, L2-normalised as encoding and decoding have it, or as it is stored."""
        weight = self.quantize.embedding.weight
        return F.normalize(weight, dim=-1) if normalised else weight

    def latents(self, images: Tensor) -> Tensor:
        """Images `[B,3,H,W]` → latents before quantization, channels last `[B,h,w,C]`."""
        side = self.config.downsample
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % side or images.shape[3] % side:
            raise ValueError(f"images must be [B,3,H,W] with H and W multiples of {side}, got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating-point numbers in [−1, 1], got {images.dtype}")
        return self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images `[B,3,H,W]` in [−1, 1] → tokens int64 `[B,T]`."""
        _, indices = ops.vq_lookup(self.latents(images), self.quantize.embedding.weight)
        return indices.flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens `[B,T]` (T a square number) → images `[B,3,H,W]`, approximately in [−1, 1]."""
        return self.decode_embeddings(ops.codebook_lookup(tokens, self.quantize.embedding.weight))

    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        """Code embeddings `[B,T,C]` in row order → images `[B,3,H,W]`; differentiable."""
        if embeddings.ndim != 3:
            raise ValueError(f"tokens must be [B,T], got {list(embeddings.shape[:-1])}")
        batch, length, width = embeddings.shape
        side = round(length**0.5)
        if side * side != length:
            raise ValueError(f"tokens must fill a square grid: T = {length} is not a square number")
        z = embeddings.reshape(batch, side, side, width).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))


def resized_images(decoded: Tensor, side: int) -> Tensor:
    """Decoded images `[N,3,H,H]` at `side` pixels, in [−1, 1]: bicubic as in LlamaGen's evaluation, then clamped."""
    if decoded.shape[-1] != side:
        decoded = F.interpolate(decoded, size=(side, side), mode="bicubic")
    return decoded.clamp(-1, 1)
