"""Views are made of models that compute as ours do, and of no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import public_models
import pytest
import torch
import torch.nn.functional as F
from forks import (
    CappedLogits,
    ClampedDistance,
    ClampedGate,
    ClampedImage,
    ClampedImages,
    ClampedPixels,
    OwnEntries,
    SlidingWindow,
    TiledDecoder,
    TiledEncoder,
)
from public_models import LPIPS, Transformer, VQModel, randomised
from torch import Tensor, nn

from vapi_fast.patch import as_llamagen, as_lpips, as_tokenizer, views

CAPTIONS = {"model_type": "t2i", "cls_token_num": 3}
View = Callable[[nn.Module], nn.Module]


def test_views_are_our_models_on_the_same_parameters() -> None:
    model, vq_model, lpips = (randomised(kind()).eval() for kind in (Transformer, VQModel, LPIPS))
    view = as_llamagen(model)
    tokens, condition = torch.randint(model.vocab_size, (3, model.block_size)), torch.tensor([1, 0, 4])
    logits = model(tokens[:, :-1], condition, torch.arange(model.block_size))[0]
    torch.testing.assert_close(view(tokens[:, :-1], condition), logits, rtol=1e-5, atol=1e-5)
    assert view.output.weight is model.output.weight
    view(tokens[:, :-1], condition).logsumexp(-1).sum().backward()
    assert model.layers[0].attention.wqkv.weight.grad.abs().sum() > 0

    images = torch.rand(2, 3, 8, 8)
    tokenizer = as_tokenizer(vq_model)
    indices = vq_model.encode(images)[2][2].view(2, -1)
    assert torch.equal(tokenizer.encode(images), indices)
    decoded = vq_model.decode_code(indices, (2, 8, 4, 4))
    torch.testing.assert_close(tokenizer.decode(indices), decoded, rtol=1e-4, atol=1e-5)

    images_b = torch.rand(2, 3, 8, 8)
    expected = lpips(images, images_b).flatten()
    torch.testing.assert_close(as_lpips(lpips)(images, images_b), expected, rtol=1e-5, atol=1e-6)


def in_place_of(path: str, fork: type[nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_submodule(path).__class__ = fork

    return change


def for_each(kind: type[nn.Module], **changes: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, kind):
                module.__dict__.update(changes)

    return change


class AnotherNorm(public_models.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        self.eps = 1e-6
        return super().forward(x)


class ShiftedTokens(public_models.VectorQuantizer):
    def forward(self, z: Tensor) -> tuple[Any, ...]:
        z_q, losses, (_, _, indices) = super().forward(z)
        return z_q, losses, (None, None, (indices + 1) % self.n_e)


@pytest.mark.parametrize(
    ("view", "model", "change"),
    [
        (as_llamagen, Transformer, in_place_of("", CappedLogits)),
        (as_llamagen, Transformer, in_place_of("layers.1.attention", SlidingWindow)),
        (as_llamagen, Transformer, in_place_of("layers.0.feed_forward", ClampedGate)),
        (as_llamagen, Transformer, in_place_of("layers.0.attention_norm", AnotherNorm)),
        (as_tokenizer, VQModel, in_place_of("encoder", TiledEncoder)),
        (as_tokenizer, VQModel, in_place_of("decoder", TiledDecoder)),
        (as_tokenizer, VQModel, in_place_of("encoder", ClampedPixels)),
        (as_tokenizer, VQModel, in_place_of("decoder", ClampedImage)),
        (as_tokenizer, VQModel, in_place_of("quantize", ShiftedTokens)),
        (as_tokenizer, VQModel, in_place_of("quantize", OwnEntries)),
        (as_tokenizer, VQModel, for_each(nn.GroupNorm, eps=1e-5)),
        (as_lpips, LPIPS, in_place_of("", ClampedImages)),
        (as_lpips, LPIPS, in_place_of("", ClampedDistance)),
    ],
)
def test_a_fork_is_refused(view: View, model: type[nn.Module], change: Callable[[nn.Module], None]) -> None:
    fork = model(block_size=16) if model is Transformer else model()
    view(fork)
    change(fork)
    with pytest.raises(ValueError, match="on the same random weights it gives something else"):
        view(fork)


def test_another_epsilon_of_the_last_norm_is_refused() -> None:
    """It hardly shows in the logits."""
    model = randomised(Transformer())
    model.norm.eps = 1e-6
    with pytest.raises(ValueError, match="norm_eps is 1e-06, ours is 1e-05"):
        as_llamagen(model)


def test_captions_with_one_position_are_viewed() -> None:
    model = randomised(Transformer(**(CAPTIONS | {"cls_token_num": 1}))).eval()
    view, tokens, captions = as_llamagen(model), torch.arange(8)[None], torch.ones(1, 1, 12)
    logits, _ = model(tokens, captions, torch.arange(9))
    torch.testing.assert_close(view(tokens, captions), logits, rtol=1e-5, atol=1e-5)


class Activated(public_models.FeedForward):
    """With a function among its attributes, as forks have."""

    act = staticmethod(F.silu)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(self.act(self.w1(x)) * self.w3(x)))


def forks() -> list[Transformer]:
    found = [Transformer(), Transformer()]
    for model in found:
        for layer in model.layers:
            layer.feed_forward.__class__ = Activated
    found[1].layers[0].feed_forward.act = F.gelu
    return found


def test_what_one_model_computes_says_nothing_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    like_ours, other = forks()
    as_llamagen(like_ours)
    with pytest.raises(ValueError, match="something else"):
        as_llamagen(other)
    like_ours.layers[1].feed_forward.act = F.gelu
    with pytest.raises(ValueError, match="something else"):
        as_llamagen(like_ours)
    like_ours.layers[1].feed_forward.act = F.silu
    as_llamagen(like_ours)
    monkeypatch.setattr(Activated, "forward", lambda self, x: self.w2(F.gelu(self.w1(x)) * self.w3(x)))
    with pytest.raises(ValueError, match="something else"):
        as_llamagen(like_ours)


def test_a_model_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs, results = Transformer(), [], views.llamagen_results
    monkeypatch.setattr(views, "llamagen_results", lambda twin: (runs.append(1), results(twin))[1])
    for _ in range(3):
        as_llamagen(model)
    assert len(runs) == 1
    randomised(model)  # weights do not matter
    as_llamagen(model)
    assert len(runs) == 1
    del model
    as_llamagen(Transformer())
    assert len(runs) == 2


def test_gradients_reach_the_linear_layers_of_lpips() -> None:
    lpips = randomised(LPIPS()).eval()
    view = as_lpips(lpips)
    a, b = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    heads = [lpips.lin0.model[-1].weight, lpips.lin1.model[-1].weight]
    assert list(view.heads.parameters()) == heads
    expected = torch.autograd.grad(lpips(a, b).square().sum(), heads)
    view(a, b).square().sum().backward()
    torch.testing.assert_close([head.grad for head in heads], list(expected))
    heads[0].data = heads[0].data * 3  # another tensor, which the view follows
    torch.testing.assert_close(view(a, b), lpips(a, b).flatten())


@pytest.mark.parametrize(("view", "model"), [(as_llamagen, Transformer), (as_tokenizer, VQModel), (as_lpips, LPIPS)])
def test_a_model_without_weights_is_refused(view: View, model: type[nn.Module]) -> None:
    with pytest.raises(
        ValueError, match=rf"^{view.__name__}: the model is on the meta device: load its weights first$"
    ):
        view(model().to("meta"))


def test_rotary_positions_that_are_still_on_the_meta_device() -> None:
    model = Transformer()
    model.freqs_cis = model.freqs_cis.to("meta")  # no buffer: to_empty and load_state_dict leave it there
    with pytest.raises(ValueError, match="as_llamagen: the model is on the meta device"):
        as_llamagen(model)


def test_a_class_takes_one_position() -> None:
    with pytest.raises(ValueError, match=r"as_llamagen: .*: cls_token_num is 2, ours is 1"):
        as_llamagen(Transformer(cls_token_num=2))
