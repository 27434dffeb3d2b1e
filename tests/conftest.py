"""Choices that must be made before any test imports the package; puts this folder where tests can import from it."""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# Workers of pytest share the cores, and tensors are tiny: OpenMP's threads would mostly wait, spinning, for one another
# (two workers of two threads on two cores: five times the processor time of one thread each).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path.insert(0, str(Path(__file__).parent))

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests must not depend on it.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # Triton decides when a kernel is defined, at the package's import, whether it will run under its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What this machine has measured must not decide what tests see, nor tests what it keeps.
os.environ["STOKER_CACHE"] = tempfile.mkdtemp(prefix="stoker-tests-")
atexit.register(shutil.rmtree, os.environ["STOKER_CACHE"], ignore_errors=True)


def pytest_collection_finish():
    """Hides what lives to the end (modules, collected tests) from the collector, which would walk it each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # what extensions hold is let go at exit, or they report leaks
