"""Several gloo processes on a CPU; `make test-distributed` runs all cases, `make test` the quick ones."""

import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent))


_FOLDER = Path(__file__).parent
_SECONDS = 1800.0


def pytest_collection_modifyitems(items):
    """Gives these tests more time than others: their processes share a few cores, and the first pays for a fixture."""
    for item in items:
        if item.path.parent == _FOLDER and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_SECONDS))


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """What two processes found of sharding and checkpoints (`sharding_jobs`), begun once for all workers of pytest."""
    import jobs
    import sharding_jobs

    base = tmp_path_factory.getbasetemp()
    base = (base if worker_id == "master" else base.parent) / "shared"
    with FileLock(f"{base}.lock"):
        if not (base / "result.pt").exists():
            base.mkdir()
            sharding_jobs.save(base / "model")
            for kind, names in sharding_jobs.CHECKPOINTED.items():
                sharding_jobs.all_of(None, "single", names, base / kind)
            jobs.on_ranks(2, base, sharding_jobs.everything, base / "model", base)
    found = torch.load(base / "result.pt", weights_only=False)
    return {**found, "folder": base / "model", "checkpoints at": base}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
