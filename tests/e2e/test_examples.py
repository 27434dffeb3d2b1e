"""Every example runs as it is, on a tiny model in the place of its own."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_trains(path, stoker, tiny_model):
    (stoker.folder / "examples").symlink_to(ROOT / "examples")
    changed = {
        "model.base": tiny_model,
        "data.sequence_length": 1024,
        "data.on_long": "truncate",
        "train.steps": 2,
        "train.epochs": "null",
        "train.batch_size": 2,
        "output.trackers": "[]",
    }
    if "pretraining" in path.name:
        del changed["data.on_long"]
    arguments = [part for name, value in changed.items() for part in ("--set", f"{name}={value}")]
    assert "report.html" in stoker("train", f"examples/{path.name}", *arguments).stdout
