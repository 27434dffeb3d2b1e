"""Axolotl's sequence parallelism, by both its names, as `engine.context_parallel`."""

from stoker.config.axolotl.outcome import Outcome, Reading, UnreadableError
from stoker.config.axolotl.values import whole


def context_size(reading: Reading) -> Outcome:
    """`context_parallel_size`, and `sequence_parallel_degree`, its older name, which counts where the first is not."""
    size = whole(reading.value)
    if size < 1:
        raise UnreadableError("it must be at least 1.")
    if size == 1:
        return Outcome("no effect", "1, as it is here")
    if str(reading.path[-1]) == "sequence_parallel_degree" and reading.other("context_parallel_size") is not None:
        return Outcome("no effect", "context_parallel_size says it")
    note = f"start a multiple of {size} processes (--gpus)"
    return Outcome("honoured", f"engine.context_parallel: {size}; {note}", {("engine", "context_parallel"): size}, note)
