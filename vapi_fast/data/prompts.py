"""Files of prompts, a line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vapi_fast.runtime.checkpoint import read_regular
from vapi_fast.runtime.errors import DataError

T = TypeVar("T")


def read_prompts(path: Path, parse: Callable[[bytes], T]) -> tuple[T, ...]:
    """What `parse` makes of each line that is not blank: `text_of`, or `geneval.parse_prompt`.

    Raises DataError for a file that cannot be read or has no prompts, and with its number for a line that `parse` has
    a ValueError for.
    """
    try:
        lines = read_regular(path).splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    found = [parsed(line, parse, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{path}: has no prompts, expected one a line")
    return tuple(found)


def parsed(line: bytes, parse: Callable[[bytes], T], where: object) -> T:
    """One line; raises DataError, which says where it stands."""
    try:
        return parse(line)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def text_of(line: bytes) -> str:
    """A line of text, or `prompt` of a JSON object; raises ValueError for anything else."""
    try:
        text = line.decode("utf-8-sig").strip()
        if text.startswith("{"):
            text = json.loads(text)["prompt"]
        if not isinstance(text, str):
            raise TypeError(f"its prompt is {text!r}")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        wrong = f"no {error}" if isinstance(error, LookupError) else error
        raise ValueError(f"neither lines of text nor of JSON with `prompt` ({str(wrong)[:200]})") from error
    return text
