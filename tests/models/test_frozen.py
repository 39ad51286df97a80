"""The inference forms of tokenizer and LPIPS against the plain modules, in float64 wherever the CPU can."""

from __future__ import annotations

import collections
import contextlib

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_l2
from torch import Tensor, nn

from vapi_fast import ops, tiny
from vapi_fast.data.dataset import ImageData
from vapi_fast.kernels.launch import recorded
from vapi_fast.models import LPIPS, VQTokenizer, VQTokenizerConfig
from vapi_fast.models import frozen as frozen_forms
from vapi_fast.models.frozen import (
    LARGEST_HALF,
    FrozenCoder,
    FrozenLPIPS,
    FrozenResidualBlock,
    FrozenTokenizer,
    PixelCodec,
    conv_relu,
    drawn_codes,
    drawn_images,
    matmul_attention,
    parts_of,
    phase_weight,
    ranges,
    single_parts,
)
from vapi_fast.models.lpips import LPIPS_CONFIGS
from vapi_fast.runtime import forms
from vapi_fast.runtime.errors import ConfigError

SMALL = VQTokenizerConfig(channels=16, multipliers=(1, 2), latent_channels=16, codebook_size=61, norm_groups=4)


def randomised(module: nn.Module) -> nn.Module:
    """Random biases and norms too, which start as zeros and ones: then nothing that is left out goes unseen."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.2, 1.5)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vq16() -> VQTokenizer:
    torch.manual_seed(0)
    return randomised(VQTokenizer.from_name("vq-16").double())


@pytest.fixture(scope="module")
def frozen_vq16(vq16: VQTokenizer) -> FrozenTokenizer:
    return FrozenTokenizer(vq16, torch.float64, torch.float64)


@pytest.fixture
def small() -> VQTokenizer:
    torch.manual_seed(1)
    return randomised(VQTokenizer(SMALL))


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    return VQTokenizer.from_checkpoint(tiny.FILES.tokenizer, "tiny").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images(image_sets: None) -> Tensor:
    return next(iter(ImageData(tiny.FILES.heldout_images, tiny.IMAGE_SIZE).batches(32, 1, seed=0))).images


# ---- the four-phase convolution


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (2, 1), (8, 8)])
def test_phases_hold_the_upsampled_convolution(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    phases = F.conv2d(x, phase_weight(weight), padding=1)
    assert phases.shape == (2, 20, height + 1, width + 1)
    for row in range(2 * height):
        for column in range(2 * width):
            (i, a), (j, b) = divmod(row, 2), divmod(column, 2)
            channels = slice(5 * (2 * a + b), 5 * (2 * a + b) + 5)
            torch.testing.assert_close(phases[:, channels, i + a, j + b], expected[:, :, row, column])


# ---- the tokenizer


@pytest.mark.parametrize("side", [32, 48])
def test_vq16_equals_the_plain_tokenizer(vq16: VQTokenizer, frozen_vq16: FrozenTokenizer, side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    tokens = torch.randint(0, 16384, (1, (side // 16) ** 2), generator=generator)
    decoded = frozen_vq16.decode(tokens)
    assert relative_l2(decoded, vq16.decode(tokens)) < 1e-12
    images = torch.rand(1, 3, side, side + 16, generator=generator, dtype=torch.float64) * 2 - 1
    latents = F.linear(
        frozen_vq16.encoder(images).permute(0, 2, 3, 1), frozen_vq16.quant_weight, frozen_vq16.quant_bias
    )
    assert relative_l2(latents, vq16.latents(images)) < 1e-12
    assert torch.equal(frozen_vq16.encode(images), vq16.encode(images))


def test_tiny_equals_the_plain_tokenizer_in_float32(tokenizer: VQTokenizer, images: Tensor) -> None:
    frozen = FrozenTokenizer(tokenizer, torch.float32, torch.float32)
    tokens = tokenizer.encode(images)
    assert torch.equal(frozen.encode(images), tokens)
    assert relative_l2(frozen.decode(tokens), tokenizer.decode(tokens).double()) < 1e-5


def test_bf16_is_near(tokenizer: VQTokenizer, images: Tensor) -> None:
    frozen = FrozenTokenizer(tokenizer, torch.bfloat16, torch.float32)
    tokens = frozen.encode(images)
    assert torch.equal(tokens, tokenizer.encode(images))
    decoded = frozen.decode(tokens)
    assert decoded.dtype == torch.bfloat16
    assert decoded.is_contiguous(memory_format=torch.channels_last)
    assert relative_l2(decoded, tokenizer.decode(tokens).double()) < 2e-2


def test_the_kernels_decode_the_same(small: VQTokenizer) -> None:
    frozen = FrozenTokenizer(small, torch.float32, torch.float32)
    tokens = torch.tensor([[0, 60, 7, 7]])
    with ops.use_backend("triton"):
        decoded = frozen.decode(tokens)
    assert relative_l2(decoded, small.decode(tokens).double()) < 1e-5


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_our_convolutions_code_the_same(small: VQTokenizer, dtype: torch.dtype, error: float) -> None:
    """Of encoder and decoder, by the kernels: bias, residual and statistics ride on a block's two convolutions."""
    frozen = FrozenTokenizer(small, dtype, dtype)
    tokens, images = torch.tensor([[0, 60, 7, 7]]), torch.rand(1, 3, 8, 8) * 2 - 1
    decode, encode = (lambda: frozen.decode(tokens)), (lambda: frozen.encoder(images.to(dtype)))
    with ops.use_backend("triton"), torch.no_grad():
        usual = decode(), encode()
        with forms.taking(convolution="triton"), recorded(carry_out=True) as recording:
            ours = decode(), encode()
    launched = collections.Counter(launch.kernel.__name__ for launch in recording.launches)
    blocks = [*frozen.encoder.blocks, *frozen.decoder.blocks]
    halves = [each for each in blocks if isinstance(each, FrozenResidualBlock) and each.weight1.dtype == dtype]
    given = dtype == torch.float16  # one of them gives its sum to a part of the encoder that is in float32
    assert launched["convolution_kernel"] == 2 * len(halves) - given > 18
    for mine, theirs, plain in zip(ours, usual, (small.decode(tokens), small.encoder(images)), strict=True):
        assert relative_l2(mine, plain.double()) < error
        assert relative_l2(mine, plain.double()) < 1.2 * relative_l2(theirs, plain.double())


