"""Choices that must be made before any test imports the package."""

import os

import torch

if not torch.cuda.is_available():
    # Triton decides when a kernel is defined, at the package's import, whether it will run under its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
