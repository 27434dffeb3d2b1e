from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from stoker.config.load import parse
from stoker.config.schema import RunConfig
from stoker.errors import ConfigError

MINIMAL = """\
model: {base: builtin:tiny-llama}
data:
  train:
    - path: rows.jsonl
train: {learning_rate: 2e-4}
output: {folder: runs/x}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    """A YAML file with nothing but what is required."""
    return _write(tmp_path, MINIMAL)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a YAML text to a file and returns its path."""
    return lambda text: _write(tmp_path, text)


def _write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def parsed() -> Callable[..., RunConfig]:
    """Parses the minimal configuration with overrides."""
    return lambda *overrides: parse(_minimal(), overrides)


@pytest.fixture
def complaints() -> Callable[..., list[str]]:
    """Returns the problems of the minimal configuration with overrides, as the user reads them."""

    def messages(*overrides: str, values: dict[str, Any] | None = None) -> Sequence[str]:
        with pytest.raises(ConfigError) as caught:
            parse(values if values is not None else _minimal(), overrides)
        return [f"{problem.what} {problem.fix or ''}".strip() for problem in caught.value.problems]

    return messages


def _minimal() -> dict[str, Any]:
    return {
        "model": {"base": "builtin:tiny-llama"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "train": {"learning_rate": 2e-4},
        "output": {"folder": "runs/x"},
    }
