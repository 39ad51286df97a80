"""Where a generator is unsure: the entropy of every token's distribution, drawn over the image it became."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from vapi_fast.runtime.checkpoint import write_atomically

PAIRS_PER_ROW = 4
CELL = 1.5  # inches


def save_entropy_maps(path: str | Path, images: Tensor, entropies: Tensor) -> None:
    """Write a PNG of pairs: an image, and its token entropies as a smooth heat map over it, all on one scale.

    Args:
        images: `[N,3,H,W]` in [−1, 1].
        entropies: bits `[N,T]`, T a square number of tokens in row order; the mean is written above each pair.

    The file appears whole or not at all. Raises ValueError for shapes that do not match or values that are not finite.
    """
    alike = images.ndim == 4 and entropies.ndim == 2 and len(images) == len(entropies)
    if not alike or images.shape[1] != 3 or not len(images):
        raise ValueError(
            f"expected images [N, 3, H, W] and entropies [N, T], got {list(images.shape)} and {list(entropies.shape)}"
        )
    side = math.isqrt(entropies.shape[1])
    if side * side != entropies.shape[1]:
        raise ValueError(f"entropies of {entropies.shape[1]} tokens do not fill a square grid")
    if not (images.isfinite().all() and entropies.isfinite().all()):
        raise ValueError("images or entropies have values that are not finite")
    maps = entropies.view(-1, side, side).cpu().numpy()
    shown = (images.float().cpu().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    scale = ScalarMappable(Normalize(0, max(float(maps.max()), 1e-6)), "magma")
    pairs = min(PAIRS_PER_ROW, len(images))
    rows = math.ceil(len(images) / pairs)
    figure = Figure(figsize=(2 * pairs * CELL + 1, rows * (CELL + 0.3)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2 * pairs, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (image, entropy) in enumerate(zip(shown, maps, strict=True)):
        left, right = axes[index // pairs, 2 * (index % pairs) :][:2]
        left.imshow(image, extent=(0, side, side, 0), interpolation="nearest")
        right.imshow(image.mean(-1), "gray", vmin=0, vmax=1, extent=(0, side, side, 0), interpolation="nearest")
        right.imshow(entropy, "magma", norm=scale.norm, alpha=0.7, extent=(0, side, side, 0), interpolation="bilinear")
        right.set_title(f"{entropy.mean():.1f} bits", fontsize=8, pad=2)
    figure.colorbar(scale, ax=axes, label="entropy of the token (bits)", fraction=0.02, pad=0.01)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))
