"""Kernels compile for the oldest and the newest GPUs that Stoker names, on a machine without any."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Shared memory a block may have, by compute capability: 7.5 (a free T4) has the least of all.
MAX_SHARED_BYTES = {75: 64 * 1024, 90: 227 * 1024}


# A thread reads the positions of one channel, a warp 32 neighbouring channels of a position.
READ_BY_CHANNEL = {"_chunk_states_kernel", "_scan_kernel", "_scan_backward_kernel"}


@pytest.mark.slow
def test_every_kernel_compiles_fits_the_gpu_and_reads_sixteen_bytes_at_a_time():
    command = [sys.executable, str(Path(__file__).with_name("compile_for.py")), "75", "90"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(compiled) >= 39 + 2 * 13
    for result in compiled:
        assert result["shared_bytes"] <= MAX_SHARED_BYTES[result["capability"]], result
        assert result["wide_loads"] > 0 or result["kernel"] in READ_BY_CHANNEL, result
