"""What the command line shares with those who check its values: the names of flags, and choices."""

from __future__ import annotations

CFG_SCHEDULES = ("constant", "power-cosine")
SAMPLE_FORMATS = ("png", "npz")


def flag(field: str) -> str:
    """The command line's name of a config field."""
    return "--" + field.replace("_", "-")
