"""Reads typed values from a parsed `config.json`, with errors that name the key, its value and the file."""

from collections.abc import Mapping
from typing import Any

from stoker.errors import ModelError


class ConfigReader:
    """`config` with the `defaults` of its model type; `where` names the file in errors."""

    def __init__(self, config: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> None:
        self.config = config
        self.where = where
        self.defaults = defaults

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; when absent, the model type's default, else `default`."""
        return self.config.get(key, self.defaults.get(key, default))

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{key} = {value!r} is not a whole number of at least 1.")
        return value

    def optional_size(self, key: str) -> int | None:
        """A whole number of at least 1, or None."""
        return None if self.get(key) is None else self.size(key)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number greater than zero."""
        return self.number_above(0.0, key, self.get(key, default))

    def number_above(self, bound: float, key: str, value: Any) -> float:
        """`value` as a float greater than `bound`; `key` names it in the error."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > bound:
            raise self.error(f"{key} = {value!r} is not a number greater than {bound:g}.")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} = {value!r} is neither true nor false.")
        return value

    def require(self, key: str, expected: Any, *, fix: str) -> None:
        """Refuses any value of `key` but absence, null and `expected`."""
        value = self.get(key)
        if value is not None and value != expected:
            shown = f"{key} = {value!r}" if isinstance(value, str | int | float) else f"{key} is set, which"
            raise self.error(f"{shown} is not supported for this model type.", fix=fix)

    def left_out(self, *keys: str) -> tuple[str, ...]:
        """Those of `keys` that are not zero, with their values, for `ArchSpec.left_out`."""
        return tuple(f"{key} = {self.get(key)}" for key in keys if self.get(key))

    def error(self, what: str, *, fix: str | None = None) -> ModelError:
        """A ModelError that says `what` is wrong in this file."""
        return ModelError(what, where=self.where, fix=fix)
