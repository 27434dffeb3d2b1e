#!/bin/sh
# Two GPUs against one, over NCCL: losses, restarts, resuming, hangs. Run it where there are two GPUs; under four minutes.
# A summary is printed; logs, metrics and summary.json go into the folder that is named ($OUT unless one is).
cd "$(dirname "$0")/../.." || exit 1
PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" tests/distributed/on_gpus.py \
    "${1:-${OUT:-/tmp/stoker-on-gpus}}"
