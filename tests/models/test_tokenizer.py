from __future__ import annotations

import re
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import save_file

from vapi_fast import ops
from vapi_fast.models import VQ_CONFIGS, VQTokenizer, VQTokenizerConfig

TOLERANCE = 1e-5  # relative L2, float32
SMALL = VQTokenizerConfig(channels=32, multipliers=(1, 1, 2), latent_channels=32, codebook_size=61)
PUBLIC_WEIGHTS = "VQ small"


def load(folder: Path, container: str) -> VQTokenizer:
    """The golden tokenizer through a file on disk, with the usage statistics that LlamaGen stores."""
    weights = golden.formula_weights(golden.public_state_dict(PUBLIC_WEIGHTS))
    assert "quantize.codebook_used" in weights
    path = folder / ("tokenizer.safetensors" if container == "safetensors" else "tokenizer.pt")
    if container == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights if container == "bare" else {container: weights}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VQ_CONFIGS, "small", SMALL)
        return VQTokenizer.from_checkpoint(path, "small").requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> VQTokenizer:
    return load(tmp_path_factory.mktemp("tokenizer"), "model")


# ---- equal to LlamaGen's public code


def test_latents_equal_the_public_code(tokenizer: VQTokenizer) -> None:
    public = golden.read("tokenizer")
    latents = tokenizer.latents(public["images"])
    assert golden.relative_error(latents, public["latents"].permute(0, 2, 3, 1)) <= TOLERANCE


@pytest.mark.parametrize("container", ["bare", "model", "module", "state_dict", "safetensors"])
def test_tokens_equal_the_public_code(container: str, tmp_path: Path) -> None:
    public = golden.read("tokenizer")
    assert torch.equal(load(tmp_path, container).encode(public["images"]), public["indices"])


def test_quantized_latents_equal_the_public_code(tokenizer: VQTokenizer) -> None:
    public = golden.read("tokenizer")
    quantized, _ = ops.vq_lookup(tokenizer.latents(public["images"]), tokenizer.quantize.embedding.weight)
    assert golden.relative_error(quantized, public["quantized"].permute(0, 2, 3, 1)) <= TOLERANCE


@pytest.mark.parametrize(("tokens", "pixels"), [("indices", "reconstruction"), ("tokens", "pixels")])
def test_decoded_pixels_equal_the_public_code(tokens: str, pixels: str, tokenizer: VQTokenizer) -> None:
    public = golden.read("tokenizer")
    assert golden.relative_error(tokenizer.decode(public[tokens]), public[pixels]) <= TOLERANCE


def test_channels_last_gives_the_same(tokenizer: VQTokenizer, tmp_path: Path) -> None:
    public = golden.read("tokenizer")
    other = load(tmp_path, "model").to(memory_format=torch.channels_last)
    images = public["images"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(other.encode(images), public["indices"])
    assert golden.relative_error(other.decode(public["tokens"]), public["pixels"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["vq-16", "vq-8"])
def test_named_tokenizers_have_the_published_weights(name: str) -> None:
    with torch.device("meta"):
        tokenizer = VQTokenizer.from_name(name)
    shapes = {key: list(value.shape) for key, value in tokenizer.state_dict().items()}
    public = golden.public_state_dict(name.upper())
    assert public.pop("quantize.codebook_used") == [65536]
    assert shapes == public


# ---- behaviour


def test_pixels_per_token() -> None:
    assert {name: config.downsample for name, config in VQ_CONFIGS.items()} == {
        "vq-16": 16,
        "vq-8": 8,
        "tiny": 4,
        "scenes": 4,
    }


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown tokenizer 'vq-4': choose one of vq-16, vq-8, tiny"):
        VQTokenizer.from_name("vq-4")


def test_tokens_are_in_row_order(tokenizer: VQTokenizer) -> None:
    """A wide image has more columns than rows: token [row, column] is entry row · columns + column."""
    wide = golden.read("tokenizer")["images"][:, :, :16]
    tokens = tokenizer.encode(wide)
    assert tokens.shape == (2, 4 * 8)
    assert tokens.dtype == torch.int64
    nearest = tokenizer.latents(wide)[1, 3, 2] @ tokenizer.codebook().T
    assert tokens[1, 3 * 8 + 2] == nearest.argmax()


def test_codebook_entries_have_unit_length(tokenizer: VQTokenizer) -> None:
    norms = tokenizer.codebook().norm(dim=-1)
    assert norms.shape == (61,)
    assert torch.allclose(norms, torch.ones(61), atol=1e-6)
    assert tokenizer.quantize.embedding.weight.norm(dim=-1).std() > 0.05  # stored as they are


def test_decoding_is_differentiable_in_the_embeddings(tokenizer: VQTokenizer) -> None:
    embeddings = tokenizer.codebook()[golden.read("tokenizer")["tokens"][:1]].requires_grad_()
    pixels = tokenizer.decode_embeddings(embeddings)
    direction = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(pixels.square().sum(), embeddings)
    with torch.no_grad():
        high, low = (tokenizer.decode_embeddings(embeddings + s * direction).square().sum() for s in (0.001, -0.001))
    assert (gradient * direction).sum().item() == pytest.approx((high - low).item() / 0.002, rel=0.02)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 30, 32), (1, 3, 32, 33)])
def test_images_of_a_wrong_size_are_refused(shape: tuple[int, ...], tokenizer: VQTokenizer) -> None:
    message = f"images must be [B,3,H,W] with H and W multiples of 4, got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenizer.encode(torch.zeros(shape))


def test_images_of_whole_numbers_are_refused(tokenizer: VQTokenizer) -> None:
    with pytest.raises(TypeError, match=r"images must be floating-point numbers in \[−1, 1\], got torch.uint8"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_tokens_that_fill_no_square_are_refused(tokenizer: VQTokenizer) -> None:
    with pytest.raises(ValueError, match=r"tokens must be \[B,T\], got \[16\]"):
        tokenizer.decode(torch.zeros(16, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens must fill a square grid: T = 15 is not a square number"):
        tokenizer.decode(torch.zeros(1, 15, dtype=torch.int64))


def test_tokens_outside_the_codebook_are_refused(tokenizer: VQTokenizer) -> None:
    with pytest.raises(ValueError, match="61"):
        tokenizer.decode(torch.full((1, 16), 61))
