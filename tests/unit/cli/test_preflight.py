from pathlib import Path

import pytest

import stoker
from stoker.arch import arithmetic
from stoker.cli import preflight
from stoker.config.load import load_with_origins
from stoker.errors import ModelError


def test_a_model_on_this_disk_is_read_and_one_that_is_not_is_left_for_later(write_run):
    write_run()
    spec = preflight.local_spec("model")
    assert spec is not None
    assert arithmetic.num_parameters(spec) > 0
    assert preflight.local_spec("some/model") is None
    with pytest.raises(ModelError, match="does not exist"):
        preflight.local_spec("./nowhere")


def test_all_that_is_wrong_is_found_at_once(write_run):
    path = write_run(path="nowhere.jsonl", length="4096", extra="adapter: {targets: [nope]}")
    _, problems = preflight.look(load_with_origins(path, ["model.tokenizer=./nowhere"]))
    places = [problem.where for problem in problems]
    assert places == [f"{path}:6", f"{path}:9", f"{path}:5", "--set model.tokenizer=./nowhere"]


def test_validation_sources_are_looked_at_too(write_run):
    path = write_run()
    _, (problem,) = preflight.look(load_with_origins(path, ["data.validation=[{path: gone.csv}]"]))
    assert problem.what == "data.validation[0]: gone.csv does not exist."


def test_addresses_are_left_for_the_run(write_run):
    path = write_run(path="s3://bucket/rows.jsonl.zst")
    assert preflight.look(load_with_origins(path))[1] == []


def test_the_shipped_templates_are_those_of_the_data_room():
    folder = Path(stoker.__file__).parent / "data" / "templates"
    assert set(preflight.shipped_templates()) == {file.stem for file in folder.iterdir() if file.suffix == ".jinja"}
    assert "chatml" in preflight.shipped_templates()
