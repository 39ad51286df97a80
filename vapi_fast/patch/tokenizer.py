"""`patch_tokenizer`: lookup, GroupNorm + SiLU, attention and upsampling of a live `VQModel`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.frozen import phase_weight
from vapi_fast.reference.normalization import interleaved

from .modules import hooked, replaces
from .patching import Candidate, Patch, checked_root
from .recognition import Case, integers, uniform

NEEDED = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
BATCH, SIDE = 2, 4  # of the maps compared
Method = Callable[..., Any]
SCALES = (1.0, 1e-2)  # of their values: the second one shows a norm's epsilon


def patch_tokenizer(vq_model: nn.Module) -> Patch:
    """Run our operations in LlamaGen's `VQModel`: the same results, parameters, state dict and signatures.

    Replaced are the codebook's lookups (`quantize`, with all that it returns), each GroupNorm with the SiLU that
    follows, the attention blocks, and upsampling with its convolution, as long as no gradient of its weight is wanted
    (four 2×2 convolutions of the small map for one 3×3 of the large one: 16 products for 36). `encode`, `decode` and
    `decode_code` are made of these. In the quantizer's training an entropy loss keeps the original.

    Args:
        vq_model: the VQModel, also inside of DDP or torch.compile.

    Returns:
        the Patch: `.report()` names what was replaced and what was not recognised, and it is a context manager.

    Raises:
        TypeError: not a `torch.nn.Module`.
        ValueError: not of the structure of LlamaGen's tokenizer.
    """
    root = checked_root("patch_tokenizer", vq_model, NEEDED)
    patch = Patch("patch_tokenizer", vq_model)
    for path, module in root.named_modules():
        if kind := kind_of(path, set(module._modules)):
            what, methods, cases = KINDS[kind]
            patch.replace(path, Candidate(what, methods, functools.partial(cases, module)))
    return patch.finished()


def kind_of(path: str, children: set[str]) -> str | None:
    """What a module is, by its children or its place in the model."""
    if {"norm1", "conv1", "norm2", "conv2"} <= children:
        return "residual block"
    if {"norm", "q", "k", "v", "proj_out"} <= children:
        return "attention block"
    if path in KINDS:
        return path
    return "upsample" if path.endswith("upsample") and "conv" in children else None


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    if hooked(norm):
        return F.silu(norm(x))
    return ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


@replaces("forward")
def residual_block(self: nn.Module, x: Tensor) -> Tensor:
    h = self.conv1(norm_silu(self.norm1, x))
    h = self.conv2(self.dropout(norm_silu(self.norm2, h)))
    if self.in_channels != self.out_channels:
        x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
    return x + h


@replaces("forward")
def attention_block(self: nn.Module, x: Tensor) -> Tensor:
    h = self.norm(x)
    q, k, v = (part(h).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v))
    out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
    if x.is_contiguous():  # else the blocks that follow would draw dropout in another order
        out = out.contiguous()
    return x + self.proj_out(out)


@replaces("forward")
def upsample(self: nn.Module, x: Tensor) -> Tensor:
    """The phases' weight is made anew each time: nothing can go stale, and it is small beside the maps."""
    weight, bias = self.conv.weight, self.conv.bias
    if hooked(self.conv) or (torch.is_grad_enabled() and weight.requires_grad):
        return type(self).forward(self, x)
    phases = phase_weight(weight).to(torch.promote_types(weight.dtype, torch.float32))
    if not torch.is_autocast_enabled(x.device.type):
        phases = phases.to(weight.dtype)
    h = interleaved(F.conv2d(x, phases, None if bias is None else bias.repeat(4), padding=1))
    return h if x.is_contiguous(memory_format=torch.channels_last) else h.contiguous()


@replaces("forward")
def encoder(self: nn.Module, x: Tensor) -> Tensor:
    h = self.conv_in(x)
    for index, level in enumerate(self.conv_blocks):
        h = level_blocks(level, self.num_res_blocks, h)
        if index != self.num_resolutions - 1:
            h = level.downsample(h)
    for block in self.mid:
        h = block(h)
    return self.conv_out(norm_silu(self.norm_out, h))


@replaces("forward")
def decoder(self: nn.Module, z: Tensor) -> Tensor:
    h = self.conv_in(z)
    for block in self.mid:
        h = block(h)
    for index, level in enumerate(self.conv_blocks):
        h = level_blocks(level, self.num_res_blocks + 1, h)
        if index != self.num_resolutions - 1:
            h = level.upsample(h)
    return self.conv_out(norm_silu(self.norm_out, h))


def level_blocks(level: nn.Module, count: int, h: Tensor) -> Tensor:
    for index in range(count):
        h = level.res[index](h)
        if len(level.attn) > 0:
            h = level.attn[index](h)
    return h


