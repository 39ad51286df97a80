"""Inference forms of the tokenizer and of LPIPS, as the reward runs them: frozen weights, nothing kept for a gradient.

They are built once from the loaded modules and share no memory with them. Between two convolutions of the tokenizer
there is one fused operation: a convolution leaves out its bias, and the pass that adds it also adds the residual and
normalises the sum. Where a GPU was found faster so (`runtime.forms`), a convolution of ours adds both to its own result
and takes the norm's statistics there; of 8 bits, in which a decoder's maps of full resolution may be convolved, always.
All shapes follow from the inputs' and nothing waits for the device, so a CUDA
graph can hold them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.models import LPIPS, VQTokenizer
from vapi_fast.models.tokenizer import AttentionBlock, Decoder, Downsample, Encoder, GroupNorm, ResidualBlock, Upsample
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.forms import architecture, form
from vapi_fast.runtime.graphs import Replayed, graph_pool

TENSOR_CORE_CHANNELS = 8  # cuDNN's fused bf16 convolutions take channels in multiples of 8
MAX_CHUNK = 64  # sequences decoded at once
MAX_PIXELS = 1 << 21  # decoded at once
# What float16 is trusted with: a 32nd of its range, of drawn images; photographs go up to 3.0 times as far (presets).
LARGEST_HALF = torch.finfo(torch.float16).max / 32
E4M3 = torch.float8_e4m3fn
LARGEST, SMALLEST = torch.finfo(E4M3).max, 1e-12  # of numbers, and of scales
# How much further than drawn codes' maps those of others may go in e4m3. No number above 2⁻¹² of the largest loses a
# bit by it; maps of rollouts of the preset's held-out images go up to 1.14 times as far.
HEADROOM = 4
DRAWN_SIDE = 64  # pixels
DRAWN_GRID = 16  # codes a side


def dtype_of_maps(dtype: torch.dtype) -> torch.dtype:
    """Of maps in general, and of weights, where those of some convolutions are e4m3."""
    return torch.float16 if dtype == E4M3 else dtype


def frozen_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A vector that is added or multiplied in the accumulation dtype: float32, or float64 for float64."""
    return bias.detach().to(torch.promote_types(dtype, torch.float32), copy=True)


def frozen_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, copy=True, memory_format=torch.channels_last)


def eight_bit_weight(weight: Tensor, input_scale: float) -> tuple[Tensor, Tensor]:
    """A kernel in e4m3, each channel's largest number the largest there is; and what a product with a map in units of
    input_scale is then worth, fp32 `[C]`."""
    scale = weight.detach().double().abs().amax((1, 2, 3)).clamp_min(SMALLEST) / LARGEST
    return frozen_weight(weight / scale.to(weight.dtype)[:, None, None, None], E4M3), (scale * input_scale).float()


