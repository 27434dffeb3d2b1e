import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from stoker.arch import families
from stoker.errors import ModelError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 300,
    "max_position_embeddings": 1024,
}


def write_weights(folder: Path, names: Sequence[str]) -> None:
    """Writes a safetensors file of tensors without values: checking reads names alone."""
    header = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def stored_names(config: dict[str, Any]) -> list[str]:
    """The tensors of a native model; one name of no meaning for another."""
    try:
        spec = families.read(config, "config.json")
    except ModelError:
        return ["weight"]
    return [name for entry in families.weight_map(spec) for name in entry.theirs]


@pytest.fixture
def weight_names() -> list[str]:
    """The tensors of the model that `write_run` writes."""
    return stored_names(CONFIG)


@pytest.fixture(name="write_weights")
def weights_writer() -> Callable[[Path, Sequence[str]], None]:
    """Writes tensors of these names in a folder."""
    return write_weights


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
        written = CONFIG | (config or {})
        (model / "config.json").write_text(json.dumps(written))
        (model / "tokenizer.json").write_text("{}")
        write_weights(model, stored_names(written))
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
