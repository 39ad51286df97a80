"""A step's figures: means over the images, what is not finite, and their way to the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vapi_fast.alignment.config import RewardOptions
from vapi_fast.alignment.reward_terms import RewardTerm
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.runtime.distributed import gather_objects
from vapi_fast.runtime.errors import NonFiniteError

METRICS = ("loss", "reward", "mse", "lpips", "cross_entropy", "kl", "clipped")
# Where a term that is not finite comes from, in the order in which one such term spoils the next.
STAGES = {"mse": "decode", "lpips": "lpips", "reward": "reward", "kl": "loss", "cross_entropy": "loss", "loss": "loss"}


def metrics_of(config: RewardOptions) -> tuple[str, ...]:
    """METRICS, and where `--reward` names some, each reward's own figure."""
    return METRICS + (() if config.reward is None else tuple(map(figure_of, config.reward_terms)))


def figure_of(term: RewardTerm) -> str:
    return f"reward/{term.name}"


def mean_terms(terms: dict[str, Tensor], metrics: tuple[str, ...] = METRICS) -> Tensor:
    """Means, float64 `[len(metrics)]`; 0 for a term that the method does not have."""
    zero = torch.zeros_like(terms["loss"])
    return torch.stack([terms.get(name, zero).detach().double().mean() for name in metrics])


def non_finite(terms: dict[str, Tensor], images: int, metrics: tuple[str, ...] = METRICS) -> Tensor:
    """Bool `[len(metrics), images]`; a term without a row an image counts for all of them."""
    zero = torch.zeros_like(terms["loss"])
    rows = [~terms.get(name, zero).detach().isfinite() for name in metrics]
    return torch.stack([row.view(images, -1).any(1) if row.ndim else row.expand(images) for row in rows])


class StepResult:
    """A step's figures on their way to the host, so that the next step can be launched before they are there.

    A reward, loss or gradient that is not finite leaves the weights as they were, on all ranks, in this step and in
    any later one: the optimizer's update is skipped on the device, and `read` says what it was.
    """

    def __init__(
        self, step: int, figures: Tensor, bad: Tensor, batch: ImageBatch, metrics: tuple[str, ...] = METRICS
    ) -> None:
        self.step = step
        self.metrics = metrics
        self.batch = batch
        self.figures = to_host(figures)
        self.bad = to_host(bad)
        self.arrived = None
        if figures.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> tuple[dict[str, float], bool]:
        """The means of the metrics and the gradient norm; and whether a rank wants to stop. Waits for the step.

        Raises NonFiniteError, on all ranks alike, naming the stage and the images.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        *means, norm, bad, stop = self.figures.tolist()
        if bad:
            raise NonFiniteError(next(filter(None, gather_objects(self.reason()))))
        if not math.isfinite(norm):
            raise NonFiniteError("the gradient is not finite though the loss is (stage backward): lower --lr")
        return dict(zip(self.metrics, means, strict=True)) | {"gradient_norm": norm}, bool(stop)

    def reason(self) -> str:
        for name, stage in (dict.fromkeys(self.metrics[len(METRICS) :], "reward") | STAGES).items():
            rows = self.bad[self.metrics.index(name)]
            if rows.any():
                ids = self.batch.image_ids.cpu()[rows].tolist()
                return f"{name} is not finite (stage {stage}) for the images with ids {ids[:8]}"
        return ""


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU, from a GPU without waiting for it."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
