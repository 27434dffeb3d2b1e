from collections.abc import Callable
from typing import Any

import pytest

from stoker.config.axolotl.report import Line
from stoker.config.axolotl.translate import Translation, translate
from stoker.config.load import parse
from stoker.config.schema import RunConfig

MINIMAL: dict[str, Any] = {
    "base_model": "meta-llama/Llama-3.2-1B",
    "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
    "learning_rate": 0.0002,
}
LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}


@pytest.fixture
def translated() -> Callable[..., Translation]:
    """Translates the smallest file with further keys; None leaves a key blank."""
    return lambda **keys: translate(MINIMAL | keys, file="their.yml")


@pytest.fixture
def config() -> Callable[..., RunConfig]:
    """Returns the configuration of the smallest file with further keys."""
    return lambda **keys: parse(MINIMAL | keys)


@pytest.fixture
def line(translated: Callable[..., Translation]) -> Callable[..., Line]:
    """Returns the report's line of the first of the keys."""

    def of(**keys: Any) -> Line:
        name = next(iter(keys))
        return next(line for line in translated(**keys).report.lines if line.name == name)

    return of


@pytest.fixture
def problem(translated: Callable[..., Translation]) -> Callable[..., str]:
    """Returns the only problem of the smallest file with further keys, as the user reads it."""

    def of(**keys: Any) -> str:
        (found,) = translated(**keys).problems
        return str(found)

    return of
