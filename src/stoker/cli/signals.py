"""Signals that end a command, so that what it has begun is cleared away."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_EXIT_CODE = 128 + signal.SIGTERM


@contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM, as a scheduler sends it, leaves as Ctrl-C does: through every `finally`."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: object) -> None:
    del number, frame
    raise SystemExit(_EXIT_CODE)
