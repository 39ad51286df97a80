#!/usr/bin/env bash
# The figures and checks of this machine's GPU, as one JSON file in DIR, the most valuable first.
#
#     bash benchmarks/gpu_check.sh DIR [--minutes N] [--cpu] [--commit SHA]
#
# In N minutes (4): rates and a smoke test, LlamaGen-XXL beside the published recipe, its sampling; in 8 or 14 also its
# hundred steps, the benchmarks, the tests, compute-sanitizer, the machine code. A second call with the same DIR goes on
# with what is missing. Needs Python with torch, triton and numpy, for tests and benchmarks pytest and pytest-benchmark,
# and no network. PYTHON names another interpreter.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
