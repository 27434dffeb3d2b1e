"""Starts processes of a measurement, and ends them all when the time is up."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

_SHOWN = 15


def run(
    module: str, arguments: Sequence[str], *, processes: int, timeout: float, environment: dict[str, str] | None = None
) -> str:
    """Runs `python -m module` in so many processes; returns "" or why it failed, and prints the last lines then.

    One process is started as it is, several through torchrun. NVLink multicast stays off.
    """
    command = [sys.executable, "-m", module, *arguments]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *torchrun, "-m", module, *arguments]
    variables = {
        "NCCL_NVLS_ENABLE": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "160",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(Path(place or ".").resolve()) for place in sys.path),
        **(environment or {}),
    }
    return finish(command, timeout=timeout, environment=variables)


def finish(command: Sequence[str], *, timeout: float, environment: dict[str, str], cwd: Path | None = None) -> str:
    """Runs a command in a session of its own; returns "" or why it failed."""
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, timeout))
    except subprocess.TimeoutExpired:
        end(process)
        return f"it did not end within {timeout:.0f} s"
    if process.returncode == 0:
        return ""
    lines = [line for line in output.splitlines() if line.strip() and "Loading weights" not in line]
    print("\n".join(["  | " + line[:220] for line in lines[-60:]]), flush=True)
    return f"exit code {process.returncode}: {cause(lines)}"


def end(process: subprocess.Popen) -> None:
    """Kills what was started, with all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cause(lines: Sequence[str]) -> str:
    """Returns the line of an output that says most likely what went wrong: of the process, before its launcher's."""
    own = list(takewhile(lambda line: "torch/distributed/elastic" not in line, lines)) or lines
    said = [line.strip() for line in own if re.search(r"(Error|Exception)\b.*: |^error: ", line)]
    # Ranks that find another one gone say so too, and often first.
    first = [line for line in said if "closed by peer" not in line and "NCCL" not in line]
    return ([*first, *said, *own[-1:]] or ["no message"])[0][:300]
