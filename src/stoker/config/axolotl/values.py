"""Values as Axolotl takes them: numbers may be quoted, and YAML 1.1's `yes`, `no`, `on` and `off` are booleans."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stoker.config.axolotl.outcome import UnreadableError

Convert = Callable[[Any], Any]

_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def text(value: Any) -> str:
    """Returns a text; a number stands for the text that it was written as."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UnreadableError("it must be text.")
    return str(value)


def texts(value: Any) -> list[str]:
    """Returns a list of texts; one alone stands for a list of one."""
    items = value if isinstance(value, list) else [value]
    return [text(item) for item in items]


def flag(value: Any) -> bool:
    """Returns a boolean."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _FLAGS:
        return _FLAGS[value.lower()]
    if value in (0, 1):
        return bool(value)
    raise UnreadableError("it must be true or false.")


def number(value: Any) -> float:
    """Returns a number; `2e-5` arrives as text where YAML 1.1 was read, or where it is quoted."""
    if isinstance(value, bool):
        raise UnreadableError("it must be a number.")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UnreadableError("it must be a number.") from None


def whole(value: Any) -> int:
    """Returns a whole number; `10.0` is one."""
    found = number(value)
    if not math.isfinite(found) or found != int(found):
        raise UnreadableError("it must be a whole number.")
    return int(found)


def positive(value: Any) -> int:
    """Returns a whole number of at least 1."""
    found = whole(value)
    if found < 1:
        raise UnreadableError("it must be at least 1.")
    return found


def is_off(value: Any) -> bool:
    """Whether the value turns a feature off."""
    return value in (False, 0, 0.0) or (isinstance(value, str) and value.lower() in ("false", "no", "off", "none"))


def advice(name: str, known: Iterable[str]) -> str:
    """Returns the known name that a misspelt one is close to, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, 1, 0.75)
    return f"Did you mean {close[0]}?" if close else f"Use one of {', '.join(names)}."


def asks(keys: Mapping[str, Any], name: str) -> bool:
    """Whether a switch of the top level is turned on; blank and `auto` are not."""
    value = keys.get(name)
    if value is None or value == "auto":
        return False
    return value == "full" or flag(value)
