"""The main job: `torchrun benchmarks/e2e_align.py --model tiny` (or xxl with --vq-ckpt, --gpt-ckpt and --data)."""

from __future__ import annotations

import sys

from reference_step import published_step

from vapi_fast.cli import e2e_main

if __name__ == "__main__":
    sys.exit(e2e_main(published_step))
