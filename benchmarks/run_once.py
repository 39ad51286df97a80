"""Every operation once on Triton, forward and backward, at small odd sizes: a pass for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/run_once.py

On a machine without a GPU the kernels are interpreted.
"""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before vapi_fast is imported

from cases import CASES, ODD, Case, Sizes, Source, tensors
from timing import synchronize

from vapi_fast import ops


def run(case: Case, source: Source, sizes: Sizes = ODD) -> None:
    inputs, leaves = case.differentiable(case.inputs(sizes, source))
    with ops.use_backend("triton"), torch.set_grad_enabled(bool(leaves)):
        results = [each for each in tensors(case.call(ops, inputs)) if each.requires_grad]
        if leaves:
            torch.autograd.grad(results, leaves, [torch.randn_like(each) for each in results])
    synchronize()


def main() -> int:
    torch.manual_seed(0)
    source = Source(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16)
    failed = 0
    for case in CASES:
        try:
            run(case, source)
            print(f"{case.name}: ran", flush=True)
        except Exception as error:  # the others are to be seen too
            failed += 1
            print(f"{case.name}: {type(error).__name__}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
