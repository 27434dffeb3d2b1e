"""`--set a.b=value`: one value put in place of, or beside, what the YAML says."""

from typing import Any

from stoker.config import document
from stoker.config.document import Path, dotted
from stoker.errors import Problem

_NOT_A_SECTION = "holds no settings of its own."


def apply_override(override: str, values: dict[str, Any], origins: dict[Path, str]) -> Problem | None:
    """Sets one `a.b=value` in `values` and notes it in `origins`; returns what is wrong with the override's own form.

    The value is read as YAML (`1e-4`, `true`, `[q_proj, v_proj]`); an entry of a list is named by its number from 0
    (`data.train.0.path`). Sections that do not exist yet are made. Whether the setting exists is checked later.
    """
    where = f"--set {override}"
    name, equals, text = override.partition("=")
    keys = name.strip().replace("[", ".").replace("]", "").split(".")
    if not equals or not all(keys):
        return Problem("an override is written as name=value.", where, "Example: --set train.learning_rate=1e-4")
    try:
        value = document.scalar(text)
    except ValueError as error:
        return Problem(str(error), where, "Quote the value.")
    target: Any = values
    path: Path = ()
    for key in keys[:-1]:
        if isinstance(target, dict) and target.get(key) is None:
            target[key] = {}
        problem = _cannot_enter(target, key, path)
        if problem:
            return Problem(problem, where)
        part = int(key) if isinstance(target, list) else key
        target, path = target[part], (*path, part)
    problem = _cannot_enter(target, keys[-1], path)
    if problem:
        return Problem(problem, where)
    part = int(keys[-1]) if isinstance(target, list) else keys[-1]
    target[part] = value
    path = (*path, part)
    for old in [old for old in origins if old[: len(path)] == path]:
        del origins[old]
    origins.update(dict.fromkeys(document.paths(value, path), where))
    return None


def _cannot_enter(target: Any, key: str, path: Path) -> str | None:
    """Returns why `key` cannot be reached in `target`, which lies at `path`."""
    if isinstance(target, dict):
        return None
    if not isinstance(target, list):
        return f"{dotted(path)} {_NOT_A_SECTION}"
    if key.isdigit() and int(key) < len(target):
        return None
    return f"{dotted(path)} is a list of {len(target)}; name an entry by its number, counted from 0."
