"""The main job: `torchrun benchmarks/e2e_align.py --model tiny`, or xxl, whose files and images come from the hub.

Beside the flags of `vapi-fast align` it has `--path`: the published recipe in place of our steps, or beside them.
"""

from __future__ import annotations

import argparse
import sys

from vapi_fast.cli import add_command_flags

PATHS = ("fast", "reference", "both")


def main() -> int:
    parser = argparse.ArgumentParser(description="Align a generator to pixel space with VA-π.")
    add_command_flags(parser, "align")
    parser.add_argument(
        "--path",
        choices=PATHS,
        default="fast",
        help="fast; reference: the published recipe instead; both: fast, and the published recipe on the batches of a "
        "few steps, to compare time and gradients (default: fast)",
    )
    parser.add_argument("--compare", dest="path", action="store_const", const="both", help="the same as --path both")
    options = parser.parse_args()
    path = options.path
    del options.path
    from comparison import PATHS as SOURCES  # --help and a mistyped flag need not wait for torch

    from vapi_fast.commands import align_main

    return align_main(options, SOURCES[path]())


if __name__ == "__main__":
    sys.exit(main())