class Norm(NamedTuple):
    """GroupNorm's arguments after the map's, as the operations take them."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float

    @classmethod
    def of(cls, norm: GroupNorm, dtype: torch.dtype) -> Norm:
        return cls(frozen_bias(norm.weight, dtype), frozen_bias(norm.bias, dtype), norm.num_groups, norm.eps)


@dataclass
class Stream:
    """A map of the residual stream whose parts are still to be added: h + bias + residual. To be added once.

    The parts are let go of then: whoever holds the stream would otherwise keep two maps of full size alive. With a
    kernel h is what is still to be convolved by it; in e4m3 with each channel's scale, and a dtype of the sum.
    """

    h: Tensor | None  # [B,C,H,W]; of phases [B,4C,H/2+1,W/2+1]
    bias: Tensor
    residual: Tensor | None = None
    phases: bool = False
    kernel: Tensor | None = None
    channel_scale: Tensor | None = None
    dtype: torch.dtype | None = None

    def normed(self, norm: Norm, *, silu: bool = True, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """The sum, and SiLU(GroupNorm(sum)); with a scale, in units of it in e4m3."""
        h, residual = self.let_go()
        options = {"residual": residual, "channel_bias": self.bias, "silu": silu, "normed_scale": scale}
        if self.kernel is not None:
            eight = {"channel_scale": self.channel_scale, "dtype": self.dtype}
            return ops.convolution_group_norm_silu(h, self.kernel, *norm, **options, **eight)
        return ops.add_group_norm_silu(h, *norm, **options, phases=self.phases)

    def sum(self, pad: int = 0) -> Tensor:
        """The sum where no norm follows: before a change of resolution, where h is never of phases. pad: rows of zeros
        below it, and columns to its right."""
        h, residual = self.let_go()
        if self.kernel is not None:
            eight = {"channel_scale": self.channel_scale, "dtype": self.dtype}
            found = ops.convolution(h, self.kernel, channel_bias=self.bias, residual=residual, **eight)
            return F.pad(found, (0, pad, 0, pad)) if pad else found
        return ops.bias_add(h, self.bias, residual, pad=pad)

    def to(self, dtype: torch.dtype) -> Stream:
        """The same, to be added in another dtype."""
        if self.channel_scale is not None:
            self.dtype = dtype
            return self
        if self.kernel is not None and self.h.dtype != dtype:
            self.h, self.kernel = F.conv2d(self.h, self.kernel, padding=1), None
        self.h = self.h.to(dtype)
        return self

    def let_go(self) -> tuple[Tensor, Tensor | None]:
        parts = self.h, self.residual
        self.h = self.residual = None
        return parts


class FrozenResidualBlock:
    """scales: of what its 3×3 convolutions take in, which is e4m3 then, as their weights are."""

    def __init__(self, block: ResidualBlock, dtype: torch.dtype, scales: Sequence[float] = ()) -> None:
        self.dtype = dtype
        self.norm1, self.norm2 = Norm.of(block.norm1, dtype), Norm.of(block.norm2, dtype)
        self.weight1, self.weight2 = (frozen_weight(conv.weight, dtype) for conv in (block.conv1, block.conv2))
        self.scale1 = self.scale2 = self.channel_scale1 = self.channel_scale2 = None
        if scales:
            self.scale1, self.scale2 = scales
            self.weight1, self.channel_scale1 = eight_bit_weight(block.conv1.weight, self.scale1)
            self.weight2, self.channel_scale2 = eight_bit_weight(block.conv2.weight, self.scale2)
        self.bias1, self.bias2 = (frozen_bias(conv.bias, dtype) for conv in (block.conv1, block.conv2))
        self.shortcut = None
        if block.widens:
            self.shortcut = frozen_weight(block.nin_shortcut.weight, dtype)
            self.bias2 += frozen_bias(block.nin_shortcut.bias, dtype)

    def __call__(self, stream: Stream) -> Stream:
        x, h = stream.normed(self.norm1, scale=self.scale1)
        if fused_convolution(h, self.weight1):
            eight = {"channel_scale": self.channel_scale1, "dtype": self.dtype, "normed_scale": self.scale2}
            _, h = ops.convolution_group_norm_silu(h, self.weight1, *self.norm2, channel_bias=self.bias1, **eight)
        else:
            h = F.conv2d(h, self.weight1, padding=1)
            h = ops.bias_group_norm_silu(h, self.bias1, *self.norm2)
        residual = x if self.shortcut is None else F.conv2d(x, self.shortcut)
        if fused_convolution(h, self.weight2):
            return Stream(
                *(h, self.bias2, residual),
                kernel=self.weight2,
                channel_scale=self.channel_scale2,
                dtype=self.dtype,
            )
        return Stream(F.conv2d(h, self.weight2, padding=1), self.bias2, residual)


def fused_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether the convolution of ours was found faster than cuDNN's on this device, at this shape; in 16 bits. In 8
    bits there is no other."""
    shape = f"{weight.shape[1]}→{weight.shape[0]} {x.shape[-1]}²"
    return x.dtype == E4M3 or (x.element_size() == 2 and form("convolution", x.device, shape) == "triton")


