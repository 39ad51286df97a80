"""Patched tokenizers and LPIPS give the same; forks of them, and parts that change later, are right or left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import public_models
import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_l2
from forks import ClampedDistance, ClampedImage, ClampedImages, ClampedPixels, OwnEntries, TiledDecoder, TiledEncoder
from public_models import LPIPS, VQModel, randomised
from torch import Tensor, nn

from vapi_fast import ops, patch_lpips, patch_tokenizer
from vapi_fast.patch import as_tokenizer


@pytest.fixture
def vq_model() -> VQModel:
    return randomised(VQModel()).eval()


def tokenizer_results(vq_model: VQModel) -> list[Any]:
    """Codes, tokens and images in evaluation; losses, usage and gradients of a training step."""
    torch.manual_seed(4)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    vq_model.eval()
    with torch.no_grad():
        codes, losses, (_, _, indices) = vq_model.encode(images)
        decoded = [vq_model.decode(codes), vq_model.decode_code(indices.int().view(2, -1), (2, 8, 4, 4))]
        vq_model.train()
    torch.manual_seed(5)
    reconstructed, (*terms, usage) = vq_model(images)
    loss = (reconstructed - images).square().mean() + sum(terms)
    return [
        codes,
        *losses,
        indices,
        *decoded,
        *terms,
        usage,
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*vq_model.parameters()])]),
        vq_model.quantize.codebook_used,
    ]


@pytest.mark.parametrize("entropy_loss_ratio", [0.0, 0.1])
def test_a_patched_tokenizer_gives_the_same(entropy_loss_ratio: float) -> None:
    vq_model = randomised(VQModel(entropy_loss_ratio))
    twin = copy.deepcopy(vq_model)
    expected = tokenizer_results(twin)
    patched = patch_tokenizer(vq_model)
    assert len(patched.replaced) == 25
    assert list(vq_model.state_dict()) == list(twin.state_dict())
    actual = tokenizer_results(vq_model)
    assert [type(x) for x in actual] == [type(x) for x in expected]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    patched.unpatch()
    assert not any(name in m.__dict__ for m in vq_model.modules() for name in ("forward", "get_codebook_entry"))


def test_upsampling_follows_every_change_of_its_weight(vq_model: VQModel) -> None:
    """Also those that no version counter sees; and a gradient goes through a frozen decoder."""
    codes = torch.randn(2, 8, 4, 4)
    twin = copy.deepcopy(vq_model).requires_grad_(False)
    patch_tokenizer(vq_model.requires_grad_(False))
    for _ in range(2):
        inputs = [codes.clone().requires_grad_() for _ in range(2)]
        images = [m.decode(x) for m, x in zip((vq_model, twin), inputs, strict=True)]
        torch.testing.assert_close(*images, rtol=1e-4, atol=1e-5)
        assert images[0].is_contiguous()
        found = [torch.autograd.grad(y.sin().sum(), x)[0] for x, y in zip(inputs, images, strict=True)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
        for m in (vq_model, twin):
            m.decoder.conv_blocks[0].upsample.conv.weight.data.mul_(-0.5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_keeps_the_layout(vq_model: VQModel, layout: torch.memory_format) -> None:
    """Dropout in the blocks that follow draws in the order of memory."""
    patch_tokenizer(vq_model)
    attention, seen = vq_model.encoder.mid[1], []
    attention.proj_out.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    attention(torch.randn(2, 16, 4, 4).to(memory_format=layout))
    assert seen[0].is_contiguous(memory_format=layout)


def test_upsampling_trains_by_the_original(vq_model: VQModel) -> None:
    patch_tokenizer(vq_model)
    upsample = vq_model.decoder.conv_blocks[0].upsample
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(upsample(x), type(upsample).forward(upsample, x))
    with torch.no_grad():
        assert not torch.equal(upsample(x), type(upsample).forward(upsample, x))  # rounded in another order
        last = upsample(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_a_patched_tokenizer_encodes_exactly_under_autocast(vq_model: VQModel) -> None:
    """The same dtypes; the lookup, which autocast would do in bf16, is that of the latents as they come."""
    z = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)
    expected = vq_model.quantize(z.float())
    patch_tokenizer(vq_model)
    with torch.autocast("cpu", torch.bfloat16):
        codes, _, (_, _, indices) = vq_model.quantize(z)
        assert vq_model.decode(codes).dtype == torch.bfloat16
    assert codes.dtype == torch.float32
    assert torch.equal(indices, expected[2][2])


class ThreeLosses(public_models.VectorQuantizer):
    """As the copy of this class in Janus, which does not return the usage."""

    def forward(self, z: Tensor) -> tuple[Any, ...]:
        codes, losses, found = super().forward(z)
        return codes, losses[:3], found


class LinearUpsample(public_models.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))


def test_a_forks_tokenizer_parts_are_named_and_left_alone(vq_model: VQModel) -> None:
    vq_model.quantize = ThreeLosses(40, 8, 0.25, 0.0)
    vq_model.decoder.conv_blocks[0].upsample = LinearUpsample(16)
    vq_model.encoder.mid[0].norm2 = nn.BatchNorm2d(16)
    images = torch.randn(1, 3, 8, 8)
    expected = vq_model.eval()(images)
    with pytest.warns(UserWarning, match="left 3 of 25 modules"):
        left = patch_tokenizer(vq_model).left_alone
    assert set(left) == {"quantize", "decoder.conv_blocks.0.upsample", "encoder.mid.0"}
    torch.testing.assert_close(vq_model(images), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="this VQModel is not LlamaGen's as we know it"):
        as_tokenizer(vq_model)


def test_patched_lpips_gives_the_same() -> None:
    lpips = randomised(LPIPS()).eval()
    a, b = torch.rand(2, 2, 3, 16, 16) * 2 - 1

    def results() -> list[Tensor]:
        x = a.clone().requires_grad_()
        distance = lpips.eval()(x, b)
        torch.manual_seed(6)
        return [distance, torch.autograd.grad(distance.sum(), x)[0], lpips.train()(a, b)]

    expected = results()
    with patch_lpips(lpips) as patched:
        torch.testing.assert_close(results(), expected, rtol=1e-5, atol=1e-6)
        assert patched.replaced == {"model": "distance → ops.lpips_distance"}
        black = torch.zeros(1, 3, 16, 16, requires_grad=True)
        with torch.no_grad():
            lpips.net.slice1[0].bias.fill_(-100)  # features that are all zero: the original's gradient is NaN
        lpips.eval()(black, torch.ones(1, 3, 16, 16)).sum().backward()
        assert black.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        dtype = lpips(a, b).dtype
        assert patch_lpips(lpips).replaced
        assert lpips(a, b).dtype == dtype


class ClampedLatents(public_models.VectorQuantizer):
    def forward(self, z: Tensor) -> tuple[Any, ...]:
        return super().forward(z.clamp(-5, 5))


class ClampedBlock(public_models.ResnetBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(public_models.swish(self.norm1(x)).clamp(-20, 20))
        h = self.conv2(self.dropout(public_models.swish(self.norm2(h))))
        return (x if self.in_channels == self.out_channels else self.nin_shortcut(x)) + h


class ClampedValues(public_models.AttnBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).mT for part in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v.clamp(-9, 9))
        return x + self.proj_out(out.mT.reshape(x.shape))


class ClampedUpsample(public_models.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-20, 20)


class TiledUpsample(public_models.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(TiledUpsample, self).forward(part) for part in x.split(16, -1)], -1)


class AnotherEpsilon(public_models.ResnetBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = F.group_norm(x, self.norm1.num_groups, self.norm1.weight, self.norm1.bias, 1e-5)
        h = self.conv1(public_models.swish(h))
        h = self.conv2(self.dropout(public_models.swish(self.norm2(h))))
        return (x if self.in_channels == self.out_channels else self.nin_shortcut(x)) + h


UPSAMPLE = "decoder.conv_blocks.0.upsample"


@pytest.mark.parametrize(
    ("path", "fork", "why"),
    [
        ("quantize", ClampedLatents, "large values"),
        ("encoder", ClampedPixels, "large values"),
        ("decoder", ClampedImage, "large values"),
        ("encoder.mid.0", ClampedBlock, "large values"),
        ("encoder.mid.1", ClampedValues, "large values"),
        (UPSAMPLE, ClampedUpsample, "large values"),
        ("encoder", TiledEncoder, "a wide map"),
        ("decoder", TiledDecoder, "a wide map"),
        (UPSAMPLE, TiledUpsample, "a wide map"),
        ("decoder.mid.2", AnotherEpsilon, "a map"),
        ("quantize", OwnEntries, "entries"),
    ],
)
def test_a_fork_that_differs_in_one_case_is_left_alone(
    vq_model: VQModel, path: str, fork: type[nn.Module], why: str
) -> None:
    vq_model.get_submodule(path).__class__ = fork
    with pytest.warns(UserWarning, match="left 1 of 25 modules"):
        left = patch_tokenizer(vq_model).left_alone
    assert list(left) == [path]
    assert left[path].startswith(f"computes something else than LlamaGen's ({why} in evaluation mode: ")


class DoubledNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_parts_of_another_kind_are_named(vq_model: VQModel) -> None:
    vq_model.encoder.norm_out.__class__ = DoubledNorm
    vq_model.encoder.mid[0].norm2.__class__ = DoubledNorm
    vq_model.get_submodule(UPSAMPLE).conv.padding_mode = "circular"
    with pytest.warns(UserWarning, match="left 3 of 25 modules"):
        left = patch_tokenizer(vq_model).left_alone
    assert left == {
        "encoder": "is not of LlamaGen's kind: norm_out is a DoubledNorm, not a GroupNorm",
        "encoder.mid.0": "is not of LlamaGen's kind: norm2 is a DoubledNorm, not a GroupNorm",
        UPSAMPLE: "is not of LlamaGen's kind: conv is not a plain 3×3 convolution",
    }


class Adapter(nn.Module):
    """A layer around a convolution that shows its weight, as adapters do."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.base_layer(x)


class AdaptedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def changed(**attributes: Any) -> Callable[[nn.Module], nn.Module]:
    def change(module: nn.Module) -> nn.Module:
        for name, value in attributes.items():
            setattr(module, name, value)
        return module

    return change


def new_conv(**changes: Any) -> Callable[[nn.Conv2d], nn.Module]:
    return lambda conv: randomised(nn.Conv2d(16, 16, **({"kernel_size": 3, "padding": 1} | changes)))


@pytest.mark.parametrize(
    "change",
    [
        Adapter,
        changed(__class__=AdaptedConv),
        changed(padding_mode="circular"),  # as is done to draw pictures that tile
        new_conv(kernel_size=5),
        new_conv(stride=2),
        new_conv(padding=2),
        new_conv(dilation=2, padding=1),
        new_conv(groups=4),
        new_conv(bias=False),
    ],
)
@torch.no_grad()
def test_upsampling_follows_a_change_of_its_convolution(
    vq_model: VQModel, change: Callable[[nn.Conv2d], nn.Module]
) -> None:
    assert patch_tokenizer(vq_model).replaced[UPSAMPLE].endswith("2×2 convolutions, once frozen")
    upsample, x = vq_model.get_submodule(UPSAMPLE), uniform(2, 16, 6, 6)
    before = upsample(x)
    upsample.conv = change(upsample.conv)
    after = upsample(x)
    torch.testing.assert_close(after, type(upsample).forward(upsample, x), rtol=1e-4, atol=1e-5)
    assert after.shape != before.shape or relative_l2(after, before) > 0.01


