"""Kernels are compiled ahead of the first step, side by side, without being run."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from stoker.kernels.ahead import can_compile_ahead, compiling_ahead
from stoker.kernels.rms_norm import launch_forward


def rehearse(what, folder):
    command = [sys.executable, str(Path(__file__).with_name("rehearse.py")), what]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_launches_from_any_thread_compile_once_and_do_not_run(tmp_path):
    pytest.importorskip("triton")
    # Without a GPU a launch that ran would fail.
    found = rehearse("launch", tmp_path)
    # What launches a kernel is built by the thread that compiled it, not at the first launch.
    assert found == {"compiled": ["_forward_kernel"], "launchers": [["_forward_kernel", False]], "restored": True}


@pytest.mark.slow
def test_a_rehearsal_of_a_step_compiles_what_forward_and_backward_launch(tmp_path):
    pytest.importorskip("triton")
    found = rehearse("step", tmp_path)
    assert found["grads"] == []
    assert found["random_numbers_kept"]
    counts = Counter(found["compiled"])
    # Of a layer's experts: two products and two of rank r forward, as many backward (one is the forward's), and four
    # gradients of factors.
    assert counts["_matmul_kernel"] == 8
    assert counts["_outer_kernel"] == 4
    assert {"_gate_kernel", "_gate_backward_kernel", "_combine_kernel", "_turn_logits_kernel"} <= set(counts)
    # The optimiser's: adapters in one tensor, whose step is one kernel.
    assert counts["_step_kernel"] == 1
    rehearsed, stepped = found["step"]
    # bf16 of a count that 16 divides and of another; fp32 is there already.
    assert (rehearsed, stepped) == (2, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_nothing_is_written_until_afterwards():
    assert can_compile_ahead()
    x, weight = torch.randn(8, 256, device="cuda"), torch.ones(256, device="cuda")
    with compiling_ahead():
        launch_forward(x, None, weight, 1e-6)
    normed, _, _ = launch_forward(x, None, weight, 1e-6)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x, (256,), weight, 1e-6))
