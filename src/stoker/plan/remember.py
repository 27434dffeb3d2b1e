"""Results that depend on an architecture, kept from one plan to the next: 30 devices ask for the same."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_ENTRIES = 1 << 16


class _Itself:
    """A value that is equal to itself alone: hashing a spec of a hundred layers takes longer than what is remembered.

    It holds its value, so that no other can come to have the same address.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value


def remember(position: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns a decorator that computes a function once for the object at `position` and all other arguments' values.

    All arguments but that one are hashable; what it returns is never changed.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @lru_cache(maxsize=_ENTRIES)
        def known(*args: Any, **kwargs: Any) -> R:
            there = [*args]
            there[position] = args[position].value
            return function(*there, **kwargs)  # pyrefly: ignore

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            keyed: list[Any] = [*args]
            keyed[position] = _Itself(keyed[position])
            return known(*keyed, **kwargs)

        return call

    return decorate