EIGHT = VQTokenizerConfig(channels=32, multipliers=(1, 2), latent_channels=16, codebook_size=61, norm_groups=4)


@pytest.mark.parametrize("config", [SMALL, EIGHT])
def test_eight_bits_at_full_resolution(config: VQTokenizerConfig) -> None:
    """By the kernels as by the reference, maps for convolutions of 8 bits written once; all else as float16 has it."""
    torch.manual_seed(1)
    tokenizer = randomised(VQTokenizer(config))
    half, eight = (FrozenTokenizer(tokenizer, dtype, torch.float32) for dtype in (torch.float16, torch.float8_e4m3fn))
    blocks = [
        {each.weight1.dtype, each.weight2.dtype}
        for each in eight.decoder.blocks
        if isinstance(each, FrozenResidualBlock)
    ]
    assert blocks == [{torch.float16}] * 5 + [{torch.float8_e4m3fn}] * 3
    assert eight.decoder.weight_out.dtype == eight.entries.dtype == torch.float16
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
    assert torch.equal(eight.encode(images), half.encode(images))
    tokens = torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(4))
    with ops.use_backend("triton"), recorded(carry_out=True) as recording:
        decoded = eight.decode(tokens)
    assert decoded.dtype == torch.float16
    assert collections.Counter(launch.kernel.__name__ for launch in recording.launches)["convolution_kernel"] == 6
    expected = tokenizer.double().decode(tokens)
    error = relative_l2(eight.decode(tokens), expected)
    assert relative_l2(half.decode(tokens), expected) < error / 4 < 0.05 / 4
    assert relative_l2(decoded, expected) < 1.2 * error
    assert relative_l2(decoded, eight.decode(tokens).double()) < 0.7 * error  # where a number lies between two others


