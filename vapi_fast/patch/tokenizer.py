"""`patch_tokenizer`: lookup, GroupNorm + SiLU, attention and upsampling of a live `VQModel`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.models.frozen import phase_weight
from vapi_fast.reference.group_norm import interleaved

from .cases import LOUD, QUIET, Method
from .modules import hooked, plain, replaces
from .patching import Candidate, Patch, checked_root
from .recognition import Case, integers, uniform

NEEDED = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
BATCH, SIDE = 2, 4  # of the maps compared
WIDE = 24  # of another one, or of the latents of a coder's: a fork may cut large ones into tiles
CONV_3X3 = {
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}
LOUDER = {"norm1", "norm2", "norm_out", "v"}  # without them what follows a norm would not see how large its input is


def patch_tokenizer(vq_model: nn.Module) -> Patch:
    """Run our operations in LlamaGen's `VQModel`: the same results, parameters, state dict and signatures.

    Replaced are the codebook's lookups (`quantize`, with all that it returns), each GroupNorm with the SiLU that
    follows, the attention blocks, and upsampling with its convolution, as long as no gradient of its weight is wanted
    (four 2×2 convolutions of the small map for one 3×3 of the large one: 16 products for 36). `encode`, `decode` and
    `decode_code` are made of these. In the quantizer's training an entropy loss keeps the original.

    Forks are told apart by calls on random numbers, on maps up to 24 wide (latents of encoder and decoder) and to
    activations of 30: what they do differently only beyond that is not seen.

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
    if not plain(norm, nn.GroupNorm) or not norm.affine:
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
    if not is_3x3(self.conv) or hooked(self.conv) or (torch.is_grad_enabled() and self.conv.weight.requires_grad):
        return type(self).forward(self, x)
    weight, bias = self.conv.weight, self.conv.bias
    phases = phase_weight(weight).to(weight.dtype)
    h = interleaved(F.conv2d(x, phases, None if bias is None else bias.repeat(4), padding=1))
    return h if x.is_contiguous(memory_format=torch.channels_last) else h.contiguous()


def is_3x3(conv: nn.Module) -> bool:
    """Whether a convolution is torch's own, and the one that `phase_weight` stands for."""
    as_expected = all(getattr(conv, name, None) == value for name, value in CONV_3X3.items())
    return type(conv).forward is nn.Conv2d.forward and as_expected


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


def map_cases(
    channels: int,
    size: tuple[int, int, int] = (BATCH, SIDE, SIDE),
    wide: tuple[int, int] = (2, WIDE),
    scales: tuple[float, ...] = (1.0, QUIET),
) -> list[Case]:
    """Forwards of maps `[B,C,H,W]`: of each scale, of large values, and a wide one."""

    def forward(method: Method, twin: nn.Module, x: Tensor) -> Any:
        return method(twin, x)

    def loud(method: Method, twin: nn.Module, x: Tensor) -> Any:
        for name in LOUDER & twin._modules.keys():
            part = getattr(twin, name)
            part.weight = nn.Parameter(LOUD * part.weight.detach())
        return method(twin, x)

    batch, *sides = size
    x = uniform("x", (batch, channels, *sides), -1, 1)
    long = uniform("x", (1, channels, *wide), -1, 1)
    cases = [Case("a map", (scale * x,), forward) for scale in scales]
    cases.append(Case("large values", (LOUD * x,), loud, (False,)))
    cases.append(Case("a wide map", (long,), torch.no_grad()(forward), (False,)))
    return [case._replace(method="forward") for case in cases]


def group_norms(module: nn.Module) -> list[nn.GroupNorm]:
    """The module's own; TypeError if there are others, which would be called."""
    norms = {name: child for name, child in module.named_children() if name.startswith("norm")}
    for name, norm in norms.items():
        if type(norm).forward is not nn.GroupNorm.forward:
            raise TypeError(f"{name} is a {type(norm).__name__}, not a GroupNorm")
    return list(norms.values())


def block_cases(module: nn.Module) -> list[Case]:
    return map_cases(group_norms(module)[0].num_channels)


def upsample_cases(module: nn.Module) -> list[Case]:
    if not is_3x3(module.conv):
        raise TypeError("conv is not a plain 3×3 convolution")

    def frozen(call: Method, method: Method, twin: nn.Module, x: Tensor) -> Tensor:
        twin.conv.weight = nn.Parameter(twin.conv.weight.detach(), requires_grad=False)
        return call(method, twin, x)

    cases = map_cases(module.conv.in_channels, scales=(1.0,))
    return [case._replace(call=functools.partial(frozen, case.call)) for case in cases]


def coder_cases(module: nn.Module) -> list[Case]:
    """Maps of two pixels a side at the lowest resolution."""
    downsamples = any("downsample" in level._modules for level in module.conv_blocks)
    pixels = 2 ** (len(module.conv_blocks) - 1) if downsamples else 1
    group_norms(module)
    size, wide = (1, 2 * pixels, 2 * pixels), (2 * pixels, WIDE * pixels)
    return map_cases(module.conv_in.in_channels, size, wide, scales=(1.0,))


def quantizer_cases(module: nn.Module) -> list[Case]:
    entries, width = module.embedding.weight.shape
    indices = integers("indices", (BATCH * SIDE * SIDE,), entries)

    def entry(method: Method, twin: nn.Module, indices: Tensor) -> list[Tensor]:
        first, last = (BATCH, width, SIDE, SIDE), (BATCH, SIDE, SIDE, width)
        return [method(twin, indices), method(twin, indices, first), method(twin, indices, last, channel_first=False)]

    return [*map_cases(width), Case("entries", (indices,), entry, method="get_codebook_entry")]


KINDS = {
    "residual block": ("GroupNorm + SiLU → ops.group_norm_silu", (residual_block,), block_cases),
    "attention block": ("attention → scaled_dot_product_attention", (attention_block,), block_cases),
    "upsample": ("upsampling and 3×3 convolution → 2×2 convolutions, once frozen", (upsample,), upsample_cases),
    "encoder": ("last GroupNorm + SiLU → ops.group_norm_silu", (encoder,), coder_cases),
    "decoder": ("last GroupNorm + SiLU → ops.group_norm_silu", (decoder,), coder_cases),
    "quantize": ("lookup → ops.vq_lookup, ops.codebook_lookup", (quantize, codebook_entry), quantizer_cases),
}
