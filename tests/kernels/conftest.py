"""Kernels run on the GPU where there is one, else on the CPU under Triton's interpreter, chosen before Triton loads."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="kernels need Triton (pip install 'stoker[triton]')")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