def test_scales_of_eight_bits(small: VQTokenizer) -> None:
    """What drawn codes' maps go up to is a quarter of the largest number, of weights each channel's is the largest; a
    product's scale is what both were divided by."""
    frozen = FrozenTokenizer(small, torch.float8_e4m3fn, torch.float32)
    drawn = frozen.entries[drawn_codes(61)].float().permute(0, 3, 1, 2)
    most = ranges(small.decoder, drawn, entering=True)
    for i, block in enumerate(small.decoder.conv_blocks[1].res):
        mine, name = frozen.decoder.blocks[-3 + i], f"conv_blocks.1.res.{i}"
        assert (mine.scale1, mine.scale2) == pytest.approx(
            [4 * most[f"{name}.conv{n}"] / 448 for n in (1, 2)], rel=1e-3
        )
        weight = mine.weight2.float()
        assert torch.equal(weight.abs().amax((1, 2, 3)), torch.full((16,), 448.0))
        found = weight * (mine.channel_scale2 / mine.scale2)[:, None, None, None]
        assert relative_l2(found, block.conv2.weight.double()) < 0.03


def test_eight_bits_where_there_is_nothing() -> None:
    """Weights and maps of zeros have a scale too."""
    tokenizer = VQTokenizer(SMALL).requires_grad_(False)
    for block in tokenizer.decoder.conv_blocks[1].res:
        for parameter in (block.conv1.weight, block.norm2.weight, block.norm2.bias):
            parameter.zero_()
    tokens = torch.tensor([[3, 1, 4, 1]])
    found = FrozenTokenizer(tokenizer, torch.float8_e4m3fn, torch.float32).decode(tokens)
    assert relative_l2(found, tokenizer.double().decode(tokens)) < 5e-3


def test_a_part_in_float32_has_no_eight_bits(small: VQTokenizer) -> None:
    """And the sum before it, of a convolution of 8 bits, is in float32 too."""
    small.decoder.conv_blocks[1].res[1].conv1.weight *= 1e5
    frozen = FrozenTokenizer(small, torch.float8_e4m3fn, torch.float32)
    dtypes = [each.weight1.dtype for each in frozen.decoder.blocks[-3:]]
    assert dtypes == [torch.float8_e4m3fn, torch.float32, torch.float32]
    tokens = torch.tensor([[3, 1, 4, 1]])
    expected = small.double().decode(tokens)
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            assert relative_l2(frozen.decode(tokens), expected) < 0.05


@pytest.mark.parametrize(("architecture", "right"), [("sm_80", False), ("sm_89", False), ("sm_90", True)])
def test_gpus_that_eight_bits_are_for(monkeypatch: pytest.MonkeyPatch, architecture: str, right: bool) -> None:
    monkeypatch.setattr(frozen_forms, "architecture", lambda device: architecture)
    message = f"needs a GPU of sm_90, .* and this one is {architecture}: pass --reward-dtype float16"
    with contextlib.nullcontext() if right else pytest.raises(ConfigError, match=message):
        frozen_forms.check_eight_bits(torch.device("cuda", 0))
    frozen_forms.check_eight_bits(torch.device("cpu"))


def test_convolutions_in_float32_stay_cudnns(small: VQTokenizer) -> None:
    frozen = FrozenTokenizer(small, torch.float32, torch.float32)
    with ops.use_backend("triton"), forms.taking(convolution="triton"), recorded(carry_out=True) as recording:
        frozen.decode(torch.tensor([[3]]))
    assert "convolution_kernel" not in {launch.kernel.__name__ for launch in recording.launches}


