import json
import shutil

import pytest

from stoker.compose import artifact

RUN = """
model: {base: some/base, quantization: nf4}
adapter: {rank: 2}
data: {train: [{path: rows.jsonl}]}
train: {learning_rate: 1e-3}
output: {folder: r}
"""


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text(RUN)
    settings = {"base_model_name_or_path": "some/base"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_the_base_of_a_runs_adapter_is_in_the_format_it_was_trained_on(run):
    for name in (run, run / "adapter"):
        found = artifact.find(str(name))
        assert (found.base, found.quantization) == ("some/base", "nf4")
        assert found.description.endswith("on some/base in nf4")


def test_an_adapter_without_its_run_says_nothing_of_the_format(run, tmp_path):
    moved = shutil.copytree(run / "adapter", tmp_path / "elsewhere" / "adapter")
    found = artifact.find(str(moved))
    assert found.quantization is None
    assert found.description.endswith("on some/base")


def test_a_configuration_of_another_version_does_not_stop_the_adapter_from_loading(run):
    (run / "config.yaml").write_text(RUN + "gone: true\n")
    assert artifact.find(str(run)).quantization is None
