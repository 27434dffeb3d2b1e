"""Signals that end a command, so that what it has begun is cleared away."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM, as a scheduler sends it, leave through every `finally`.

    A library may make another error of what a signal raises in the midst of it: that is no one's mistake, and the
    command leaves as if the signal had come through.
    """
    came: list[BaseException] = []

    def leave(number: int, frame: object) -> None:
        del frame
        came.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        raise came[-1]

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception as error:
        if not came:
            raise
        raise came[0] from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
