from pathlib import Path

import pytest

from stoker.compose.bench import shapes
from stoker.compose.model import open_base
from stoker.config.load import parse


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The smallest shape, written."""
    return shapes.resolve("shape:llama-tiny", device="cpu", folder=tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def base(folder):
    return open_base(str(folder))


@pytest.fixture
def config():
    """Makes a configuration of a small run, with overrides."""

    def make(*overrides):
        values = {
            "model": {"base": "shape:llama-tiny"},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"train": [{"path": "?"}], "sequence_length": 32, "packing": False},
            "train": {"batch_size": 4, "learning_rate": 1e-3},
            "engine": {"device": "cpu", "micro_batch_size": 2, "num_threads": 1},
            "output": {"folder": "runs/x"},
        }
        return parse(values, overrides)

    return make