def test_nothing_is_shared_with_the_modules(small: VQTokenizer) -> None:
    lpips = LPIPS(LPIPS_CONFIGS["tiny"]).requires_grad_(False)
    for module in (small, lpips):
        module.to(memory_format=torch.channels_last)  # as the frozen form has it: a cast alone would copy nothing
    images = torch.rand(2, 3, 8, 8)
    frozen, distance = FrozenTokenizer(small, torch.float32, torch.float32), FrozenLPIPS(lpips, torch.float32)

    def results() -> list[Tensor]:
        tokens = frozen.encode(images)
        return [tokens, frozen.decode(tokens), distance(images[:, None] / 2, images)]

    before = results()
    for module in (small, lpips):
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.zero_()
    for now, then in zip(results(), before, strict=True):
        assert torch.equal(now, then)


def test_no_value_is_read() -> None:
    """What waits for a value fails on tensors without any; so the full size can be walked through in no time."""
    tokenizer = VQTokenizer.from_name("vq-16").to("meta")
    frozen = FrozenTokenizer(tokenizer, torch.bfloat16, torch.float32)
    tokens = frozen.encode(torch.empty(2, 3, 384, 384, device="meta"))
    assert (tokens.shape, tokens.dtype) == ((2, 576), torch.int64)
    decoded = frozen.decode(tokens)
    assert (decoded.shape, decoded.dtype) == ((2, 3, 384, 384), torch.bfloat16)
    lpips = FrozenLPIPS(LPIPS(LPIPS_CONFIGS["vgg16"]).to("meta"), torch.bfloat16)
    distance = lpips(decoded[:, None], torch.empty(2, 3, 384, 384, device="meta"))
    assert (distance.shape, distance.dtype) == ((2, 1), torch.float32)


def test_wrong_shapes(small: VQTokenizer) -> None:
    frozen = FrozenTokenizer(small, torch.float32, torch.float32)
    with pytest.raises(ValueError, match="T = 6 is not a square number"):
        frozen.decode(torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"H and W multiples of 2, got \[1, 3, 8, 7\]"):
        frozen.encode(torch.zeros(1, 3, 8, 7))


# ---- other forms of the same work


def differing(codec: PixelCodec, tokenizer: VQTokenizer, images: Tensor) -> float:
    """Share of the tokens that are others than in float32."""
    found = codec.encode(images)
    return float((found != tokenizer.encode(images)).double().mean())


def test_an_encoder_in_float16_changes_few_tokens(tokenizer: VQTokenizer, image_sets: None) -> None:
    """0.15 % of the 27 392 tokens of all held-out images (TF32: 0.10 %, bf16: 1.6 %); here of the first 4096."""
    images = next(iter(ImageData(tiny.FILES.heldout_images, tiny.IMAGE_SIZE).batches(64, 1, seed=0))).images
    with forms.taking(encoder="float16"):
        codec = PixelCodec(tokenizer)
    assert codec.frozen.encoder.weight_in.dtype == torch.float16
    assert {codec.frozen.encoder.weight_out.dtype, codec.frozen.quant_weight.dtype} == {torch.float32}
    assert 0 < differing(codec, tokenizer, images) <= 0.002


def test_parts_in_float32_are_those_at_the_lowest_resolution(tokenizer: VQTokenizer) -> None:
    parts = parts_of(tokenizer.encoder)
    lowest = parts.index("conv_blocks.1.downsample")
    assert single_parts(tokenizer.encoder) == set(parts[lowest:])
    assert parts[:2] == ["conv_in", "conv_blocks.0.res.0"]
    assert parts[-2:] == ["mid.2", "conv_out"]


