"""SIGTERM and Ctrl-C end a run after the current step, with a checkpoint; a second Ctrl-C ends it now."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Within its `with` block the first SIGINT or SIGTERM only sets `requested`; the next one acts as it did before.

    In a thread other than the main one, where Python delivers no signals, it never becomes requested. A signal that the
    process was told to ignore (SIGINT, for a job that a shell put in the background) stays ignored. One of many
    processes `speaks`.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self._speaks = speaks
        self.requested = False
        self.name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.name = signal.Signals(number).name
        self._give_back()
        if not self._speaks:
            return
        # Straight to the descriptor: a print could land inside another print and fail.
        os.write(2, f"\n{self.name}: finishing the step and saving. Ctrl-C again ends now.\n".encode())

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