class FrozenAttentionBlock:
    def __init__(self, block: AttentionBlock, dtype: torch.dtype) -> None:
        self.norm = Norm.of(block.norm, dtype)
        parts = (block.q, block.k, block.v)
        self.attend = ATTENTION[form("wide-attention", block.q.weight.device)]
        weight = torch.cat([part.weight.detach().flatten(1) for part in parts]).double()
        bias = torch.cat([part.bias.detach() for part in parts]).double()
        for queries in (weight, bias):  # come with the scores' scale
            queries[: block.q.out_channels] *= block.q.out_channels**-0.5
        self.qkv_weight, self.qkv_bias = weight.to(dtype), bias.to(dtype)
        self.weight = block.proj_out.weight.detach().flatten(1).to(dtype, copy=True)
        self.bias = frozen_bias(block.proj_out.bias, dtype)

    def __call__(self, stream: Stream) -> Stream:
        x, h = stream.normed(self.norm, silu=False)
        qkv = F.linear(h.permute(0, 2, 3, 1).flatten(1, 2), self.qkv_weight, self.qkv_bias)  # [B, H·W, 3·C]
        out = F.linear(self.attend(*qkv.chunk(3, dim=-1)), self.weight)
        return Stream(out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2), self.bias, x)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q · kᵀ) · v of one head, `[B,T,C]` each, by what PyTorch chooses."""
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale=1.0).squeeze(1)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as two products with the softmax between them: one head of all channels is wider than fused kernels'.

    The scores `[B,T,T]` are in fp32 until they are weights; at 24² positions they are a hundredth of the largest map.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    # CUDA alone has a product of 16-bit numbers that is not rounded to 16 bits.
    single = q.is_cuda and q.dtype != wide
    scores = torch.bmm(q, k.mT, wide) if single else torch.bmm(q.to(wide), k.to(wide).mT)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v)


ATTENTION = {"sdpa": fused_attention, "matmul": matmul_attention}


class FrozenUpsample:
    def __init__(self, block: Upsample, dtype: torch.dtype) -> None:
        self.weight = frozen_weight(phase_weight(block.conv.weight.detach()), dtype)
        self.bias = frozen_bias(block.conv.bias, dtype)

    def __call__(self, stream: Stream) -> Stream:
        return Stream(F.conv2d(stream.sum(), self.weight, padding=1), self.bias, phases=True)


class FrozenDownsample:
    def __init__(self, block: Downsample, dtype: torch.dtype) -> None:
        self.weight = frozen_weight(block.conv.weight, dtype)
        self.bias = frozen_bias(block.conv.bias, dtype)

    def __call__(self, stream: Stream) -> Stream:
        return Stream(F.conv2d(stream.sum(pad=1), self.weight, stride=2), self.bias)


def phase_weight(weight: Tensor) -> Tensor:
    """Weight `[4·C_out, C_in, 2, 2]` of the 2×2 convolution that stands for nearest ×2 upsampling and a 3×3 one.

    Of the three rows that a 3×3 kernel w covers in the upsampled map, two are the same row i of the map itself. An
    output row 2i sees rows i − 1 and i through (w₀, w₁ + w₂), an output row 2i + 1 rows i and i + 1 through
    (w₀ + w₁, w₂); columns likewise. So with a padding of one, output pixel (2i + a, 2j + b) is at (i + a, j + b) of
    channels p·C_out … of phase p = 2a + b: 16 products an input pixel and channel pair where there were 36.

    weight: floating `[C_out, C_in, 3, 3]`; the sums are taken in float64 and returned in it.
    """

    def pairs(w: Tensor, dim: int) -> list[Tensor]:
        """For both parities of a row (or column), the two taps in place of three."""
        first, middle, last = w.unbind(dim)
        return [torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)]

    return torch.cat([phase for rows in pairs(weight.double(), 2) for phase in pairs(rows, 3)])


FROZEN_BLOCKS = {
    ResidualBlock: FrozenResidualBlock,
    AttentionBlock: FrozenAttentionBlock,
    Upsample: FrozenUpsample,
    Downsample: FrozenDownsample,
}


def blocks_of(coder: Encoder | Decoder) -> Iterator[nn.Module]:
    """The blocks between `conv_in` and `norm_out`, in the order in which they are applied."""
    if isinstance(coder, Decoder):
        yield from coder.mid
    for level in coder.conv_blocks:
        for i, block in enumerate(level.res):
            yield block
            yield from level.attn[i : i + 1]
        yield from (module for name, module in level.named_children() if name in ("upsample", "downsample"))
    if isinstance(coder, Encoder):
        yield from coder.mid


class FrozenCoder:
    """The encoder or the decoder of a tokenizer; maps `[B,C,H,W]`, channels-last inside.

    Args:
        dtype: of weights and maps.
        single: the parts, by name, that are in float32 instead: `conv_in`, `conv_out` and blocks.
        scales: of what the two convolutions of residual blocks take in, by name, where it is e4m3.
    """

    def __init__(
        self,
        coder: Encoder | Decoder,
        dtype: torch.dtype,
        single: Collection[str] = (),
        scales: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        dtypes = {name: torch.float32 if name in single else dtype for name in parts_of(coder)}
        self.weight_in = frozen_weight(coder.conv_in.weight, dtypes["conv_in"])
        self.bias_in = frozen_bias(coder.conv_in.bias, dtypes["conv_in"])
        self.dtypes = list(dtypes.values())[1:-1]  # of the blocks
        self.itemsize = max(each.itemsize for each in dtypes.values())  # of a number of the widest maps
        self.blocks = []
        for block, (name, each) in zip(blocks_of(coder), [*dtypes.items()][1:-1], strict=True):
            eight = [scales[name]] if scales and name in scales else []
            self.blocks.append(FROZEN_BLOCKS[type(block)](block, each, *eight))
        self.norm_out = Norm.of(coder.norm_out, dtypes["conv_out"])
        weight, bias = coder.conv_out.weight.detach(), coder.conv_out.bias.detach()
        self.channels = len(weight)
        if isinstance(coder, Decoder) and form("last-convolution", weight.device) == "eight":
            weight, bias = (
                F.pad(each, (0, 0) * (each.ndim - 1) + (0, TENSOR_CORE_CHANNELS - 3)) for each in (weight, bias)
            )
        self.weight_out = frozen_weight(weight, dtypes["conv_out"])
        self.bias_out = bias.to(dtypes["conv_out"], copy=True)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight_in.dtype, memory_format=torch.channels_last)
        stream = Stream(F.conv2d(x, self.weight_in, padding=1), self.bias_in)
        for block, dtype in zip(self.blocks, self.dtypes, strict=True):
            stream = block(stream.to(dtype))
        h = stream.to(self.weight_out.dtype).normed(self.norm_out)[1]
        return F.conv2d(h, self.weight_out, self.bias_out, padding=1)[:, : self.channels]


def parts_of(coder: Encoder | Decoder) -> list[str]:
    """Names of a coder's first convolution, its blocks and its last convolution, in the order of application."""
    names = {module: name for name, module in coder.named_modules()}
    return ["conv_in", *(names[block] for block in blocks_of(coder)), "conv_out"]


