"""Progress of long work: tqdm's bar, or where tqdm is not installed a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from vapi_fast.runtime.packages import installed

SECONDS_A_LINE = 10.0


def progress_bar(total: int, *, desc: str, unit: str, initial: int = 0, disable: bool = False) -> Any:
    """A context manager with tqdm's `n`, `total`, `update` and `set_postfix`, counting from `initial` to `total`."""
    if not installed("tqdm"):
        return ProgressLines(total, desc, unit, initial, disable)
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=disable)


class ProgressLines:
    """A line on standard error after the first update, then every `SECONDS_A_LINE`, and at the end."""

    def __init__(self, total: int, desc: str, unit: str, initial: int, disable: bool) -> None:
        self.total, self.desc, self.unit, self.n, self.disable = total, desc, unit, initial, disable
        self.initial = initial
        self.postfix = ""
        self.started = time.monotonic()
        self.shown = -SECONDS_A_LINE

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_postfix(self, figures: dict[str, str]) -> None:
        """Figures of the next line."""
        self.postfix = "".join(f", {name}={value}" for name, value in figures.items())

    def update(self, count: int = 1) -> None:
        self.n += count
        now = time.monotonic()
        if self.disable or (self.n < self.total and now - self.shown < SECONDS_A_LINE):
            return
        self.shown = now
        left = (self.total - self.n) * (now - self.started) / (self.n - self.initial)
        print(
            f"{self.desc}: {self.unit} {self.n}/{self.total}{self.postfix}, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
