import json
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 300,
    "max_position_embeddings": 1024,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write_run(here: Path) -> Callable[..., Path]:
    """Writes a run over a local model and a file of rows, both there; returns the YAML's path."""

    def write(*, config: dict[str, object] | None = None, **changes: str) -> Path:
        model = here / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(CONFIG | (config or {})))
        (here / "rows.jsonl").write_text('{"text": "a"}\n')
        values = {"base": "model", "path": "rows.jsonl", "length": "512", "extra": ""} | changes
        path = here / "run.yaml"
        path.write_text(
            f"model:\n  base: {values['base']}\n"
            f"data:\n  train:\n    - path: {values['path']}\n  sequence_length: {values['length']}\n"
            f"train: {{learning_rate: 1e-3}}\noutput: {{folder: runs/x}}\n{values['extra']}\n"
        )
        return path

    return write
