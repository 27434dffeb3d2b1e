"""How processes that share a store find those that were started together with them, and not what others left there.

An agent's store outlives the processes that it starts again, and with several machines not every agent has counted as
many restarts: one that replaces a lost machine starts at none. So the first process asks, and only who lives answers.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from stoker.errors import TrainingError

_ASKED = "stoker/asked"
_POLL_SECONDS = 0.02


def agree(store: dist.Store, *, rank: int, world_size: int, timeout: timedelta) -> str:
    """Returns a name that all processes of this start of a run have, and none of an earlier one; all must call it.

    The first process asks with a new name. Each other answers with that name and one of its own, and is let in once
    the first has read it: an answer to an earlier name does not count, and nobody is let in by an earlier first.

    Raises:
        TrainingError: not all have come within `timeout`; the first process names those that are missing.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set(_ASKED, mine)
        missing = set(range(1, world_size))
        while missing:
            for other in sorted(missing):
                asked, _, theirs = _read(store, _answer(other)).partition(" ")
                if asked == mine:
                    store.set(_let_in(theirs), mine)
                    missing.discard(other)
            _wait(deadline, f"rank {', '.join(map(str, sorted(missing)))} of {world_size} did not come", bool(missing))
        return mine
    answered = ""
    while not (found := _read(store, _let_in(mine))):
        asked = _read(store, _ASKED)
        if asked != answered:
            store.set(_answer(rank), f"{asked} {mine}")
            answered = asked
        _wait(deadline, "rank 0 did not come", True)
    return found


def _answer(rank: int) -> str:
    return f"stoker/answer-{rank}"


def _let_in(name: str) -> str:
    return f"stoker/let-in-{name}"


def _read(store: dist.Store, key: str) -> str:
    """Returns what is there under `key`, "" if nothing is; never waits, as a plain `get` would."""
    return store.get(key).decode() if store.check([key]) else ""


def _wait(deadline: float, what: str, is_waiting: bool) -> None:
    if not is_waiting:
        return
    if time.monotonic() > deadline:
        raise TrainingError(
            f"the processes of the run did not find each other: {what}.",
            fix="Look at what the other machines printed, and whether they reach the first one's address.",
        )
    time.sleep(_POLL_SECONDS)
