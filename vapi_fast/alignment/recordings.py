"""What recorded micro-batches have in memory that stays where it is, from one step to the next."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from vapi_fast.alignment.rollout import Rollout
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.runtime.graphs import Pool, RecordedStages, graph_pool

MOST_SHAPES = 4  # of micro-batches: of captions, the longest of a step decides how many positions there are


class Standing:
    """A micro-batch where its kernels find it; halves: as they were recorded, if they were."""

    def __init__(self, batch: ImageBatch, tokens: Tensor) -> None:
        self.batch = without_images(batch).map(torch.clone)
        self.tokens = tokens.clone()
        self.seed = tokens.new_empty(())
        self.advantages: Tensor | None = None
        self.rollout: Rollout | None = None  # from one half to the other
        self.halves: list[RecordedStages] | None = None
        self.warm = False  # whether an earlier step had one of its shape

    def take(self, batch: ImageBatch, tokens: Tensor, seed: int) -> None:
        for own, given in zip((*self.batch, self.tokens), (*without_images(batch), tokens), strict=True):
            if own is not None:
                own.copy_(given)
        self.seed.fill_(seed)

    def learn_from(self, advantages: Tensor) -> None:
        if self.advantages is None:
            self.advantages = advantages.clone()
        self.advantages.copy_(advantages)


class Recordings:
    """Of a generator's micro-batches, by their shapes.

    A shape runs kernel by kernel in the first step that has it, and may be recorded in the next. Where a new one comes
    later, all recorded graphs are given up first: memory is planned for one micro-batch, however it runs. After
    MOST_SHAPES none is recorded any more.

    casts: weights in bf16, and the shares of norms' gradients, as `cast_once` keeps them.
    """

    def __init__(self) -> None:
        self.pool: Pool | None = None
        self.shapes: dict[Hashable, Standing] = {}
        self.closed = False  # to all shapes
        self.casts: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}  # by the ids of parameters

    def begin_step(self) -> None:
        for standing in self.shapes.values():
            standing.warm = True

    def standing(self, key: Hashable, batch: ImageBatch, tokens: Tensor) -> Standing | None:
        """Of a micro-batch of that shape; None where it is not recorded."""
        if key not in self.shapes and not self.closed:
            self.give_up()
            self.pool = self.pool or graph_pool(tokens.device)
            self.shapes[key] = Standing(batch, tokens)
            self.closed = len(self.shapes) > MOST_SHAPES
        if self.closed:
            self.shapes.clear()
        return self.shapes.get(key)

    def hold_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Let gradients be where they were in earlier steps, zero where a step has none yet."""
        missing = []
        for parameter in parameters:
            kept = self.gradients.get(id(parameter))
            if kept is None:
                if parameter.grad is not None:
                    self.gradients[id(parameter)] = parameter.grad
            elif parameter.grad is None:
                missing.append(kept)
                parameter.grad = kept
            elif parameter.grad is not kept:
                kept.copy_(parameter.grad)
                parameter.grad = kept
        if missing:
            torch._foreach_zero_(missing)

    def give_up(self) -> None:
        """All recorded graphs, and their memory."""
        for standing in self.shapes.values():
            standing.halves = None
        if self.pool is not None:
            self.pool = self.pool._replace(handle=torch.cuda.graph_pool_handle())

    def release(self) -> None:
        """Between two steps: what the next one makes again."""
        self.give_up()
        self.casts.clear()


def without_images(batch: ImageBatch) -> ImageBatch:
    return batch._replace(images=batch.images[:0])
