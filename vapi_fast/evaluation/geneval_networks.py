"""GenEval's networks without mmdet: Mask2Former of `transformers` finds objects, CLIP of `open_clip` names colors.

The official scorer has mmdet's own training of the same detector (swin-s, COCO). Both trainings are tested on images
whose shorter side is 800 pixels, so that is what the detector sees here, too, not the 384² of its hub files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vapi_fast.data.geneval import COLORS, OBJECTS
from vapi_fast.evaluation.geneval_detections import Found, Mask
from vapi_fast.evaluation.geneval_rules import THRESHOLD
from vapi_fast.runtime.errors import CheckpointError, ConfigError
from vapi_fast.runtime.hub import see
from vapi_fast.runtime.packages import loaded, require

SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels
MULTIPLE = 32  # that the padded sides are of
MEAN, SPREAD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's colors
CANDIDATES = 100  # pairs of a query and a class, in an image

CLIP, CLIP_WEIGHTS = "ViT-L-14", "openai"
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
OUTSIDE = "#999"  # of an object's mask
CROPS = 16  # in CLIP at once


class Detector:
    """Objects in images, by a Mask2Former whose labels are OBJECTS."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = network.eval().requires_grad_(False).float().to(device)
        self.device = device

    @classmethod
    def load(cls, source: str, device: torch.device) -> Detector:
        """From the hub or a folder; raises CheckpointError for what is no Mask2Former on COCO's 80 classes."""

        def read() -> tuple[nn.Module, dict[str, Any]]:
            from transformers import Mask2FormerForUniversalSegmentation

            see(source)
            return Mask2FormerForUniversalSegmentation.from_pretrained(source, output_loading_info=True)

        network, about = loaded(f"--detector {source}", "pass a folder with that Mask2Former's files", read)
        labels = network.config.id2label
        if (len(labels), labels.get(0), labels.get(79)) != (len(OBJECTS), OBJECTS[0], OBJECTS[-1]):
            raise CheckpointError(f"--detector {source}: has {len(labels)} labels that are not COCO's {len(OBJECTS)}")
        if missing := sorted({name for name, _ in network.named_parameters()} & set(about["missing_keys"])):
            raise CheckpointError(f"--detector {source}: lacks {len(missing)} weights of a Mask2Former, {missing[0]} …")
        return cls(network, device)

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Found]]:
        """What is in images uint8 `[H,W,3]`, of any sizes; in a batch they are padded to the largest."""
        resized = [self._resized(image) for image in images]
        sides = [max(image.shape[side] for image in resized) for side in (1, 2)]
        height, width = (-(-side // MULTIPLE) * MULTIPLE for side in sides)
        batch = torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in resized])
        drawn = self.network(pixel_values=batch)
        return [
            instances(classes, upsampled(masks, (height, width), small.shape[1:], image.shape[:2]))
            for classes, masks, small, image in zip(
                drawn.class_queries_logits.float(), drawn.masks_queries_logits.float(), resized, images, strict=True
            )
        ]

    def _resized(self, image: np.ndarray) -> Tensor:
        pixels = torch.tensor(image, device=self.device).permute(2, 0, 1).float()
        short, long = sorted(image.shape[:2])
        scale = min(SHORT_SIDE / short, LONG_SIDE / long)
        size = [int(side * scale + 0.5) for side in image.shape[:2]]
        pixels = F.interpolate(pixels[None], size, mode="bilinear")[0].round()
        mean, spread = (torch.tensor(each, device=self.device)[:, None, None] for each in (MEAN, SPREAD))
        return (pixels - mean) / spread


def upsampled(
    masks: Tensor, padded: Sequence[int], resized: Sequence[int], original: Sequence[int]
) -> Callable[[Tensor], Tensor]:
    """Mask logits `[Q,h,w]` of the padded image, as a function of queries: `[n,H,W]`, of the original one."""

    def of(queries: Tensor) -> Tensor:
        logits = F.interpolate(masks[queries][None], list(padded), mode="bilinear")
        logits = logits[..., : resized[0], : resized[1]]
        return F.interpolate(logits, list(original), mode="bilinear")[0]

    return of


