import importlib.util
from pathlib import Path

import pytest
import torch

TOY = Path(__file__).parent / "toy.py"


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are several times slower when two threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def toy():
    """The module beside this file: a tiny model, its rows and the pieces of a trainer."""
    spec = importlib.util.spec_from_file_location("toy_for_train_tests", TOY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
