"""FID-Inception-v3: TensorFlow's classifier of 2015-12-05, the network that FID, sFID and the Inception Score mean.

It differs from other Inception-v3 networks: 1008 classes, average pools that leave the padding out of the mean, a max
pool in the very last block, and pixels resized to 299² as TensorFlow 1 did. Weights are the widely used PyTorch
conversion (pytorch-fid, torch-fidelity); names and shapes here are that file's.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi_fast.evaluation.metrics import ImageFeatures
from vapi_fast.runtime.checkpoint import load_into, load_state_dict
from vapi_fast.runtime.errors import CheckpointError

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
SIDE = 299  # pixels a side that the network sees
SPATIAL_CHANNELS = 7  # of 17 × 17 positions: 2023 features, about as many as the 2048 of FID

Kernel = int | tuple[int, int]
Layer = tuple[int, Kernel]  # output channels, kernel; a list of two Layers is a fork, concatenated


class FrozenBatchNorm(nn.Module):
    """Batch norm by stored statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: Kernel, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2) if padded else 0
        self.conv = nn.Conv2d(channels, width, (rows, columns), stride, padding, bias=False)
        self.bn = FrozenBatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches of convolutions over one input, and a pooled branch, concatenated over channels.

    The layers of branch `b` are named b (a single one) or b_1, b_2, …; the two of a fork b_na and b_nb. With
    `stride=2` the last layer of each branch shrinks the map, and the pooled branch is a bare max pool.
    """

    def __init__(
        self,
        channels: int,
        branches: dict[str, list[Layer | list[Layer]]],
        *,
        pooled_width: int = 0,
        max_pool: bool = False,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.paths: list[list[list[str]]] = []
        for branch, layers in branches.items():
            width, path = channels, []
            for number, layer in enumerate(layers, start=1):
                fork = layer if isinstance(layer, list) else [layer]
                letters = ("a", "b") if len(fork) > 1 else ("",)
                shrinks = stride > 1 and number == len(layers)
                names = [branch if len(layers) == 1 else f"{branch}_{number}{letter}" for letter in letters]
                for name, (out, kernel) in zip(names, fork, strict=True):
                    self.add_module(name, Convolution(width, out, kernel, stride if shrinks else 1, not shrinks))
                width = fork[-1][0]
                path.append(names)
            self.paths.append(path)
        self.branch_pool = Convolution(channels, pooled_width, 1) if pooled_width else None
        self.max_pool, self.stride = max_pool, stride

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for path in self.paths:
            outputs = [x]
            for names in path:
                outputs = [self.get_submodule(name)(outputs[0]) for name in names]
            parts += outputs
        if self.branch_pool is None:
            parts.append(F.max_pool2d(x, 3, self.stride))
        elif self.max_pool:
            parts.append(self.branch_pool(F.max_pool2d(x, 3, 1, padding=1)))
        else:
            parts.append(self.branch_pool(F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)))
        return torch.cat(parts, dim=1)


def block_35(channels: int, pooled_width: int) -> Block:
    """A block at 35 × 35 positions."""
    branches = {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
    return Block(channels, branches, pooled_width=pooled_width)


def block_17(width: int) -> Block:
    """A block at 17 × 17 positions; `width` channels inside its 7-wide branches."""
    row, column = (1, 7), (7, 1)
    branches = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, row), (192, column)],
        "branch7x7dbl": [(width, 1), (width, column), (width, row), (width, column), (192, row)],
    }
    return Block(768, branches, pooled_width=192)


def block_8(channels: int, max_pool: bool) -> Block:
    """A block at 8 × 8 positions."""
    fork = [(384, (1, 3)), (384, (3, 1))]
    branches = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork], "branch3x3dbl": [(448, 1), (384, 3), fork]}
    return Block(channels, branches, pooled_width=192, max_pool=max_pool)


class InceptionV3(nn.Module):
    """FID-Inception-v3; always frozen and in inference form, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padded=False)
        self.Mixed_5b = block_35(192, 32)
        self.Mixed_5c = block_35(256, 64)
        self.Mixed_5d = block_35(288, 64)
        shrink_35 = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
        self.Mixed_6a = Block(288, shrink_35, stride=2)
        self.Mixed_6b = block_17(128)
        self.Mixed_6c = block_17(160)
        self.Mixed_6d = block_17(160)
        self.Mixed_6e = block_17(192)
        branch = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]
        self.Mixed_7a = Block(768, {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": branch}, stride=2)
        self.Mixed_7b = block_8(1280, max_pool=False)
        self.Mixed_7c = block_8(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> ImageFeatures:
        """Features of uint8 images `[N,3,H,W]`: pooled `[N,2048]`, spatial `[N,2023]`, logits `[N,1008]`, float32.

        `spatial` is the first 7 channels of Mixed_6d's 1×1 branch (TensorFlow's `mixed_6/conv`), as sFID takes them
        (Nash et al. 2021, arXiv 2103.03841); logits leave the bias out, as the Inception Score of the ADM evaluator.
        """
        x = (resize_like_tensorflow(pixels.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6c(self.Mixed_6b(x))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]
        x = self.Mixed_6e(self.Mixed_6d(x))
        pooled = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return ImageFeatures(pooled, spatial.permute(0, 2, 3, 1).flatten(1), F.linear(pooled, self.fc.weight))

    def image_features(self, images: Tensor) -> ImageFeatures:
        """`forward` of images `[N,3,H,W]` in [−1, 1], seen as 8-bit."""
        return self((images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8))


def resize_like_tensorflow(x: Tensor, side: int) -> Tensor:
    """Images `[N,C,H,W]` → `[N,C,side,side]` as TensorFlow 1's `resize_bilinear`: pixel corners, not centres, align.

    Output position i lies at input position i · H / side, computed in float32; columns are blended before rows.
    """
    for dim in (3, 2):
        length = x.shape[dim]
        position = torch.arange(side, dtype=torch.float32, device=x.device) * torch.tensor(length / side)
        low = position.long()
        high = (low + 1).clamp(max=length - 1)
        share = (position - low).view(-1, *[1] * (3 - dim))
        start = x.index_select(dim, low)
        x = start + (x.index_select(dim, high) - start) * share
    return x


def load_inception(weights: str | Path | None = None) -> InceptionV3:
    """The network with the weights at `weights`, or with torch.hub's cached copy, downloaded where there is none.

    Raises CheckpointError when the file is missing, damaged or of another network, or cannot be downloaded.
    """
    if weights is not None:
        return inception_from_state(load_state_dict(weights), weights)
    place = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(INCEPTION_URL)
    try:
        state = torch.hub.load_state_dict_from_url(
            INCEPTION_URL, map_location="cpu", weights_only=True, check_hash=True
        )
    except (URLError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"FID needs the Inception weights and {INCEPTION_URL} cannot be downloaded ({reason}): fetch that file on "
            f"a machine that is online and pass --inception-weights FILE, or put it at {place}"
        ) from error
    return inception_from_state(state, place)


def inception_from_state(state: dict[str, Tensor], source: str | Path) -> InceptionV3:
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    network = InceptionV3()
    load_into(network, state, source, hint=f"pass the file {os.path.basename(INCEPTION_URL)}")
    return network.eval()
