"""The notebook for a free GPU, its cells as they are, on a CPU with the tiny model."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from stoker import builtin

pytestmark = pytest.mark.slow
NOTEBOOK = Path(__file__).parents[2] / "examples" / "free_gpu.ipynb"
PARAMETERS = """
REPOSITORY = "https://github.com/OWNER/stoker"
DATA = {data!r}
MODEL, QUANTIZATION = "builtin:tiny-llama", "nf4"
RANK, ALPHA = 8, 16
SEQUENCE_LENGTH, BATCH_SIZE, STEPS, CHECK_EVERY_STEPS = 256, 4, 8, 4
LEARNING_RATE, VALIDATION = 1e-2, 4
ENGINE = {{"precision": "auto", "num_threads": 1}}
QUESTIONS, MAX_NEW_TOKENS = ["What is LoRA?"], 12
ADAPTER = "my-adapter"
"""
FACTS = """
import json
print(json.dumps({"losses": run.losses, "before": before, "after": after, "reason": run.reason}))
"""


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """Runs the notebook's cells with other parameters, up to the first that holds `until`; returns the notebook."""
    for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)

    def run(*, data, until=None):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
        ours = PARAMETERS.format(data=data)
        assert names(parameters.source) == names(ours)
        parameters.source = ours
        if until is not None:
            end = next(index for index, cell in enumerate(notebook.cells) if until in cell.source)
            notebook.cells = notebook.cells[:end]
        else:
            notebook.cells.append(nbformat.v4.new_code_cell(FACTS))
        NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
        return notebook

    return run


def names(source):
    """Returns what the lines of a cell assign to."""
    return {name for line in source.splitlines() if " = " in line for name in line.split(" = ")[0].split(", ")}


def said(notebook):
    """Returns everything that the cells printed or showed, as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(one.get("text", "") + str(one.get("data", {}).get("text/plain", "")) for one in outputs)


def test_own_rows_are_shown_trained_on_and_the_reloaded_adapter_answers_the_same(run_notebook, tmp_path):
    rows = builtin.rows_path("fine-tuning").read_text(encoding="utf-8").splitlines()[:40]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows), encoding="utf-8")
    notebook = run_notebook(data="mine.jsonl")
    text = said(notebook)
    assert "mine.jsonl: chat" in text
    assert "trained tokens" in text
    assert "quantization         nf4" in text
    assert "not yours" not in text
    assert "pip" not in text  # Stoker is installed here, so nothing is.
    facts = json.loads(notebook.cells[-1].outputs[0].text)
    assert facts["reason"] == "finished"
    for split in ("train", "validation"):
        assert facts["losses"][split]["after"] < facts["losses"][split]["before"]
    assert facts["after"] == facts["before"] != ""
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


def test_without_rows_of_ones_own_the_notebook_says_that_it_takes_the_shipped_ones(run_notebook):
    assert "not yours" in said(run_notebook(data="", until="import stoker"))