@replaces("forward")
def quantize(self: nn.Module, z: Tensor) -> tuple[Tensor, tuple[Any, ...], tuple[Any, ...]]:
    """LlamaGen's `VectorQuantizer.forward`: z `[B,C,H,W]` → codes, losses and usage, indices `[B·H·W]`."""
    if self.training and self.entropy_loss_ratio:
        return type(self).forward(self, z)
    weight = self.embedding.weight
    z = z.permute(0, 2, 3, 1).to(torch.promote_types(z.dtype, weight.dtype)).contiguous()
    z_q, indices = ops.vq_lookup(z, weight, l2_norm=self.l2_norm)
    indices = indices.flatten()
    losses, usage = (None, None, None), 0
    if self.training:
        if self.show_usage:
            with torch.no_grad():
                recent = torch.cat([self.codebook_used[len(indices) :], indices.to(self.codebook_used.dtype)])
                self.codebook_used.copy_(recent)
            usage = len(torch.unique(self.codebook_used)) / self.n_e
        latents = F.normalize(z, dim=-1) if self.l2_norm else z
        codes = ops.codebook_lookup(indices, weight, l2_norm=self.l2_norm).view(z.shape)
        vq_loss = (codes - latents.detach()).square().mean()
        losses = vq_loss, self.beta * (codes.detach() - latents).square().mean(), z.new_zeros(())
    return z_q.permute(0, 3, 1, 2), (*losses, usage), (None, None, indices)


@replaces("get_codebook_entry")
def codebook_entry(
    self: nn.Module, indices: Tensor, shape: tuple[int, ...] | None = None, channel_first: bool = True
) -> Tensor:
    z_q = ops.codebook_lookup(indices.long(), self.embedding.weight, l2_norm=self.l2_norm)
    if shape is None:
        return z_q
    if not channel_first:
        return z_q.view(shape)
    batch, channels, height, width = shape
    return z_q.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()


def one_map(channels: int, side: int = SIDE, scales: tuple[float, ...] = SCALES, batch: int = BATCH) -> list[Case]:
    """A forward of a map `[B,C,side,side]`, once for each scale."""

    def forward(method: Method, twin: nn.Module, x: Tensor) -> Any:
        return method(twin, x)

    inputs = [uniform("x", (batch, channels, side, side), -scale, scale) for scale in scales]
    return [Case("a map", (x,), forward, method="forward") for x in inputs]


def block_cases(module: nn.Module) -> list[Case]:
    norm = module._modules.get("norm1", module._modules.get("norm"))
    return one_map(norm.num_channels)


def upsample_cases(module: nn.Module) -> list[Case]:
    def frozen(method: Method, twin: nn.Module, x: Tensor) -> Tensor:
        twin.conv.weight = nn.Parameter(twin.conv.weight.detach(), requires_grad=False)
        return method(twin, x)

    return [case._replace(call=frozen) for case in one_map(module.conv.in_channels, scales=(1.0,))]


def coder_cases(module: nn.Module) -> list[Case]:
    """Maps of two pixels a side at the lowest resolution."""
    downsamples = any("downsample" in level._modules for level in module.conv_blocks)
    side = 2 ** len(module.conv_blocks) if downsamples else 2
    return one_map(module.conv_in.in_channels, side, scales=(1.0,), batch=1)


def quantizer_cases(module: nn.Module) -> list[Case]:
    entries, width = module.embedding.weight.shape
    indices = integers("indices", (BATCH * SIDE * SIDE,), entries)

    def entry(method: Method, twin: nn.Module, indices: Tensor) -> list[Tensor]:
        first, last = (BATCH, width, SIDE, SIDE), (BATCH, SIDE, SIDE, width)
        return [method(twin, indices), method(twin, indices, first), method(twin, indices, last, channel_first=False)]

    return [*one_map(width), Case("entries", (indices,), entry, method="get_codebook_entry")]


KINDS = {
    "residual block": ("GroupNorm + SiLU → ops.group_norm_silu", (residual_block,), block_cases),
    "attention block": ("attention → scaled_dot_product_attention", (attention_block,), block_cases),
    "upsample": ("upsampling and 3×3 convolution → 2×2 convolutions", (upsample,), upsample_cases),
    "encoder": ("last GroupNorm + SiLU → ops.group_norm_silu", (encoder,), coder_cases),
    "decoder": ("last GroupNorm + SiLU → ops.group_norm_silu", (decoder,), coder_cases),
    "quantize": ("lookup → ops.vq_lookup, ops.codebook_lookup", (quantize, codebook_entry), quantizer_cases),
}
