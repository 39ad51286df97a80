"""The inference forms of tokenizer and LPIPS against the plain modules, in float64 wherever the CPU can."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_l2
from torch import Tensor, nn

from vapi_fast import ops, tiny
from vapi_fast.data.dataset import ImageData
from vapi_fast.kernels.launch import recorded
from vapi_fast.models import LPIPS, VQTokenizer, VQTokenizerConfig
from vapi_fast.models.frozen import FrozenLPIPS, FrozenTokenizer, conv_relu, phase_weight
from vapi_fast.models.lpips import LPIPS_CONFIGS
from vapi_fast.models.tokenizer import ResidualBlock
from vapi_fast.runtime import forms

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
    blocks = [each for each in small.modules() if isinstance(each, ResidualBlock)]
    assert launched["convolution_kernel"] == 2 * len(blocks)
    for mine, theirs, plain in zip(ours, usual, (small.decode(tokens), small.encoder(images)), strict=True):
        assert relative_l2(mine, plain.double()) < error
        assert relative_l2(mine, plain.double()) < 1.2 * relative_l2(theirs, plain.double())


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


# ---- LPIPS


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
