"""The Python API and the notebook that shows it."""

import json
from pathlib import Path

import nbformat
import pytest

import stoker
from stoker.config.load import load
from stoker.errors import ConfigError, DataError

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_load_adapt_train_generate_save_and_load_again(tiny_model, rows, tmp_path):
    model = stoker.load(str(tiny_model), device="cpu")
    model.add_lora(rank=4, alpha=8)
    run = model.train(rows(12), learning_rate=0.02, steps=6, batch_size=4, validation=2)
    assert run.reason == "finished"
    assert run.losses["train"]["after"] < run.losses["train"]["before"]
    assert (run.folder / "report.html").is_file()
    answer = model.generate("What is 3 plus one?", max_new_tokens=8)
    folder = model.save(tmp_path / "adapter")
    assert stoker.load(str(folder), device="cpu").generate("What is 3 plus one?", max_new_tokens=8) == answer


def test_without_adapter_every_weight_is_trained_and_saved(tiny_model, rows, tmp_path):
    model = stoker.load(str(tiny_model), device="cpu")
    run = model.train(rows(8), learning_rate=1e-3, steps=2, batch_size=4)
    assert (run.folder / "model/model.safetensors").is_file()
    assert (model.save(tmp_path / "model") / "config.json").is_file()


def test_training_goes_on_from_where_it_was(tiny_model, rows):
    model = stoker.load(str(tiny_model), device="cpu").add_lora(rank=4)
    first = model.train(rows(8), learning_rate=0.01, steps=3, batch_size=4)
    second = model.train(rows(8), learning_rate=0.01, steps=1, batch_size=4)
    assert second.folder != first.folder
    assert second.losses["train"]["before"] == pytest.approx(first.losses["train"]["after"], abs=1e-6)


def test_wrong_settings_and_rows_are_refused_by_name(tiny_model, rows):
    model = stoker.load(str(tiny_model), device="cpu")
    with pytest.raises(ConfigError, match="rnak"):
        model.add_lora(rnak=4)
    with pytest.raises(DataError, match="no rows"):
        model.train([], learning_rate=0.01)
    model.add_lora(rank=2)
    with pytest.raises(ConfigError, match="adapter already"):
        model.add_lora(rank=2)


def test_rows_are_shown_as_the_model_sees_them_and_leave_nothing_behind(tiny_model, rows, tmp_path, capsys):
    model = stoker.load(str(tiny_model), device="cpu")
    model.inspect(rows(5), n=2, data={"sequence_length": 128, "cache_folder": str(tmp_path / "cache")})
    said = capsys.readouterr().out
    assert "⟦It is 1.<|end|>⟧" in said
    assert "⟦It is 2.<|end|>⟧" in said
    assert "⟦It is 3.<|end|>⟧" not in said
    assert "trained turns" in said
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    with pytest.raises(ConfigError, match="sequence_lenght"):
        model.inspect(rows(5), data={"sequence_lenght": 128})


def test_a_file_serves_as_rows_and_the_runs_configuration_names_it(tiny_model, rows, tmp_path, capsys):
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    Path("held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    model = stoker.load(str(tiny_model), device="cpu").add_lora(rank=2)
    model.inspect("mine.jsonl")
    assert "mine.jsonl" in capsys.readouterr().out
    run = model.train("mine.jsonl", learning_rate=0.01, steps=1, batch_size=4, validation=Path("held.jsonl"))
    assert set(run.losses) == {"train", "validation"}
    data = load(run.folder / "config.yaml").data
    assert (data.train[0].path, data.validation[0].path) == ("mine.jsonl", "held.jsonl")
    with pytest.raises(DataError, match="nowhere"):
        model.inspect("nowhere.jsonl")


def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    notebook = nbformat.read(EXAMPLES / "fine_tune.ipynb", as_version=4)
    (training,) = (cell for cell in notebook.cells if "steps=20," in cell.source)
    training.source = training.source.replace("steps=20,", "steps=2,")  # 160,000 tokens take a core half a minute
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "finished" in said
