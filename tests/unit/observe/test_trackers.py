import importlib.machinery
import sys
import types

import pytest

from stoker.errors import ConfigError
from stoker.observe import trackers
from stoker.observe.events import Evaluated, Notice


def test_tensorboard_stores_scalars_that_its_own_reader_finds(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = trackers.build(["tensorboard"], tmp_path, run_name="run", config={})
    tracker.handle(Evaluated(step=7, loss=1.5, num_trained_tokens=1, seconds=0.1))
    tracker.handle(Notice("not a number"))
    tracker.close()
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    (scalar,) = reader.Scalars("validation/loss")
    assert (scalar.step, scalar.value) == (7, 1.5)


def test_missing_package_is_an_error_that_names_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "is_installed", lambda name: False)
    with pytest.raises(ConfigError, match="pip install wandb"):
        trackers.build(["wandb"], tmp_path, run_name="run", config={})


def test_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="comet"):
        trackers.build(["comet"], tmp_path, run_name="run", config={})


def test_nested_settings_are_flattened_with_dots():
    assert trackers.flatten({"train": {"seed": 1}, "x": "y"}) == [("train.seed", "1"), ("x", "y")]


def test_weights_and_biases_gets_its_settings(tmp_path, monkeypatch):
    asked = {}
    module = types.ModuleType("wandb")
    module.init = lambda **settings: asked.update(settings)
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    settings = {"project": "p", "entity": None, "name": "mine", "run_id": "abc", "mode": "offline"}

    trackers.build(["wandb"], tmp_path, run_name="run", config={"a": 1}, wandb=settings)

    assert asked == {
        "dir": str(tmp_path),
        "name": "mine",
        "config": {"a": 1},
        "project": "p",
        "mode": "offline",
        "id": "abc",
        "resume": "allow",
    }