# ---- what stays in float32 where the rest is in float16


def single_parts(encoder: Encoder) -> set[str]:
    """Parts of an encoder that stay in float32 where the others are in float16. Waits for the device.

    Those at its lowest resolution, and those that come near to what float16 can hold.
    """
    drawn = drawn_images(encoder.conv_in.weight.device)
    return {*lowest_parts(encoder), *large_parts(encoder, parts_of(encoder), drawn)}


def lowest_parts(encoder: Encoder) -> list[str]:
    """From the last change of resolution on all: few FLOPs, and most of what rounding changes in the latents."""
    lowest = max((i for i, block in enumerate(blocks_of(encoder), 1) if isinstance(block, Downsample)), default=0)
    return parts_of(encoder)[lowest:]


def large_parts(network: nn.Module, parts: list[str], drawn: Tensor) -> set[str]:
    """Those of a network's parts whose maps come near to what float16 can hold, and those that take them in.

    By what the maps are for drawn inputs: the same parts at every start, on every rank. Waits for the device.
    """
    found = ranges(network, drawn)
    large = {part for part in parts for name, most in found.items() if within(name, part) and not most <= LARGEST_HALF}
    return large | {part for before, part in itertools.pairwise(parts) if before in large}


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


@torch.no_grad()
def ranges(network: nn.Module, x: Tensor, *, entering: bool = False) -> dict[str, float]:
    """Largest magnitude in what enters or leaves each convolution and each block, by name, for a map x `[N,C,H,W]`;
    entering: in what enters alone."""
    found: dict[str, Tensor] = {}

    def note(name: str, inputs: tuple[Tensor], output: Tensor) -> None:
        maps = inputs if entering else (*inputs, output)
        found[name] = torch.stack([torch.linalg.vector_norm(x, torch.inf) for x in maps]).amax()

    noted = [each for each in network.named_modules() if isinstance(each[1], (nn.Conv2d, *FROZEN_BLOCKS))]
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: note(name, inputs, output))
        for name, module in noted
    ]
    try:
        with ops.use_backend("reference"):
            network(x.to(next(network.parameters()).dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))


