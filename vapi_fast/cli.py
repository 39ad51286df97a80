"""The command line: `vapi-fast align`, `generate`, `evaluate`, …; flags are the fields of their configurations.

Nothing here imports torch: --help and a mistyped flag answer at once. What runs is in `vapi_fast.commands`.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

from vapi_fast.alignment.config import AlignConfig
from vapi_fast.data.config import EncodeCaptionsConfig
from vapi_fast.evaluation.config import EvaluateConfig, GenevalConfig
from vapi_fast.generation.config import GenerateConfig
from vapi_fast.models import catalog
from vapi_fast.runtime.options import add_flags


class Command(NamedTuple):
    config: type
    text: str


COMMANDS = {
    "align": Command(AlignConfig, "align a generator to pixel space"),
    "generate": Command(GenerateConfig, "draw images from a generator"),
    "evaluate": Command(EvaluateConfig, "score images: FID, sFID, Inception Score, precision, recall"),
    "geneval": Command(GenevalConfig, "score images of captions by GenEval's six tasks"),
    "encode-captions": Command(EncodeCaptionsConfig, "make features of captions, in LlamaGen's own layout"),
}


def add_command_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """The flags of a command."""
    add_flags(parser, COMMANDS[command].config, catalog.presets(command))


def main() -> int:
    """`vapi-fast`: the console script."""
    parser = argparse.ArgumentParser(prog="vapi-fast", description="Fast VA-π alignment of LlamaGen generators.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        add_command_flags(commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}."), name)
    # Flags of benchmarks/e2e_align.py, for a better answer than that they are unknown.
    commands.choices["align"].add_argument(
        "--path", choices=("fast", "reference", "both"), default="fast", help=argparse.SUPPRESS
    )
    commands.choices["align"].add_argument(
        "--compare", dest="path", action="store_const", const="both", help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    command, path = options.command, getattr(options, "path", "fast")
    if path != "fast":
        error = f"--path {path} needs the published recipe: run benchmarks/e2e_align.py"
        print(f"vapi-fast: error: {error}", file=sys.stderr)
        return 2
    for name in ("command", "path"):
        vars(options).pop(name, None)
    from vapi_fast.commands import MAINS

    return MAINS[command](options)


if __name__ == "__main__":
    sys.exit(main())
