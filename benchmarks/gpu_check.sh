#!/usr/bin/env bash
# GPU tests, memory check, benchmarks and machine code of this machine's compiler, as one JSON file in DIR.
#
#     bash benchmarks/gpu_check.sh DIR [--align | --generate] [--commit SHA] [--cpu]
#
# With --align, the alignment of LlamaGen-XXL instead, with --generate its sampling. Needs Python with torch, triton,
# pytest and pytest-benchmark (with --align the package's own requirements), and no network. PYTHON names another
# interpreter.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
