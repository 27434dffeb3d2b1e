#!/bin/sh
# Runs the kernels' tests under NVIDIA's compute-sanitizer on this machine's GPU:
#   memcheck: reads and writes outside of allocations; racecheck: races over shared memory.
#
#   tests/kernels/sanitize.sh [TEST ...]        # some minutes; without arguments the kernels that write by index
#
# Exit code 0: clean. 2: compute-sanitizer is not there (it comes with the CUDA toolkit). Else the first that found
# something. Without PyTorch's cache every tensor is an allocation of its own, so that reads past its end are seen.
set -u
cd "$(dirname "$0")/../.." || exit 2
sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
if [ -z "$sanitizer" ]; then
    echo "compute-sanitizer is not installed: it comes with the CUDA toolkit (cuda-sanitizer-api)" >&2
    exit 2
fi
tests=${*:-"tests/kernels/test_rms_norm.py tests/kernels/test_rope.py tests/kernels/test_head_norm.py
    tests/kernels/test_glu.py tests/kernels/test_linear_cross_entropy.py tests/kernels/test_low_rank.py
    tests/kernels/test_scaled_update.py tests/kernels/test_fp8.py tests/kernels/test_nf4.py
    tests/kernels/test_dropout.py tests/kernels/test_adamw.py tests/kernels/test_mixture.py"}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck; do
    echo "compute-sanitizer --tool $tool"
    # shellcheck disable=SC2086 - a list of files
    "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all --print-limit 20 \
        "${PYTHON:-python}" -m pytest -q -x -n0 -p no:cacheprovider $tests || exit $?
done