def test_ranges_are_those_of_the_maps(small: VQTokenizer, images: Tensor) -> None:
    found = ranges(small.encoder, images[:4])
    first = small.encoder.conv_in(images[:4])
    assert found["conv_in"] == pytest.approx(max(first.abs().max().item(), images[:4].abs().max().item()))
    block = small.encoder.conv_blocks[0].res[0]
    assert found["conv_blocks.0.res.0"] == pytest.approx(max(first.abs().max().item(), block(first).abs().max().item()))
    inside = block.norm1.silu(first)
    assert found["conv_blocks.0.res.0.conv1"] == pytest.approx(
        max(inside.abs().max().item(), block.conv1(inside).abs().max().item())
    )
    assert not any(module._forward_hooks for module in small.encoder.modules())


def test_what_is_trusted_with_float16_is_far_from_its_end(tokenizer: VQTokenizer, images: Tensor) -> None:
    """Held-out images go up to 24, drawn ones to 29, and photographs to 3.0 times as far in some convolutions."""
    drawn = ranges(tokenizer.encoder, drawn_images(torch.device("cpu")))
    for name, most in ranges(tokenizer.encoder, images).items():
        assert most < min(2 * drawn[name], 0.1 * LARGEST_HALF)


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_a_part_that_would_overflow_stays_in_float32(small: VQTokenizer, scale: float) -> None:
    """A convolution that makes large maps: 1e3 goes beyond what is trusted, 1e6 beyond float16's range."""
    block = small.encoder.conv_blocks[0].res[0]
    block.conv2.weight *= scale
    images, name = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1, "conv_blocks.0.res.0"
    assert ranges(small.encoder, drawn_images(torch.device("cpu")))[f"{name}.conv2"] > LARGEST_HALF
    single = single_parts(small.encoder)
    assert {name, "conv_blocks.0.res.1"} <= single
    assert "conv_in" not in single
    frozen = FrozenTokenizer(small, torch.float32, torch.float16)
    exact = FrozenCoder(small.encoder.double(), torch.float64)(images.double())
    assert relative_l2(frozen.encoder(images), exact) < 5e-3
    all_half = FrozenCoder(small.encoder, torch.float16)(images)
    assert all_half.isfinite().all() == (scale < 1e6)


@pytest.mark.parametrize("scale", [1e4, 1e7])
def test_a_decoder_in_float16_keeps_what_would_overflow(small: VQTokenizer, scale: float) -> None:
    """And then decodes half as many at once, as float32's maps are twice as large."""
    half = torch.float16
    assert FrozenTokenizer(small, half, torch.float32).decoder.itemsize == half.itemsize
    name = "conv_blocks.1.res.0"
    small.decoder.conv_blocks[1].res[0].conv2.weight *= scale
    codec = PixelCodec(small, chunk=6, dtype=half)
    wide = {
        part
        for part, each in zip(parts_of(small.decoder)[1:-1], codec.frozen.decoder.dtypes, strict=True)
        if each == torch.float32
    }
    assert {name, "conv_blocks.1.res.1"} <= wide
    assert "conv_blocks.0.res.0" not in wide
    assert codec.chunk_size(64, codec.frozen.decoder.itemsize) == 3
    tokens = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(8))
    assert relative_l2(codec.decode(tokens), small.double().decode(tokens)) < 5e-3
    all_half = FrozenCoder(small.decoder, half)
    entries = codec.frozen.entries[tokens].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    assert all_half(entries).isfinite().all() == (scale < 1e7)


def test_what_rewards_trust_float16_with_is_far_from_its_end(tokenizer: VQTokenizer, images: Tensor) -> None:
    """Decoder: held-out images go up to 22, drawn codes to 24, no more than 1.9-fold; LPIPS: 42 and 50, 0.9."""
    lpips = LPIPS.from_checkpoint(tiny.FILES.perceptual, "tiny").requires_grad_(False)
    entries, tokens = FrozenTokenizer(tokenizer, torch.float32, torch.float32).entries, tokenizer.encode(images)
    own, codes = entries[tokens].unflatten(1, (8, 8)), entries[drawn_codes(len(entries))]
    pixels = ((each - lpips.shift) / lpips.scale for each in (images, drawn_images(torch.device("cpu"))))
    inputs = {tokenizer.decoder: [x.permute(0, 3, 1, 2) for x in (own, codes)], lpips.features: [*pixels]}
    for network, (held_out, drawn) in inputs.items():
        bounds = ranges(network, drawn)
        for name, most in ranges(network, held_out).items():
            assert most < min(3 * bounds[name], 0.1 * LARGEST_HALF)


