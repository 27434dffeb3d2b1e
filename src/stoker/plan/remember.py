"""Results that depend on an architecture, kept from one plan to the next: 30 devices ask for the same."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_ENTRIES = 1 << 16


def remember(*positions: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns a decorator that computes a function once for the objects at `positions` and all other arguments' values.

    All arguments but those are hashable; what it returns is never changed. The objects are told apart by identity:
    hashing a spec of a hundred layers takes longer than what is remembered.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        # With what was found the arguments are kept, so that no other object can come to have the address of one.
        known: dict[tuple[Any, ...], tuple[R, tuple[Any, ...]]] = {}

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            keyed: list[Any] = [*args]
            for position in positions:
                keyed[position] = id(keyed[position])
            key = (*keyed, *kwargs.items())
            found = known.get(key)
            if found is None:
                if len(known) >= _ENTRIES:
                    known.clear()
                found = known[key] = function(*args, **kwargs), args
            return found[0]

        return call

    return decorate
