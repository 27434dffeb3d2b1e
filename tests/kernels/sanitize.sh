#!/bin/sh
# Runs the kernels' tests under NVIDIA's compute-sanitizer on this machine's GPU:
#   memcheck: reads and writes outside of allocations; racecheck: races over shared memory.
#
#   tests/kernels/sanitize.sh [TEST ...]        # some minutes; without arguments the kernels that write by index
#   TOOLS=racecheck tests/kernels/sanitize.sh   # one of the two
#
# Exit code 0: clean. 2: compute-sanitizer is not there (it comes with the CUDA toolkit). Else: something was found, or a
# test failed. Without PyTorch's cache every tensor is an allocation of its own, so that reads past its end are seen.
#
# Two kinds of races are shown but not counted. Inside cuDNN's attention warps wait for each other in ways that racecheck
# does not see. And where a tile has fewer values than its program has threads, Triton lets threads that hold copies of a
# value write all of them to one place: the same instruction, the same value.
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
    tests/kernels/test_dropout.py tests/kernels/test_adamw.py tests/kernels/test_mixture.py
    tests/kernels/test_rounded_glu.py tests/kernels/test_adamw_8bit.py tests/kernels/test_layer_norm.py"}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for tool in ${TOOLS:-memcheck racecheck}; do
    echo "compute-sanitizer --tool $tool"
    # shellcheck disable=SC2086 - a list of files
    "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all --print-limit 1000 \
        "${PYTHON:-python}" -m pytest -q -x -p no:cacheprovider ${PYTEST_OPTIONS:--n0} $tests >"$log" 2>&1
    status=$?
    cat "$log"
    [ "$status" = 0 ] && continue
    [ "$tool" = racecheck ] && [ "$status" = 9 ] && ! grep -q " failed" "$log" || exit "$status"
    awk '
        /Race reported between/ { found++; is_write = / Write access/; first = $0; sub(/.* access at /, "", first) }
        / and (Read|Write) access at / {
            second = $0; sub(/.* access at /, "", second); sub(/ \[.*/, "", second)
            if (first !~ /^cudnn_/ && !(is_write && / Write access/ && first == second)) { print "counted: " first; bad++ }
        }
        END { exit bad || !found }
    ' "$log" || exit "$status"
done
