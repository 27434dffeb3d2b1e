#!/bin/sh
# The same run on one GPU and on two, under each strategy: the losses must agree. Run it where there are two GPUs.
set -eu
out=${1:-/tmp/stoker-on-gpus}
stoker=${STOKER:-stoker}
for run in "one --gpus 1" "ddp --gpus 2" "fsdp2 --gpus 2 --set engine.strategy=fsdp2"; do
    set -- $run
    name=$1
    shift
    timeout 150 $stoker train examples/quickstart.yaml --overwrite --set train.steps=20 --set engine.precision=fp32 \
        --set engine.device=cuda --set "output.folder=$out/$name" "$@"
done
python - "$out" <<'PY'
import json, pathlib, sys

losses = {}
for name in ("one", "ddp", "fsdp2"):
    lines = pathlib.Path(sys.argv[1], name, "metrics.jsonl").read_text().splitlines()
    losses[name] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
for name in ("ddp", "fsdp2"):
    assert len(losses[name]) == len(losses["one"]) == 20, losses
    worst = max(abs(a - b) for a, b in zip(losses["one"], losses[name]))
    print(f"{name}: losses differ from one GPU's by at most {worst:.2e}")
    assert worst < 1e-3
PY
