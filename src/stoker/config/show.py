"""The resolved configuration as YAML that loads again to the same, with where each value came from beside it."""

import json
import re
from collections.abc import Mapping
from typing import Any

from stoker.config import document
from stoker.config.document import Path
from stoker.config.schema import RunConfig

_PLAIN_TEXT = re.compile(r"[A-Za-z~./_][\w./+-]*(?::[\w./+-]+)*")


def to_yaml(config: RunConfig, origins: Mapping[Path, str] | None = None) -> str:
    """Returns the configuration as YAML; with `origins` (of `load_with_origins`), each line says where it came from."""
    return "\n".join(_lines(config.model_dump(), (), origins)) + "\n"


def _lines(values: Mapping[str, Any], path: Path, origins: Mapping[Path, str] | None) -> list[str]:
    lines: list[str] = []
    indent = "  " * len(path)
    for name, value in sorted(values.items(), key=lambda item: item[0] != "kind"):
        inside = (*path, name)
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}:", *_lines(value, inside, origins)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{indent}{name}:")
            for index, item in enumerate(value):
                first, *rest = _lines(item, (*inside, index), origins)
                lines += [f"{first[: len(indent) + 2]}- {first.lstrip()}", *rest]
        else:
            origin = "" if origins is None else origins.get(inside, "default")
            comment = f"  # {' '.join(origin.split())}" if origin else ""
            lines.append(f"{indent}{inline(name)}: {inline(value)}{comment}")
    return lines


def inline(value: Any) -> str:
    """Returns a value on one line; text is quoted wherever it could be read as something else."""
    if isinstance(value, list):
        return f"[{', '.join(map(inline, value))}]"
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value) and document.scalar(value) == value:
        return value
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