def test_drawn_codes_are_those_of_the_codebook() -> None:
    codes = drawn_codes(61)
    assert codes.shape == (6, 16, 16)
    assert 0 <= codes.min() < codes.max() < 61
    assert torch.equal(codes[4, :4, :4], codes[4, 0, 0].expand(4, 4))
    assert torch.equal(codes, drawn_codes(61))


def test_an_encoder_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_forms, "ranges", lambda encoder, images: {})
    tokenizer = VQTokenizer.from_name("vq-16").to("meta")
    with forms.taking(encoder="float16"):
        codec = PixelCodec(tokenizer, dtype=torch.bfloat16)
    tokens = codec.frozen.encode(torch.empty(2, 3, 384, 384, device="meta"))
    assert (tokens.shape, tokens.dtype) == ((2, 576), torch.int64)


@pytest.mark.parametrize(("tokens", "channels"), [(1, 8), (9, 48), (36, 512)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_attention_of_two_products(tokens: int, channels: int, dtype: torch.dtype) -> None:
    """On parts of one tensor, as the blocks have it; scores of up to 30, which 16 bits would round by 0.1."""
    qkv = (2.5 * torch.randn(2, tokens, 3 * channels)).to(dtype)
    qkv[..., :channels] /= channels**0.5 / 2
    q, k, v = qkv.double().chunk(3, dim=-1)
    expected = torch.stack([(q[b] @ k[b].T).softmax(-1) @ v[b] for b in range(2)])
    error = relative_l2(matmul_attention(*qkv.chunk(3, dim=-1)), expected)
    assert error < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


def test_all_forms_of_the_tokenizer_equal_the_plain_one(vq16: VQTokenizer) -> None:
    with forms.taking(wide_attention="matmul", last_convolution="eight"):
        frozen = FrozenTokenizer(vq16, torch.float64, torch.float64)
    assert len(frozen.decoder.weight_out) == 8
    assert len(frozen.encoder.weight_out) == 256
    tokens = torch.randint(0, 16384, (2, 4), generator=torch.Generator().manual_seed(6))
    decoded = frozen.decode(tokens)
    assert decoded.shape == (2, 3, 32, 32)
    assert relative_l2(decoded, vq16.decode(tokens)) < 1e-12
    images = torch.rand(1, 3, 32, 48, dtype=torch.float64) * 2 - 1
    assert torch.equal(frozen.encode(images), vq16.encode(images))


def test_an_image_of_eight_channels_is_a_view_of_three(small: VQTokenizer) -> None:
    with forms.taking(last_convolution="eight"):
        codec = PixelCodec(small)
    tokens = torch.randint(0, 61, (3, 16))
    view = codec.frozen.decode(tokens)
    assert view.stride()[1:] == (1, 8 * 8, 8)
    assert codec.decode(tokens).shape == (3, 3, 8, 8)
    assert codec.decode(tokens).clone().is_contiguous(memory_format=torch.channels_last)  # as a replay gives it


# ---- LPIPS


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_lpips_in_float16_keeps_what_would_overflow(scale: float) -> None:
    torch.manual_seed(4)
    lpips = randomised(LPIPS(LPIPS_CONFIGS["tiny"]))
    assert {each.weight.dtype for each in FrozenLPIPS(lpips, torch.float16).layers} == {torch.float16}
    second, third = (module for module in list(lpips.features)[2:7] if isinstance(module, nn.Conv2d))
    second.weight *= scale
    third.weight /= scale
    frozen = FrozenLPIPS(lpips, torch.float16)
    single = [each.weight.dtype == torch.float32 for each in frozen.layers]
    assert single == [False, True, True, True, False, False]  # the third takes in what is large, and gives it on
    images, others = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(9)) * 2 - 1
    expected = lpips.double()(others.double(), images.double())
    assert relative_l2(frozen(others[:, None], images)[:, 0], expected) < 5e-3


@pytest.mark.parametrize("name", ["vgg16", "tiny"])
def test_lpips_equals_the_plain_one(name: str) -> None:
    torch.manual_seed(2)
    lpips = randomised(LPIPS(LPIPS_CONFIGS[name]).double())
    decoded, images = torch.rand(2, 3, 3, 36, 44).double() * 2 - 1, torch.rand(2, 3, 36, 44).double() * 2 - 1
    frozen = FrozenLPIPS(lpips, torch.float64)
    for level, expected in zip(frozen.feature_maps(images), lpips.feature_maps(images), strict=True):
        assert relative_l2(level, expected) < 1e-12
    expected = torch.stack([lpips(decoded[:, g], images) for g in range(3)], dim=1)
    assert relative_l2(frozen(decoded, images), expected) < 1e-12


def test_lpips_in_bf16_is_near(tokenizer: VQTokenizer, images: Tensor) -> None:
    lpips = LPIPS.from_checkpoint(tiny.FILES.perceptual, "tiny").requires_grad_(False)
    decoded = tokenizer.decode(tokenizer.encode(images))
    distance = FrozenLPIPS(lpips, torch.bfloat16)(decoded[:, None], images)
    assert distance.dtype == torch.float32
    assert relative_l2(distance[:, 0], lpips(decoded, images).double()) < 1e-2


# ---- on a GPU


@pytest.mark.gpu
def test_vq16_on_a_gpu(vq16: VQTokenizer) -> None:
    tokens = torch.randint(0, 16384, (2, 36), generator=torch.Generator().manual_seed(3))
    expected = vq16.decode(tokens)
    model = VQTokenizer.from_name("vq-16")
    model.load_state_dict(vq16.state_dict())
    frozen = FrozenTokenizer(model.cuda(), torch.bfloat16, torch.float32)
    assert relative_l2(frozen.decode(tokens.cuda()).cpu(), expected) < 3e-2
    images = torch.rand(2, 3, 96, 96) * 2 - 1
    agreement = frozen.encode(images.cuda()).cpu() == vq16.encode(images.double())
    assert agreement.double().mean() > 0.95  # 72 tokens, TF32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("channels", "width", "side"), [(8, 64, 96), (64, 64, 96), (256, 512, 48)])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_fused_relu_convolution_ignores_old_memory(
    dtype: torch.dtype, channels: int, width: int, side: int, poison: float
) -> None:
    """cuDNN's form also adds a tensor, times zero, and PyTorch passes the result's own memory for it."""
    x = torch.randn(16, channels, side, side, dtype=dtype, device="cuda").to(memory_format=torch.channels_last)
    weight = torch.randn(width, channels, 3, 3, dtype=dtype, device="cuda").to(memory_format=torch.channels_last)
    bias = torch.randn(width, dtype=dtype, device="cuda")
    expected = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
    torch.cuda.empty_cache()
    old = [torch.full(expected.shape, poison, dtype=dtype, device="cuda") for _ in range(4)]
    places = {each.data_ptr() for each in old}
    del old
    out = conv_relu(x, weight, bias)
    assert out.data_ptr() in places
    assert relative_l2(out, expected) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_vgg16_on_a_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    lpips = randomised(LPIPS(LPIPS_CONFIGS["vgg16"]))
    decoded, images = torch.rand(2, 3, 3, 64, 80) * 2 - 1, torch.rand(2, 3, 64, 80) * 2 - 1
    expected = FrozenLPIPS(lpips.double(), torch.float64)(decoded.double(), images.double())
    frozen = FrozenLPIPS(lpips.float().cuda(), dtype)
    assert relative_l2(frozen(decoded.cuda().to(dtype), images.cuda()).cpu(), expected) < 2e-2