def instances(classes: Tensor, masks: Callable[[Tensor], Tensor]) -> list[Found]:
    """Objects of an image, from class logits `[Q,81]` and its queries' mask logits, scored as Mask2Former is on COCO.

    Of all pairs of a query and a class the CANDIDATES likeliest; a score is the class's probability times the mean one
    of the mask's pixels, a box just holds the mask. Those that no task counts are left out.
    """
    labels = classes.shape[1] - 1  # the last one is "nothing"
    scores, pairs = classes.softmax(dim=1)[:, :labels].flatten().topk(min(CANDIDATES, len(classes) * labels))
    pairs = pairs[scores > THRESHOLD]  # by its mask a score only falls
    if not len(pairs):
        return []
    logits = masks(pairs // labels)
    inside = logits > 0
    quality = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    scores = scores[: len(pairs)] * quality
    return [
        Found(OBJECTS[pair % labels], score, box_of(pixels), mask=Mask.of(pixels))
        for pair, score, pixels in zip(pairs.tolist(), scores.tolist(), inside.cpu().numpy(), strict=True)
        if score > THRESHOLD
    ]


def box_of(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """The box of booleans `[H,W]`, some of them true; right and bottom are behind the last."""
    (left, right), (top, bottom) = (ends(pixels.any(axis)) for axis in (0, 1))
    return left, top, right, bottom


def ends(line: np.ndarray) -> tuple[float, float]:
    there = np.flatnonzero(line)
    return float(there[0]), float(there[-1] + 1)


class ClipParts(NamedTuple):
    """What `open_clip` has of a CLIP."""

    network: nn.Module
    transform: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]


class ColorClassifier:
    """Colors of objects, by zero-shot classification of their crops."""

    def __init__(self, clip: ClipParts, device: torch.device) -> None:
        self.clip = clip._replace(network=clip.network.eval().requires_grad_(False).to(device))
        self.device = device
        self.known: dict[str, Tensor] = {}

    @classmethod
    def load(cls, weights: Path | None, device: torch.device) -> ColorClassifier:
        """CLIP ViT-L/14 of OpenAI, from a file or downloaded; raises CheckpointError where there is none."""
        source = "CLIP's weights" if weights is None else f"--clip-weights {weights}"

        def read() -> ClipParts:
            import open_clip

            # They were trained with QuickGELU; by the name alone newer versions of open_clip take another.
            network, _, transform = open_clip.create_model_and_transforms(
                CLIP, str(weights or CLIP_WEIGHTS), force_quick_gelu=True
            )
            return ClipParts(network, transform, open_clip.get_tokenizer(CLIP))

        return cls(loaded(source, f"pass a file of {CLIP} ({CLIP_WEIGHTS}) as --clip-weights", read), device)

    @torch.no_grad()
    def __call__(self, image: np.ndarray, objects: Sequence[Found]) -> list[str]:
        """The color of each object in an image uint8 `[H,W,3]`."""
        crops = torch.stack([self.clip.transform(each) for each in self.crops(image, objects)])
        seen = torch.cat([self.clip.network.encode_image(part.to(self.device)) for part in crops.split(CROPS)])
        similar = [self._classes(each.name) @ features for each, features in zip(objects, seen, strict=True)]
        return [COLORS[int(each.argmax())] for each in similar]

    @staticmethod
    def crops(image: np.ndarray, objects: Iterable[Found]) -> list[Image.Image]:
        """Each object's box, with OUTSIDE where it has a mask and that ends."""
        picture = Image.fromarray(image)
        blank = Image.new("RGB", picture.size, OUTSIDE)
        crops = []
        for each in objects:
            left, top, right, bottom = map(round, each.box)
            box = (left, top, max(right, left + 1), max(bottom, top + 1))
            shown = Image.composite(picture, blank, Image.fromarray(each.mask.pixels())) if each.mask else picture
            crops.append(shown.crop(box))
        return crops

    def _classes(self, name: str) -> Tensor:
        """Embeddings of the colors for objects of a class, `[10,E]`, of length 1."""
        if name not in self.known:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            embedded = F.normalize(self.clip.network.encode_text(self.clip.tokenize(texts).to(self.device)), dim=1)
            self.known[name] = F.normalize(embedded.unflatten(0, (len(COLORS), -1)).mean(dim=1), dim=1)
        return self.known[name]


def require_networks(detects: bool, colors: bool) -> None:
    """Raise ConfigError unless the packages are there, all that will be needed."""
    modules = (("transformers", "scipy") if detects else ()) + (("open_clip",) if colors else ())
    require(ConfigError, "scoring by GenEval", *modules)
