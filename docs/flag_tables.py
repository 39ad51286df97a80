"""Writes the flags' tables into README.md and docs/flags.md, from the fields of the commands' configurations."""

from __future__ import annotations

import re
from pathlib import Path

from vapi_fast.cli import COMMANDS
from vapi_fast.models import catalog
from vapi_fast.runtime.options import table

PAGES = [Path(__file__).parents[1] / "README.md", Path(__file__).with_name("flags.md")]


def with_tables(text: str) -> str:
    """The page with what stands between `<!-- flags: COMMAND -->` and the next empty line made anew."""
    for command, (config, _) in COMMANDS.items():
        mark = f"<!-- flags: {command} -->\n"
        made = mark + table(config, catalog.presets(command)) + "\n"
        text = re.sub(f"{mark}(?:\\|.*\n)*", lambda _, made=made: made, text)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