def without_weight(norm: nn.GroupNorm) -> nn.GroupNorm:
    return nn.GroupNorm(norm.num_groups, norm.num_channels, affine=False)


def batch_norm(norm: nn.GroupNorm) -> nn.BatchNorm2d:
    return randomised(nn.BatchNorm2d(norm.num_channels)).eval()


@pytest.mark.parametrize("change", [changed(eps=5.0), changed(__class__=DoubledNorm), without_weight, batch_norm])
@torch.no_grad()
def test_norms_may_change_after_patching(vq_model: VQModel, change: Callable[[nn.GroupNorm], nn.Module]) -> None:
    twin, images = copy.deepcopy(vq_model).eval(), uniform(1, 3, 8, 8)
    before = twin.decoder(twin.encoder(images))
    patch_tokenizer(vq_model.eval())
    for model in (twin, vq_model):
        model.encoder.mid[0].norm2 = change(model.encoder.mid[0].norm2)
        model.decoder.norm_out = change(model.decoder.norm_out)
    expected, actual = (model.decoder(model.encoder(images)) for model in (twin, vq_model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert relative_l2(before, expected) > 0.01


def test_a_training_step_keeps_the_codebooks_usage(vq_model: VQModel) -> None:
    """In the buffer that LlamaGen has, a parameter: its own step cannot write there on a CPU."""
    patch_tokenizer(vq_model.eval())
    vq_model.quantize.train()
    used = vq_model.quantize.codebook_used
    for _ in range(2):
        _, (*_, usage), (_, _, indices) = vq_model.encode(uniform(2, 3, 8, 8))
    assert vq_model.state_dict()["quantize.codebook_used"].shape == (65536,)
    assert vq_model.quantize.codebook_used is used
    assert isinstance(used, nn.Parameter)
    assert torch.equal(used[-2 * len(indices) :].detach(), indices.repeat(2).float())
    assert usage == len({0, *indices.tolist()}) / 40


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def lpips() -> LPIPS:
    return randomised(LPIPS()).eval()


class WithArguments(LPIPS):
    def forward(self, in0: Tensor, in1: Tensor, retPerLayer: bool = False, normalize: bool = False) -> Tensor:
        return super().forward(2 * in0 - 1, 2 * in1 - 1) if normalize else super().forward(in0, in1)


@pytest.mark.parametrize(
    ("fork", "why"),
    [
        (WithArguments, r"its forward takes \(in0, in1, retPerLayer=False, normalize=False\), LlamaGen's takes "),
        (ClampedImages, "something else than LlamaGen's .large values in evaluation mode"),
        (ClampedDistance, "something else than LlamaGen's .large values in evaluation mode"),
    ],
)
def test_a_fork_of_lpips_is_left_alone(lpips: LPIPS, fork: type[LPIPS], why: str) -> None:
    lpips.__class__ = fork
    with pytest.warns(UserWarning, match=f"left 1 of 1 modules .*{why}"):
        assert not patch_lpips(lpips).replaced


@pytest.mark.parametrize("counts", [(3, 1), (1, 3)])
def test_lpips_of_one_image_and_many(lpips: LPIPS, counts: tuple[int, int]) -> None:
    a, b = uniform(4, 3, 16, 16).split(counts)

    def results() -> list[Tensor]:
        images = [x.clone().requires_grad_() for x in (a, b)]
        distance = lpips(*images)
        return [distance, *torch.autograd.grad(distance.square().sum(), images)]

    expected, runs, operation = results(), [], ops.lpips_distance
    assert patch_lpips(lpips).replaced
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ops, "lpips_distance", lambda *given: (runs.append(1), operation(*given))[1])
        torch.testing.assert_close(results(), expected, rtol=1e-4, atol=1e-6)
    assert expected[0].shape == (3, 1, 1, 1)
    assert runs


class DoubledHead(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_bias(head: nn.Sequential) -> nn.Module:
    return nn.Sequential(head[0], changed(bias=nn.Parameter(torch.ones(1)))(head[-1]))


def with_adapter(head: nn.Sequential) -> nn.Module:
    return nn.Sequential(head[0], changed(__class__=AdaptedConv)(head[-1]))


def with_blur(head: nn.Sequential) -> nn.Module:
    return nn.Sequential(head[0], randomised(nn.Conv2d(head[-1].in_channels, 1, 3, padding=1, bias=False)))


def with_softplus(head: nn.Sequential) -> nn.Module:
    return nn.Sequential(nn.Softplus(), *head)


@pytest.mark.parametrize("change", [changed(__class__=DoubledHead), with_bias, with_adapter, with_blur, with_softplus])
@torch.no_grad()
def test_linear_layers_of_lpips_that_do_more_are_called(
    lpips: LPIPS, change: Callable[[nn.Sequential], nn.Module]
) -> None:
    a, b = uniform(2, 1, 3, 16, 16)
    twin, before = copy.deepcopy(lpips), lpips(a, b)
    patch_lpips(lpips)
    for model in (lpips, twin):
        model.lin1.model = change(model.lin1.model).eval()
    expected = twin(a, b)
    torch.testing.assert_close(lpips(a, b), expected, rtol=1e-4, atol=1e-5)
    assert relative_l2(before, expected) > 0.01
    with pytest.warns(UserWarning, match="its linear layers are not 1×1 convolutions without bias, after dropout"):
        assert patch_lpips(twin).left_alone
