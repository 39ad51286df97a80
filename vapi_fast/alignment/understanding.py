"""What an alignment on images does to a generator that also writes: how far its next words are from those before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vapi_fast.models import Generator

TEXTS = (
    "The capital of France is Paris, and that of Japan is Tokyo.",
    "Water boils at a hundred degrees, and at less on a mountain, where the air is thinner.",
    "She put the keys on the table, closed the door behind her and went down to the river.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Two and three are five; five times four are twenty.",
    "There are three cups on the table: a red one, a blue one, and one without a handle.",
    "In spring the farmers sow, in summer they wait for rain, in autumn they bring in the harvest.",
    "The picture shows a dog that lies in the shade of a tree, to the left of a white fence.",
)


class TextCheck:
    """Distributions of the next token after each of fixed texts' tokens, as `generator` has them now.

    Computed in float32: what changes in the first hundred steps is below what bf16 can tell.

    Args:
        head: `lm_head` of the language model `[V,D]`. tokenized: a text's token ids int64 `[n]`.
    """

    def __init__(self, generator: Generator, head: Tensor, tokenized: Callable[[str], Tensor]) -> None:
        self.head, self.ids = head, [tokenized(text) for text in TEXTS]
        self.before = self.logprobs(generator)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    @torch.no_grad()
    def logprobs(self, generator: Generator) -> Sequence[Tensor]:
        """Of each text `[n,V]`, on the CPU."""
        device = next(generator.parameters()).device
        head, found = self.head.to(device, torch.float32), []
        for ids in self.ids:
            states = generator.text_states(ids.to(device)[None])[0]
            found.append((states.float() @ head.T).log_softmax(-1).cpu())
        return found

    def divergence(self, generator: Generator) -> float:
        """Mean over the tokens of KL(before ‖ now), in nats."""
        now = self.logprobs(generator)
        each = [(p.exp() * (p - q)).double().sum(-1) for p, q in zip(self.before, now, strict=True)]
        return float(torch.cat(each).mean())


def text_check(generator: Generator, source: Path, tokenized: Callable[[str], Tensor]) -> TextCheck | None:
    """Of a generator as it was read from `source`; None where it does not write, or its file has nothing for that."""
    head = generator.language_head(source)
    return None if head is None else TextCheck(generator, head, tokenized)