def eight_bit_parts(decoder: Decoder) -> list[str]:
    """A decoder's residual blocks at full resolution: their convolutions are more than half of its FLOPs. Its last one,
    whose result is the image, would cost most of the exactness."""
    return [f"conv_blocks.{len(decoder.conv_blocks) - 1}.res.{i}" for i in range(len(decoder.conv_blocks[-1].res))]


def eight_bit_scales(decoder: Decoder, drawn: Tensor, single: Collection[str]) -> dict[str, list[float]]:
    """Of `eight_bit_parts`, but for those in float32, the scales of what the two convolutions take in. Fixed by maps of
    drawn codes, as `large_parts` is. Waits for the device."""
    most = ranges(decoder, drawn, entering=True)
    return {
        part: [max(HEADROOM * most[f"{part}.{name}"] / LARGEST, SMALLEST) for name in ("conv1", "conv2")]
        for part in eight_bit_parts(decoder)
        if part not in single
    }


def check_eight_bits(device: torch.device) -> None:
    """Raises ConfigError for a GPU on which the convolution of 8 bits does not run as it was made to."""
    if device.type != "cuda":
        return
    from vapi_fast.kernels.convolution import DESCRIBED  # imports Triton

    if architecture(device) not in DESCRIBED:
        raise ConfigError(
            f"--reward-dtype fp8 needs a GPU of {', '.join(DESCRIBED)} (H100, H200, B200, B300), and this one is "
            f"{architecture(device)}: pass --reward-dtype float16"
        )


