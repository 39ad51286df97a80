"""The main job: `torchrun benchmarks/e2e_align.py --model tiny` (or xxl with --vq-ckpt, --gpt-ckpt and --data)."""

from __future__ import annotations

import sys

from vapi_fast.cli import e2e_options

if __name__ == "__main__":
    options = e2e_options()  # --help and a mistyped flag need not wait for torch
    from reference_step import published_step

    from vapi_fast.commands import align_main

    sys.exit(align_main(options, published_step))
