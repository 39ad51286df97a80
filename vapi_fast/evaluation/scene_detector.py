"""Which object, in which color, is in each cell of a scene: what GenEval's rules judge the text presets' images by."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast.data.scenes import CELLS, KINDS, PAINTS, SIDE
from vapi_fast.evaluation.geneval_detections import Found
from vapi_fast.runtime.checkpoint import load_into, load_state_dict

WIDTHS = (32, 48, 64, 96, 96)
NONE = len(KINDS)  # the class of a cell without an object


class SceneDetector(nn.Module):
    """A convolutional classifier of the four cells, with weights of its own: not those that the reward sees by."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for place, width in enumerate(WIDTHS):  # 32, 16, 8, 4, 2 positions a side
            layers += [nn.Conv2d(before, width, 3, stride=1 if place == 0 else 2, padding=1), nn.ReLU()]
            before = width
        self.layers = nn.Sequential(*layers)
        self.kinds = nn.Conv2d(before, len(KINDS) + 1, 1)
        self.paints = nn.Conv2d(before, len(PAINTS), 1)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> SceneDetector:
        """Raises CheckpointError for a file that is missing, damaged or another network's."""
        model = cls()
        load_into(model, load_state_dict(path), path, hint="pass the detector of the text presets")
        return model.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[N,3,32,32]` in [−1, 1] → logits of kinds `[N,4,K+1]`, the last "none", and of paints `[N,4,11]`."""
        states = self.layers(images)
        kinds, paints = (head(states).flatten(2).transpose(1, 2) for head in (self.kinds, self.paints))
        return kinds, paints

    @torch.no_grad()
    def objects(self, images: Tensor) -> list[list[Found]]:
        """What is in each image: a cell's likeliest object by its probability, with the cell's box and its color.

        None for the color of an object that has its own ones."""
        kinds, paints = self(images)
        scores, names = F.softmax(kinds.float(), dim=-1).max(-1)
        colors = paints.argmax(-1)
        return [
            [
                Found(KINDS[name], score, cell_box(cell), PAINTS[color])
                for cell, (name, score, color) in enumerate(zip(*each, strict=True))
                if name != NONE
            ]
            for each in zip(names.tolist(), scores.tolist(), colors.tolist(), strict=True)
        ]


def cell_box(cell: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom in pixels."""
    row, column = divmod(cell, 2)
    return (float(column * SIDE), float(row * SIDE), float((column + 1) * SIDE), float((row + 1) * SIDE))


assert CELLS == 4
