"""Says what the first step took beyond the others: kernels compile, libraries choose, memory is asked for."""

from stoker.distributed.rehearsal import Rehearsal

_NOTICEABLE_SECONDS = 1.0
_TIMES_AS_LONG = 2.0


class WarmUp:
    """Compares the first step of a process with the second; `reason` follows the sentence, in brackets."""

    def __init__(self, reason: str = "") -> None:
        self._reason = f" ({reason})" if reason else ""
        self._first: float | None = None
        self._is_told = False

    def after(self, seconds: float, rehearsal: Rehearsal | None = None) -> str | None:
        """Takes the seconds of each step in turn; returns a sentence after the second if the first was far longer.

        `rehearsal`: what of the first went into one.
        """
        if self._first is None:
            self._first = seconds
            return None
        if self._is_told:
            return None
        self._is_told = True
        extra = self._first - seconds
        if extra < _NOTICEABLE_SECONDS or self._first < _TIMES_AS_LONG * seconds:
            return None
        parts = "" if rehearsal is None else f" Of the first: {rehearsal.describe()}."
        return f"Warm-up: the first step took {self._first:.1f} s, the second {seconds:.1f} s{self._reason}.{parts}"
