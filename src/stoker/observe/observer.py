"""Observers receive every event of a run; the trainer knows nothing else of progress bars, files or trackers."""

from typing import Protocol

from stoker.observe.events import Event


class Observer(Protocol):
    """Something that shows or stores events. It must not change the run; what it does not care for it ignores."""

    def handle(self, event: Event) -> None:
        """Takes in one event."""

    def close(self) -> None:
        """Releases what it holds (files, a live display); called once, also after a failure."""
