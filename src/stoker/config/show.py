"""The resolved configuration as YAML that loads again to the same, with where each value came from beside it."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from stoker.config import document
from stoker.config.document import Path
from stoker.config.schema import RunConfig

_PLAIN_TEXT = re.compile(r"[A-Za-z~./_][\w./+-]*(?::[\w./+-]+)*")


def to_yaml(config: RunConfig, origins: Mapping[Path, str] | None = None) -> str:
    """Returns the configuration as YAML; with `origins` (of `load_with_origins`), each line says where it came from."""
    return values_to_yaml(config.model_dump(), None if origins is None else lambda path: origins.get(path, "default"))


def values_to_yaml(values: Mapping[str, Any], comment: Callable[[Path], str] | None = None) -> str:
    """Returns nested values as YAML; `comment` says what stands behind each, nothing where it is empty."""
    return "\n".join(_lines(values, (), comment or (lambda path: ""))) + "\n"


def _lines(values: Mapping[str, Any], path: Path, comment: Callable[[Path], str]) -> list[str]:
    lines: list[str] = []
    indent = "  " * len(path)
    for name, value in sorted(values.items(), key=lambda item: item[0] != "kind"):
        inside = (*path, name)
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}:", *_lines(value, inside, comment)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{indent}{name}:")
            for index, item in enumerate(value):
                first, *rest = _lines(item, (*inside, index), comment)
                lines += [f"{first[: len(indent) + 2]}- {first.lstrip()}", *rest]
        else:
            behind = " ".join(comment(inside).split())
            lines.append(f"{indent}{inline(name)}: {inline(value)}{f'  # {behind}' if behind else ''}")
    return lines


def inline(value: Any) -> str:
    """Returns a value on one line; text is quoted wherever it could be read as something else."""
    if isinstance(value, list):
        return f"[{', '.join(map(inline, value))}]"
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value) and document.scalar(value) == value:
        return value
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
