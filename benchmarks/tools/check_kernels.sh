#!/usr/bin/env bash
# Compiles every launched kernel for sm_80, sm_90 and sm_100 with each of these versions of Triton.
#
#     bash benchmarks/tools/check_kernels.sh 3.4.0 3.6.0 3.9.0
#
# PYTHON names an interpreter with vapi-fast installed. Exit code 1 if a version has a problem; its report is in
# kernels-<version>.log.
set -euo pipefail
case " $* " in
    *" --help "*) echo "usage: $0 VERSION ..., versions of triton"; exit 0 ;;
    "  ") echo "usage: $0 VERSION ..., versions of triton" >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
for version in "$@"; do
    "$python" -m pip install --quiet --no-deps --target "$work/$version" "triton==$version"
    log=kernels-$version.log
    TRITON_CACHE_DIR=$work/cache-$version PYTHONPATH=$work/$version "$python" -m vapi_fast.kernels.check >"$log" 2>&1 || status=1
    echo "triton $version: $(grep -A 99 ' kernels in ' "$log" || tail -n 1 "$log")"
done
exit $status
