"""Errors for the person at the command line: each is one line that says what is wrong and what to do."""

from __future__ import annotations

import os
import sys


class Error(Exception):
    """What is expected to go wrong, in one line. exit_code: 2 for wrong arguments or files, 1 if a run failed."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class ConfigError(Error, ValueError):
    """A value or a combination of values that cannot work; the message says what to pass instead."""

    exit_code = 2


class DataError(Error, ValueError):
    """The image set cannot be used; the message says what is wrong with which file."""

    exit_code = 2


class CheckpointError(Error, ValueError):
    """A checkpoint that is missing, damaged or of another model."""

    exit_code = 2


class EvaluationError(Error, RuntimeError):
    """The samples cannot be scored; the message says why and what to pass instead."""


class CaptureError(Error, RuntimeError):
    """A function could not be recorded as a CUDA graph."""

    def __init__(self, message: object) -> None:
        super().__init__(str(message).splitlines()[0])  # CUDA adds its advice on debugging


class NonFiniteError(Error, RuntimeError):
    """A reward, loss or gradient is NaN or infinite; raised before the optimizer step, so the weights are good."""


class RewardError(Error, RuntimeError):
    """The user's reward raised an error, or returned what is no reward."""


class StoppedError(Error, RuntimeError):
    """The run was asked to stop; its state is saved."""


def one_line(message: object) -> str:
    """Its text in one line, with control characters, which could do anything to a terminal, escaped."""
    text = " ".join(filter(None, map(str.strip, str(message).splitlines())))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn(message: object) -> None:
    """A line on standard error for what is taken in another way than it may have been meant; once, not by each rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"vapi-fast: warning: {one_line(message)}", file=sys.stderr, flush=True)
