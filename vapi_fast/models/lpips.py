"""LPIPS: the perceptual distance of the reward (Zhang et al., 2018), on VGG16 or on the tiny preset's own network."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.runtime.checkpoint import load_file_checked, load_into, load_state_dict
from vapi_fast.runtime.errors import CheckpointError
from vapi_fast.runtime.packages import require

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


@dataclass(frozen=True)
class LPIPSConfig:
    """`levels`: (channels, 3×3 convolutions) of each resolution; features are taken after each level's last ReLU."""

    levels: tuple[tuple[int, int], ...]
    classes: int = 0  # > 0 adds a linear classifier on the pooled last level


LPIPS_CONFIGS = {
    "vgg16": LPIPSConfig(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))),
    "tiny": LPIPSConfig(((32, 2), (64, 2), (128, 2)), classes=9),
    "scenes": LPIPSConfig(((24, 2), (48, 2), (96, 2)), classes=24),
}


class LPIPS(nn.Module):
    """Perceptual distance d(a, b) = Σ_levels mean_{h,w} Σ_c w_c (â_c − b̂_c)², with â, b̂ unit-normalised over channels.

    Images `[B,3,H,W]` in [−1, 1]. The backbone's weights are named as in torchvision's VGG16 (`features.N.weight`).
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
            if level:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.smallest_side = 2 ** (len(config.levels) - 1)  # pixels: each level but the first halves
        # Unit weights make each level's term 2 − 2·cos; vgg16 gets its published heads.
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
        """`vgg16` with its published weights (downloads the backbone by torch.hub), or `tiny`, randomly initialised.

        Raises:
            CheckpointError: the VGG16 weights can neither be found nor downloaded.
        """
        if name == "vgg16":
            return vgg16_from_state(download_vgg16(), VGG16_URL)
        return cls(lpips_config(name))

    @classmethod
    def from_checkpoint(cls, path: str | Path, name: str) -> LPIPS:
        """`vgg16`: `path` is torchvision's VGG16 file, the heads are torchmetrics'. `tiny`: one file holds all."""
        if name == "vgg16":
            return vgg16_from_state(load_state_dict(path), path)
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


def vgg16_from_state(state: dict[str, Tensor], source: str | Path) -> LPIPS:
    """LPIPS on VGG16: backbone from torchvision's state dict, linear heads from the file that torchmetrics ships."""
    require(CheckpointError, "LPIPS on VGG16", "torchmetrics")  # its file of heads, not its code
    model = LPIPS(LPIPS_CONFIGS["vgg16"])
    merged = {key: value for key, value in state.items() if key.startswith("features.")}
    heads = load_file_checked(Path(str(files("torchmetrics") / "functional/image/lpips_models/vgg.pth")))
    for level in range(len(model.heads)):
        merged[f"heads.{level}"] = heads[f"lin{level}.model.1.weight"].flatten()
    load_into(model, merged, source, hint="pass torchvision's VGG16 (vgg16-397923af.pth)")
    return model


def download_vgg16() -> dict[str, Tensor]:
    """torchvision's VGG16 weights through torch.hub's cache."""
    try:
        return torch.hub.load_state_dict_from_url(VGG16_URL, map_location="cpu", weights_only=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"LPIPS needs the VGG16 weights and {VGG16_URL} cannot be downloaded ({error}): fetch that file on a "
            "machine that is online and pass --vgg-weights FILE"
        ) from error
