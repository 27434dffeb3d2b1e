"""Runs cells of a benchmark on one GPU beside other trainers, one process each, and keeps what was measured.

    python benchmarks/single_gpu/run.py A B C E F G --peers unsloth --budget 500
    python benchmarks/single_gpu/run.py qwen3_moe mamba2 mamba mixtral mixtral_nf4 --suite architectures --budget 500

A suite is a folder of cells beside results. Without `--peers` a cell runs beside its own (`PEERS`).
Appends to benchmarks/results/SUITE.{json,csv} after every cell, so that a run that is cut off loses one cell at
most. A cell that would start after `--budget` seconds is left out and named; `--set` goes to every cell. A peer that
would get the very same job in two cells runs once (`SAME_PEERS`). Exit code 1 if a cell has no result.
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent
RESULTS = BENCHMARKS / "results"
SUITES = {
    suite: sorted(path.stem for path in (BENCHMARKS / suite).glob("*.yaml"))
    for suite in ("single_gpu", "architectures")
}
PEERS = {"qwen3_moe": "unsloth", "mixtral": "hf", "mixtral_nf4": "hf", "mamba": "hf", "mamba2": "hf"}
PEER_SECONDS = {"mamba": 40.0}
"""A step of Transformers' takes over 20 s, so that it would never end."""
SAME_PEERS = {"F": "A", "mixtral_nf4": "mixtral"}
"""Peers multiply in bf16 in both cells; of a mixture they have no NF4, as bitsandbytes leaves 3-D parameters alone."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = "; ".join(f"{suite}: {', '.join(cells)}" for suite, cells in SUITES.items())
    parser.add_argument("cells", nargs="+", metavar="CELL", help=f"of {known}")
    parser.add_argument("--suite", choices=list(SUITES), default="single_gpu")
    parser.add_argument("--peers", help="hf,liger,unsloth")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for everything")
    parser.add_argument("--peer-timeout", type=float, default=180.0, help="seconds for one peer")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--models", help="folder for the models that are made")
    parser.add_argument("--commit", help="commit to note, where there is no git")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to append to")
    options = parser.parse_args()
    if unknown := set(options.cells) - set(SUITES[options.suite]):
        parser.error(f"no cell {', '.join(sorted(unknown))} of {options.suite}; there are {known}")
    end = time.monotonic() + options.budget
    found: dict[str, dict] = {}
    failed = []
    for cell in options.cells:
        left = end - time.monotonic()
        if left < 20:
            print(f"{cell} is left out: the time is used up", flush=True)
            failed.append(cell)
            continue
        facts = run(cell, options, left=left, shared=found.get(SAME_PEERS.get(cell, "")))
        if facts is None:
            failed.append(cell)
            continue
        found[cell] = facts
        append(facts, options.results, options.suite)
    return 1 if failed else 0


def run(cell: str, options: argparse.Namespace, *, left: float, shared: dict | None) -> dict | None:
    """Runs one cell in a process of its own; `shared` is a cell that measured the same peers."""
    start = time.monotonic()
    print(f"\n=== {cell} ===", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path, out = BENCHMARKS / options.suite / f"{cell}.yaml", Path(folder) / "out.json"
        command = [sys.executable, "-m", "stoker.cli.main", "bench", str(path), "--out", str(out)]
        command += ["--steps", str(options.steps)]
        command += ["--peer-timeout", str(min(options.peer_timeout, PEER_SECONDS.get(cell, math.inf)))]
        command += ["--budget", str(left - 10)]  # ten seconds to write and to end
        asked = PEERS.get(cell, "") if options.peers is None else options.peers
        command += ["--peers", "" if shared else asked]
        for name in ("models", "commit"):
            value = getattr(options, name)
            command += [f"--{name}", value] if value else []
        for override in options.set:
            command += ["--set", override]
        try:
            environment = {"COLUMNS": "160", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
            code = subprocess.run(command, check=False, timeout=left + 20, env=environment).returncode
        except subprocess.TimeoutExpired:
            code = "none: the time is used up"
        print(f"{cell}: exit code {code}, {time.monotonic() - start:.0f} s", flush=True)
        if not out.is_file():
            return None
        facts = json.loads(out.read_text())
    return with_peers(facts, shared) if shared else facts


def with_peers(facts: dict, shared: dict) -> dict:
    """Adds the peers that another cell of this run measured on the same job, with ratios to this cell."""
    ours = facts["results"][0]
    for row in shared["results"][1:]:
        ratios = {}
        if not row["error"]:
            ratios["stoker_speed_ratio"] = ours["tokens_per_second"] / row["tokens_per_second"]
            ratios["stoker_memory_ratio"] = ours["peak_bytes"] / row["peak_bytes"]
            print(
                f"  {row['name']} of cell {shared['cell']}: {ratios['stoker_speed_ratio']:.2f} x its speed", flush=True
            )
        facts["results"].append(row | ratios)
    facts["notices"].append(f"peers are those of cell {shared['cell']}, measured in the same run")
    return facts


def append(facts: dict, results: Path, suite: str = "single_gpu") -> None:
    """Adds a cell's facts to the JSON, and its lines to the CSV."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{suite}.json"
    runs = json.loads(path.read_text())["runs"] if path.is_file() else []
    path.write_text(json.dumps({"runs": [*runs, facts]}, indent=1) + "\n")
    table = results / f"{suite}.csv"
    lines = [
        {name: facts[name] for name in ("cell", "title", "rows", "device", "commit", "date")}
        | {"floor_tokens_per_second": facts["floor"]["tokens_per_second"]}
        | row
        for row in facts["results"]
    ]
    is_new = not table.is_file()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    sys.exit(main())
