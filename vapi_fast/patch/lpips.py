"""`patch_lpips`: the distance of a live `LPIPS`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from vapi_fast import ops

from .cases import LOUD, Method
from .modules import hooked, replaces
from .patching import Candidate, Patch, checked_root
from .recognition import Case, uniform

NEEDED = ("scaling_layer", "net", "lin0")
SIDE = 16  # of the images compared: one pixel at VGG16's lowest resolution


def patch_lpips(model: nn.Module) -> Patch:
    """Run `ops.lpips_distance` in LlamaGen's `LPIPS`, on the features of its own network.

    The same distances `[B,1,1,1]` and gradients (finite also at an all-zero feature vector, where the original's is
    NaN), parameters and state dict. In training mode with dropout in front of its linear layers the original runs.

    Returns:
        the Patch: `.report()` names what was replaced or not recognised, and it is a context manager.

    Raises:
        TypeError: not a `torch.nn.Module`.
        ValueError: not of the structure of LlamaGen's LPIPS.
    """
    root = checked_root("patch_lpips", model, NEEDED)
    patch = Patch("patch_lpips", model)
    patch.replace("", Candidate("distance → ops.lpips_distance", (distance,), functools.partial(cases, root)))
    return patch.finished()


@replaces("forward")
def distance(self: nn.Module, input: Tensor, target: Tensor) -> Tensor:
    heads = [getattr(self, f"lin{level}").model for level in range(len(self.chns))]
    if not all(is_weighted_sum(head) and not has_effect(head) for head in heads):
        return type(self).forward(self, input, target)
    features = (self.net(self.scaling_layer(images)) for images in (input, target))
    # As in the original, one image may be held against many.
    maps, others = zip(*map(torch.broadcast_tensors, *features), strict=True)
    d = ops.lpips_distance(maps, others, [head[-1].weight.flatten() for head in heads])
    return d.to(maps[0].dtype).view(-1, 1, 1, 1)


def is_weighted_sum(head: nn.Module) -> bool:
    """Whether a linear layer is nothing but dropout and a weight that can be read here."""
    if type(head).forward is not nn.Sequential.forward:
        return False
    *dropouts, conv = head
    if any(type(layer).forward is not nn.Dropout.forward for layer in dropouts):
        return False
    return type(conv).forward is nn.Conv2d.forward and conv.bias is None and conv.weight.shape[2:] == (1, 1)


def has_effect(head: nn.Sequential) -> bool:
    """Whether it does more now than to weigh: drops, or runs hooks."""
    *dropouts, _ = head
    return any(map(hooked, (head, *head))) or any(layer.training and layer.p for layer in dropouts)


def cases(model: nn.Module) -> list[Case]:
    def forward(method: Method, twin: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return method(twin, a, b)

    def loud(method: Method, twin: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        for level in range(len(twin.chns)):
            conv = getattr(twin, f"lin{level}").model[-1]
            conv.weight = nn.Parameter(LOUD * conv.weight.detach())
        return method(twin, LOUD * a, LOUD * b)

    if not all(is_weighted_sum(getattr(model, f"lin{level}").model) for level in range(len(model.chns))):
        raise TypeError("its linear layers are not 1×1 convolutions without bias, after dropout")
    shape = (1, model.scaling_layer.shift.numel(), SIDE, SIDE)
    images = uniform("a", shape, -1, 1), uniform("b", shape, -1, 1)
    return [Case("two images", images, forward), Case("large values", images, loud, (False,))]
