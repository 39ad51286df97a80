"""What `--reward` says: rewards by name, or functions of the user's, each with a weight."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from vapi_fast.runtime.errors import ConfigError

LEVELS = "-levels"  # ends the name of a network's reward in AR-GRPO's quantised form
NETWORKS = ("clip", "hpsv2")
NAMES = ("pixel", "classifier", *(name + form for name in NETWORKS for form in ("", LEVELS)))


class RewardTerm(NamedTuple):
    name: str  # of NAMES, or the user's module:function
    weight: float = 1.0

    @property
    def is_users(self) -> bool:
        return self.name not in NAMES

    @property
    def network(self) -> str | None:
        """The network of NETWORKS that it takes."""
        name = self.name.removesuffix(LEVELS)
        return name if name in NETWORKS else None


@lru_cache
def reward_terms(text: str | None) -> tuple[RewardTerm, ...]:
    """The terms of `clip:5,my_module:my_function:0.5`, which weigh 1 where no number follows; None: the pixels' alone.

    Raises ConfigError for an unknown name, one that is there twice, or a weight that is no finite number.
    """
    terms = (RewardTerm("pixel"),) if text is None else tuple(map(reward_term, text.split(",")))
    names = [term.name for term in terms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--reward {text}: {twice[0]} is there twice, give it one weight")
    return terms


def reward_term(text: str) -> RewardTerm:
    parts = text.strip().split(":")
    words = 1 if parts[0] in NAMES else 2  # of the name
    name, weight = ":".join(parts[:words]), parts[words:]
    if len(parts) < words or (words == 2 and number(parts[1]) is not None):
        raise ConfigError(
            f"--reward {text.strip()}: unknown, expected {', '.join(NAMES)} or module:function, each with its weight "
            "behind another colon"
        )
    if not weight:
        return RewardTerm(name)
    value = number(":".join(weight))
    if value is None or not math.isfinite(value):
        raise ConfigError(f"--reward {text.strip()}: the weight of {name} must be a number, got {':'.join(weight)!r}")
    return RewardTerm(name, value)


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
