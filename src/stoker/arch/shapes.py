"""Sizes of well-known models (`shapes.toml`), to plan for one that is not at hand. No download, no torch."""

import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from stoker.arch import families
from stoker.arch.spec import ArchSpec
from stoker.errors import ModelError

# What TOML cannot say: these settings are null in the models' config.json, and mean another thing if they are absent.
_NULLS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
}


@cache
def _shapes() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("stoker.arch").joinpath("shapes.toml").read_text(encoding="utf-8"))


def names() -> tuple[str, ...]:
    """Returns the names of all shapes."""
    return tuple(_shapes())


def config(name: str) -> dict[str, Any]:
    """Returns the config.json of a shape.

    Raises:
        ModelError: there is no such shape; the message has the nearest.
    """
    facts = _shapes().get(name)
    if facts is None:
        close = difflib.get_close_matches(name.lower(), _shapes(), 3, 0.5)
        near = f"Did you mean {' or '.join(close)}? " if close else ""
        raise ModelError(f"there is no shape {name!r}.", fix=f"{near}Known: {', '.join(_shapes())}.")
    sizes = {key: value for key, value in facts.items() if key != "parameters"}
    return {**sizes, **_NULLS.get(facts["model_type"], {})}


def num_parameters(name: str) -> int:
    """Returns how many parameters the published files hold."""
    return _shapes()[name]["parameters"]


def spec(name: str) -> ArchSpec:
    """Returns the architecture of a shape; raises ModelError if there is none of that name."""
    return families.read(config(name), f"shape {name}")


def of_model(base: str) -> str | None:
    """Returns the shape that a Hub id most likely has ("meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b"), or None."""
    last = base.rpartition("/")[2].lower().replace("meta-llama", "llama").replace("_", "-")
    fits = [name for name in _shapes() if last == name or last.startswith(f"{name}-")]
    return max(fits, key=len, default=None)