def drawn_images(device: torch.device) -> Tensor:
    """Images `[8,3,H,W]` of noise in cells of four sizes, black and white or of all levels; always the same."""
    generator, images = torch.Generator().manual_seed(0), []
    for cell in (1, 4, 16, 64):
        noise = 2 * torch.rand(2, 3, DRAWN_SIDE // cell, DRAWN_SIDE // cell, generator=generator) - 1
        noise[0].sign_()
        images.append(noise.repeat_interleave(cell, 2).repeat_interleave(cell, 3))
    return torch.cat(images).to(device, memory_format=torch.channels_last)


def drawn_codes(count: int) -> Tensor:
    """Grids `[6,16,16]` of codes below `count`, in cells of one, two squared and four squared; always the same."""
    generator, grids = torch.Generator().manual_seed(0), []
    for cell in (1, 2, 4):
        codes = torch.randint(0, count, (2, DRAWN_GRID // cell, DRAWN_GRID // cell), generator=generator)
        grids.append(codes.repeat_interleave(cell, 1).repeat_interleave(cell, 2))
    return torch.cat(grids)


class FrozenTokenizer:
    """`VQTokenizer.encode` and `.decode` for inference.

    Args:
        tokenizer: stays as it is; later changes to its weights are not seen here.
        dtype: of the decoder's weights and maps; of float16 those parts that it does not hold are in float32
            (`large_parts`), and images where the last convolution is one of them. float8_e4m3fn: as float16, but what
            3×3 convolutions in residual blocks at full resolution take in (`eight_bit_parts`).
        encoder_dtype: the encoder's; of float16 those parts that it does not suit are in float32 (`single_parts`).
    """

    def __init__(self, tokenizer: VQTokenizer, dtype: torch.dtype, encoder_dtype: torch.dtype) -> None:
        self.downsample = tokenizer.config.downsample
        single = single_parts(tokenizer.encoder) if encoder_dtype == torch.float16 else ()
        self.encoder = FrozenCoder(tokenizer.encoder, encoder_dtype, single)
        latent_dtype = self.encoder.weight_out.dtype
        self.quant_weight = tokenizer.quant_conv.weight.detach().flatten(1).to(latent_dtype, copy=True)
        self.quant_bias = tokenizer.quant_conv.bias.detach().to(latent_dtype, copy=True)
        self.codebook = tokenizer.quantize.embedding.weight.detach().clone()
        with torch.no_grad():  # the decoder's input for each code: post_quant_conv sees one code at a time
            entries = F.linear(
                tokenizer.codebook().double(),
                tokenizer.post_quant_conv.weight.double().flatten(1),
                tokenizer.post_quant_conv.bias.double(),
            )
        single, scales, eight = (), {}, dtype == E4M3
        dtype = dtype_of_maps(dtype)
        if dtype == torch.float16:
            drawn = entries[drawn_codes(len(entries)).to(entries.device)].permute(0, 3, 1, 2)
            single = large_parts(tokenizer.decoder, parts_of(tokenizer.decoder), drawn)
            scales = eight_bit_scales(tokenizer.decoder, drawn, single) if eight else {}
        self.decoder = FrozenCoder(tokenizer.decoder, dtype, single, scales)
        self.entries = entries.to(self.decoder.weight_in.dtype)  # [V, latent channels]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images `[B,3,H,W]` in [−1, 1], sides multiples of the downsampling → tokens int64 `[B,T]`."""
        if images.ndim != 4 or any(side % self.downsample for side in images.shape[2:]):
            multiples = f"H and W multiples of {self.downsample}"
            raise ValueError(f"images must be [B,3,H,W] with {multiples}, got {list(images.shape)}")
        h = self.encoder(images).permute(0, 2, 3, 1)
        _, indices = ops.vq_lookup(F.linear(h, self.quant_weight, self.quant_bias), self.codebook)
        return indices.flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens `[B,T]`, T a square number → images `[B,3,H,W]` of `dtype`, approximately in [−1, 1]."""
        side = round(tokens.shape[1] ** 0.5)
        if side * side != tokens.shape[1]:
            raise ValueError(f"tokens must fill a square grid: T = {tokens.shape[1]} is not a square number")
        entries = ops.codebook_lookup(tokens, self.entries, l2_norm=False)
        return self.decoder(entries.unflatten(1, (side, side)).permute(0, 3, 1, 2))


class PixelCodec:
    """Images → tokens → images by a frozen copy of a tokenizer, chunk by chunk; on CUDA recorded graphs are replayed.

    Args:
        tokenizer: on the device of the work; later changes to its weights are not seen here.
        chunk: sequences decoded at once; it bounds the memory and changes nothing else. None: by the image size.
        dtype: of the decoder, as of `FrozenTokenizer`. None: bfloat16 on CUDA, float32 elsewhere.

    Raises ConfigError for float8_e4m3fn on a GPU that it is not made for.
    """

    def __init__(self, tokenizer: VQTokenizer, chunk: int | None = None, dtype: torch.dtype | None = None) -> None:
        device = tokenizer.quantize.embedding.weight.device
        self.chunk = chunk
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        if dtype == E4M3:
            check_eight_bits(device)
        self.dtype = dtype_of_maps(dtype)
        # In bf16 the encoder would give 1.7 % of the tokens of held-out images another code (tiny tokenizer), and so
        # the transformer other inputs and targets; in float16 0.16 %, in float32 0.1 %, where cuDNN computes in TF32,
        # as published.
        wide = torch.promote_types(self.dtype, torch.float32)
        self.encoder_dtype = {"tf32": wide, "float16": torch.float16}[form("encoder", device)]
        self.frozen = FrozenTokenizer(tokenizer, dtype, self.encoder_dtype)
        self.pool = graph_pool(device)
        self._encode = Replayed(self.frozen.encode, self.pool)
        self._decode = Replayed(self.frozen.decode, self.pool)

    def encode(self, images: Tensor) -> Tensor:
        """Images `[N,3,H,W]` in [−1, 1] → their tokens int64 `[N,T]`; no gradient."""
        # The encoder's maps are as large as the decoder's, in a dtype that may be twice as wide.
        chunk = self.chunk_size(images[0, 0].numel()) * torch.float16.itemsize // self.encoder_dtype.itemsize
        return self._encode(images, chunk=max(1, chunk))

    def decode(self, tokens: Tensor) -> Tensor:
        """Token sequences int64 `[N,T]` → images `[N,3,H,W]`, approximately in [−1, 1]; no gradient."""
        pixels = tokens.shape[1] * self.frozen.downsample**2
        return self._decode(tokens, chunk=self.chunk_size(pixels, self.frozen.decoder.itemsize))

    def chunk_size(self, pixels: int, itemsize: int | None = None) -> int:
        """Images of so many pixels to take at once; itemsize: of a network's widest maps, where not of `dtype`."""
        chunk = self.chunk or min(MAX_CHUNK, MAX_PIXELS // pixels)
        return max(1, chunk * self.dtype.itemsize // (itemsize or self.dtype.itemsize))


class Layer(NamedTuple):
    """One convolution of LPIPS's backbone with its ReLU."""

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int
    tap: bool  # the result is one of the feature maps
    pool: int  # side of the pooling after it, which halves the resolution; 0: none

    def map(self, x: Tensor) -> Tensor:
        return conv_relu(x.to(self.weight.dtype), self.weight, self.bias, self.stride, self.padding)


class FrozenLPIPS:
    """LPIPS for inference, its backbone's weights and feature maps in `dtype`; of float16 in float32 where it does not
    hold them (`large_parts`)."""

    def __init__(self, lpips: LPIPS, dtype: torch.dtype) -> None:
        single = set()
        if dtype == torch.float16:
            convolutions = [name for name, module in lpips.features.named_children() if isinstance(module, nn.Conv2d)]
            drawn = (drawn_images(lpips.shift.device) - lpips.shift) / lpips.scale
            single = large_parts(lpips.features, convolutions, drawn)
        self.shift, self.scale = (frozen_bias(each.flatten(), dtype) for each in (lpips.shift, lpips.scale))
        self.heads = [frozen_bias(head, dtype) for head in lpips.heads]
        self.itemsize = torch.float32.itemsize if single else dtype.itemsize  # of a number of the widest maps
        self.layers = []
        for index, module in enumerate(lpips.features):
            if isinstance(module, nn.Conv2d):
                each = torch.float32 if str(index) in single else dtype
                weight, bias = module.weight.detach(), module.bias.detach().to(each, copy=True)
                if not self.layers and weight.is_cuda:
                    weight = F.pad(weight, (0, 0, 0, 0, 0, TENSOR_CORE_CHANNELS - weight.shape[1]))
                steps, tap = (module.stride[0], module.padding[0]), index + 1 in lpips.taps
                self.layers.append(Layer(frozen_weight(weight, each), bias, *steps, tap, pool=0))
            if isinstance(module, nn.MaxPool2d):
                self.layers[-1] = self.layers[-1]._replace(pool=module.kernel_size)

    def scaled(self, images: Tensor) -> Tensor:
        """What the first convolution takes: scaled before it pads with zeros, so that its border is the plain one's."""
        weight = self.layers[0].weight
        return ops.scaled_pixels(images, self.shift, self.scale, channels=weight.shape[1], dtype=weight.dtype)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Images `[N,3,H,W]` in [−1, 1] → one map `[N,C,h,w]` a level."""
        h, maps = self.scaled(images), []
        for layer in self.layers:
            h = layer.map(h)
            if layer.tap:
                maps.append(h)
            h = F.max_pool2d(h, layer.pool, 2) if layer.pool else h
        return maps

    @torch.no_grad()
    def __call__(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Distances `[B,G]` of decoded `[B,G,3,H,W]` from images `[B,3,H,W]`.

        Level by level, where a 2×2 pooling follows: one pass takes the distance and pools the maps, and lets them go.
        """
        if not all(layer.pool == 2 for layer in self.layers[:-1] if layer.tap):
            return ops.lpips_distance(*self.features(decoded, images), self.heads)
        a, b = self.scaled(decoded.flatten(0, 1)), self.scaled(images)
        heads, distance = iter(self.heads), None
        for layer in self.layers:
            a, b = layer.map(a), layer.map(b)
            if layer.tap and layer.pool:
                maps = a.unflatten(0, decoded.shape[:2])
                distance, a, b = ops.lpips_distance_max_pool(maps, b, next(heads), distance)
                a = a.flatten(0, 1)
        last = ops.lpips_distance([a.unflatten(0, decoded.shape[:2])], [b], [next(heads)])
        return last if distance is None else distance + last

    def features(self, decoded: Tensor, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Maps of decoded `[B,G,3,H,W]`, a level each `[B,G,C,h,w]`, and of images `[B,3,H,W]`, once a group."""
        maps = [level.unflatten(0, decoded.shape[:2]) for level in self.feature_maps(decoded.flatten(0, 1))]
        return maps, self.feature_maps(images)


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    """ReLU of a convolution, by default a 3×3 one padded by one: one kernel on CUDA."""
    if x.is_cuda:
        return torch.cudnn_convolution_relu(x, weight, bias, (stride, stride), (padding, padding), (1, 1), 1)
    return F.relu(F.conv2d(x, weight, bias, stride, padding), inplace=True)
