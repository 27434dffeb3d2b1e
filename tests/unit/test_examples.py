import json
from pathlib import Path

import pytest

from stoker.arch.families import FAMILIES
from stoker.builtin import is_builtin, resolve_model, resolve_rows
from stoker.config.load import load

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("models/*.yaml"), *FOLDER.glob("choosing/*.yaml")])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_each_example_loads_and_opens_with_the_command_that_runs_it(path):
    load(path)
    command = f"# stoker train examples/{path.relative_to(FOLDER)}\n"
    assert path.read_text(encoding="utf-8").startswith(command)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_what_an_example_calls_builtin_exists(path):
    config = load(path)
    validation = config.data.validation if isinstance(config.data.validation, list) else []
    for source in [*config.data.train, *validation]:
        if is_builtin(source.path):
            assert resolve_rows(source.path).is_file()
    if is_builtin(config.model.base):
        assert resolve_model(config.model.base).is_dir()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_native_type_has_an_example_by_its_name_or_in_its_head(model_type):
    heads = {path.stem: path.read_text(encoding="utf-8").partition("model:\n")[0] for path in EXAMPLES}
    assert any(stem == model_type or f"(model type {model_type})" in head for stem, head in heads.items())


def test_the_quickstart_asks_what_its_rows_answer():
    config = load(Path(__file__).parents[2] / "examples" / "quickstart.yaml")
    rows = resolve_rows(config.data.train[0].path).read_text(encoding="utf-8").splitlines()
    asked = {json.loads(row)["messages"][-2]["content"] for row in rows}
    assert len(config.output.questions) == 3
    assert set(config.output.questions) <= asked
