"""LPIPS: the perceptual distance of the reward (Zhang et al., 2018), on VGG16, AlexNet or the tiny preset's network."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import torch
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.runtime.checkpoint import load_file_checked, load_into, load_state_dict
from vapi_fast.runtime.errors import CheckpointError
from vapi_fast.runtime.packages import require

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


class Published(NamedTuple):
    """Where a network's weights come from: torchvision's backbone, and the heads beside torchmetrics."""

    called: str
    url: str
    heads: str

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]


PUBLISHED = {
    "vgg16": Published("VGG16", VGG16_URL, "vgg.pth"),
    "alex": Published("AlexNet", ALEXNET_URL, "alex.pth"),
}


@dataclass(frozen=True)
class LPIPSConfig:
    """`levels`: (channels, convolutions) of each resolution; features are taken after each level's last ReLU.

    kernels: (side, stride, padding) of each level's convolutions; none given: 3×3, padded by one.
    pools: sides of the poolings before each level, which halve; 0: none before it; none given: 2 before all but the
        first.
    """

    levels: tuple[tuple[int, int], ...]
    classes: int = 0  # > 0 adds a linear classifier on the pooled last level
    kernels: tuple[tuple[int, int, int], ...] = ()
    pools: tuple[int, ...] = ()

    def kernel(self, level: int) -> tuple[int, int, int]:
        return self.kernels[level] if self.kernels else (3, 1, 1)

    def pool(self, level: int) -> int:
        return self.pools[level] if self.pools else 2 * (level > 0)

    def sides(self, image: int) -> list[int]:
        """Pixels a side of each level's map, of an image's."""
        found = []
        for level, (_, convolutions) in enumerate(self.levels):
            if pool := self.pool(level):
                image = (image - pool) // 2 + 1
            kernel, stride, padding = self.kernel(level)
            for _ in range(convolutions):
                image = (image + 2 * padding - kernel) // stride + 1
            found.append(image)
        return found


LPIPS_CONFIGS = {
    "vgg16": LPIPSConfig(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))),
    "alex": LPIPSConfig(
        ((64, 1), (192, 1), (384, 1), (256, 1), (256, 1)),
        kernels=((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1)),
        pools=(0, 3, 3, 0, 0),
    ),
    "tiny": LPIPSConfig(((32, 2), (64, 2), (128, 2)), classes=9),
    "scenes": LPIPSConfig(((24, 2), (48, 2), (96, 2)), classes=24),
}


class LPIPS(nn.Module):
    """Perceptual distance d(a, b) = Σ_levels mean_{h,w} Σ_c w_c (â_c − b̂_c)², with â, b̂ unit-normalised over channels.

    Images `[B,3,H,W]` in [−1, 1]. The backbone's weights are named as in torchvision's networks (`features.N.weight`).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: LPIPSConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        self.taps = []  # index of each level's last ReLU
        channels = 3
        for level, (width, convolutions) in enumerate(config.levels):
            if pool := config.pool(level):
                layers.append(nn.MaxPool2d(pool, 2))
            kernel, stride, padding = config.kernel(level)
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU()]
                channels = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.smallest_side = next(side for side in itertools.count(1) if min(config.sides(side)) > 0)  # pixels
        # Unit weights make each level's term 2 − 2·cos; published networks get their own heads.
        self.heads = nn.ParameterList(torch.full((width,), 1.0 / len(config.levels)) for width, _ in config.levels)
        self.classifier = nn.Linear(channels, config.classes) if config.classes else None
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    @classmethod
    def from_name(cls, name: str) -> LPIPS:
        """`vgg16` or `alex` with published weights (downloads the backbone by torch.hub), or `tiny` with random ones.

        Raises:
            CheckpointError: the backbone's weights can neither be found nor downloaded.
        """
        if name in PUBLISHED:
            return with_heads(name, download_backbone(name), PUBLISHED[name].url)
        return cls(lpips_config(name))

    @classmethod
    def from_checkpoint(cls, path: str | Path, name: str) -> LPIPS:
        """`vgg16`, `alex`: `path` is torchvision's file, the heads are torchmetrics'. `tiny`: one file holds all."""
        if name in PUBLISHED:
            return with_heads(name, load_state_dict(path), path)
        model = cls(lpips_config(name))
        load_into(model, load_state_dict(path), path, hint=f"pass the perceptual network of the {name} preset")
        return model

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Images `[N,3,H,W]` in [−1, 1] → one map `[N,C,h,w]` a level."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"images must be [N,3,H,W] of at least {self.smallest_side} pixels a side, got {list(images.shape)}"
            )
        maps = []
        h = (images - self.shift) / self.scale
        for index, layer in enumerate(self.features):
            h = layer(h)
            if index in self.taps:
                maps.append(h)
        return maps

    def distance(self, features_a: list[Tensor], features_b: list[Tensor]) -> Tensor:
        """Distance between feature maps: a `[B,C,h,w]` or `[B,G,C,h,w]`, b `[B,C,h,w]` → `[B]` or `[B,G]`."""
        return ops.lpips_distance(features_a, features_b, list(self.heads))

    def forward(self, images_a: Tensor, images_b: Tensor) -> Tensor:
        """Images `[B,3,H,W]` in [−1, 1] → distance per image `[B]`."""
        return self.distance(self.feature_maps(images_a), self.feature_maps(images_b))

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[N,3,H,W]` → pooled last-level features `[N,F]` and class logits `[N,K]` (FID, Inception Score)."""
        if self.classifier is None:
            raise ValueError("this LPIPS network has no classifier: only the tiny preset's has one")
        pooled = self.feature_maps(images)[-1].mean((2, 3))
        return pooled, self.classifier(pooled)


def lpips_config(name: str) -> LPIPSConfig:
    if name not in LPIPS_CONFIGS:
        raise ValueError(f"unknown LPIPS network {name!r}: choose one of {', '.join(LPIPS_CONFIGS)}")
    return LPIPS_CONFIGS[name]


def with_heads(name: str, state: dict[str, Tensor], source: str | Path) -> LPIPS:
    """A published network: backbone from torchvision's state dict, linear heads from the file beside torchmetrics."""
    published = PUBLISHED[name]
    require(CheckpointError, f"LPIPS on {published.called}", "torchmetrics")  # its file of heads, not its code
    model = LPIPS(LPIPS_CONFIGS[name])
    merged = {key: value for key, value in state.items() if key.startswith("features.")}
    heads = load_file_checked(Path(str(files("torchmetrics") / "functional/image/lpips_models" / published.heads)))
    for level in range(len(model.heads)):
        merged[f"heads.{level}"] = heads[f"lin{level}.model.1.weight"].flatten()
    load_into(model, merged, source, hint=f"pass torchvision's {published.called} ({published.file})")
    return model


def download_backbone(name: str) -> dict[str, Tensor]:
    """torchvision's weights through torch.hub's cache."""
    called, url, _ = PUBLISHED[name]
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"LPIPS needs the {called} weights and {url} cannot be downloaded ({error}): fetch that file on a "
            "machine that is online and pass --vgg-weights FILE"
        ) from error
