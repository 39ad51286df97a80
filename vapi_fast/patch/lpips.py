"""`patch_lpips`: the distance of a live `LPIPS`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vapi_fast import ops

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
    drops = any(isinstance(layer, nn.Dropout) and layer.training and layer.p for head in heads for layer in head)
    if drops or any(hooked(layer) for head in heads for layer in (head, *head)):
        return type(self).forward(self, input, target)
    maps, others = (list(self.net(self.scaling_layer(images))) for images in (input, target))
    d = ops.lpips_distance(maps, others, [head[-1].weight.flatten() for head in heads])
    return d.to(maps[0].dtype).view(-1, 1, 1, 1)


def cases(model: nn.Module) -> list[Case]:
    def forward(method: Callable[..., Any], twin: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return method(twin, a, b)

    shape = (1, model.scaling_layer.shift.numel(), SIDE, SIDE)
    return [Case("two images", (uniform("a", shape, -1, 1), uniform("b", shape, -1, 1)), forward)]
