"""From sources to tokenised, masked documents: read, convert, render, tokenise, count, keep."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stoker.data import cache
from stoker.data.documents import Made, RowChunk
from stoker.data.duplicates import Seen
from stoker.data.options import SourceOptions
from stoker.data.preparation import Opened, Preparation
from stoker.data.prepared import Prepared, Selection
from stoker.data.rows import Training
from stoker.data.sources import Position
from stoker.data.workers import InProcess, Pool, Workers
from stoker.data.writers import FolderWriter, MemoryWriter, Writer
from stoker.errors import DataError

__all__ = ["Prepared", "Progress", "Selection", "SourceOptions", "describe", "prepare", "split"]


@dataclass(frozen=True)
class Progress:
    """How far a preparation is: `rows` done, and `share` of the sources' bytes or rows (None where that is not known).

    `waiting`: another process prepares the same data, and this one waits for it.
    """

    rows: int
    share: float | None = None
    waiting: bool = False


Report = Callable[[Progress], None]


def describe(
    sources: Sequence[SourceOptions],
    *,
    tokenizer: Any,
    sequence_length: int,
    train_on: str | Sequence[str] = "assistant",
    train_on_end_of_turn: bool | str = True,
    end_of_turn_tokens: Sequence[str] = (),
    template: str | None = None,
    on_bad_row: str = "stop",
    on_long: str = "truncate",
    min_length: int = 1,
    deduplicate: bool = False,
    streaming: bool = False,
) -> Preparation:
    """Finds the sources and returns what is to be prepared; nothing is read yet.

    - `train_on`: "assistant", "all" or roles.
    - `train_on_end_of_turn`: whose end-of-turn token trains: "turn" (or True) of such turns, "all", "last", "none" (or
      False); `end_of_turn_tokens`: what may end a turn, unless the first special token after it.
    - `template`: None for the tokenizer's own, a name of `template.NAMED`, a Jinja file or Jinja itself.
    - `on_bad_row`: "stop" or "skip"; `on_long`: "truncate", "drop", "stop" or "split" (into pieces).
    - `min_length`: documents of fewer tokens are left out; `deduplicate`: rows equal in every field are taken once.
    - `streaming`: files of Hub datasets are read where they are.

    Raises DataError for a source that is not there.
    """
    end_of_turn = {True: "turn", False: "none"}.get(train_on_end_of_turn, train_on_end_of_turn)  # type: ignore[arg-type]
    return Preparation(
        sources=[Opened.find(options, streaming=streaming) for options in sources],
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        training=Training((train_on,) if isinstance(train_on, str) else tuple(train_on), str(end_of_turn)),
        end_of_turn_tokens=tuple(end_of_turn_tokens),
        template_choice=template,
        on_bad_row=on_bad_row,
        on_long=on_long,
        min_length=min_length,
        deduplicate=deduplicate,
    )


def prepare(
    sources: Sequence[SourceOptions],
    *,
    cache_folder: Path | None = None,
    num_workers: str | int = "auto",
    progress: Report | None = None,
    **options: Any,
) -> Prepared:
    """Returns the sources as masked documents of at most `sequence_length` tokens.

    `options` are those of `describe`. `cache_folder` is where prepared data is kept by content; None keeps it in memory
    only. `num_workers` processes do the work ("auto": none for little data, else one for each core); the result does
    not depend on them. `progress` is called after each chunk of rows.

    Raises DataError for what is wrong with a source, a row or the template, with its place; OutputError if the cache
    cannot be written.
    """
    preparation = describe(sources, **options)
    report = progress or (lambda _: None)
    if cache_folder is None:
        return run(preparation, MemoryWriter(), num_workers=num_workers, report=report)
    return through_cache(preparation, Path(cache_folder).expanduser(), num_workers=num_workers, report=report)


def split(prepared: Prepared, share_or_count: float, *, seed: int = 0) -> tuple[Selection, Selection]:
    """Returns `(train, validation)`: validation is a share below 1 or a count of examples, drawn by `seed`.

    An example is a document, or the documents of a pair. Raises DataError if it would leave nothing to train on.
    """
    together = prepared.documents_per_example
    total = len(prepared) // together
    count = max(1, round(total * share_or_count) if share_or_count < 1 else int(share_or_count))
    if count >= total:
        raise DataError(
            f"data.validation = {share_or_count} takes {count} of {total} documents and leaves none to train on.",
            fix="Use a smaller share or count.",
        )
    order = np.random.default_rng(seed).permutation(total)
    parts = (np.sort(order[count:]), np.sort(order[:count]))
    train, validation = ((part[:, None] * together + np.arange(together)).reshape(-1) for part in parts)
    return Selection(prepared, train), Selection(prepared, validation, is_held_out=True)


def through_cache(preparation: Preparation, cache_folder: Path, *, num_workers: str | int, report: Report) -> Prepared:
    """Returns the documents from the cache, or makes them while others that want the same wait."""
    digests = cache.Digests(cache_folder)
    folder = cache_folder / cache.key(preparation.identity(digests))
    found, _ = _loaded(folder)
    if found is not None:
        return found
    with cache.locked(folder, on_wait=lambda: report(Progress(0, waiting=True))):
        found, notices = _loaded(folder)
        if found is not None:
            return found
        writer = folder_writer(preparation, folder, digests)
        prepared = run(preparation, writer, num_workers=num_workers, report=report)
        return replace(prepared, notices=notices)


def folder_writer(preparation: Preparation, folder: Path, digests: cache.Digests) -> FolderWriter:
    """Returns what writes the documents into the cache."""
    description = {"made_from": preparation.made_from(digests), "created": time.time()}
    return FolderWriter(folder, description=description)


def _loaded(folder: Path) -> tuple[Prepared | None, tuple[str, ...]]:
    try:
        return cache.load(folder), ()
    except cache.DamagedError as damage:
        return None, (f"The prepared data in {folder} was damaged ({damage}); it was made anew.",)


def run(preparation: Preparation, writer: Writer, *, num_workers: str | int, report: Report) -> Prepared:
    """Prepares all rows into `writer`, in order, with few chunks in memory at a time."""
    done, current = 0, -1
    with writer, pool_for(preparation, num_workers) as pool:
        for source, position, made in made_documents(preparation, pool):
            while current < source:
                writer.begin_source()
                current += 1
            writer.add(made.tokens)
            preparation.tally.merge(made.tally)
            done += made.num_rows
            share = preparation.share(source, position)
            writer.note_progress(share)
            report(Progress(done, share))
        return writer.finish(preparation.audit(), documents_per_example=preparation.documents_per_example)


def pool_for(preparation: Preparation, num_workers: str | int, *, num_cores: int | None = None) -> Pool:
    """Returns what runs the preparation's maker: processes, or none; `num_cores` is how many there are for them."""
    maker, count = preparation.maker, preparation.num_workers(num_workers, num_cores=num_cores)
    return Workers(maker, count, describe=lambda chunk: chunk.place) if count else InProcess(maker)


def made_documents(preparation: Preparation, pool: Pool) -> Iterator[tuple[int, Position, Made]]:
    """Yields the documents of each chunk of all sources, in order, with their source and the place after them."""
    numbers = range(len(preparation.sources))
    chunks: Iterable[tuple[RowChunk, Position]] = (pair for number in numbers for pair in preparation.chunks(number))
    if preparation.deduplicate:
        chunks = _without_duplicates(chunks, pool)
    for (chunk, position), made in _results(pool, "make", chunks):
        yield chunk.source, position, made


def _without_duplicates(chunks: Iterable[tuple[RowChunk, Position]], pool: Pool) -> Iterator[tuple[RowChunk, Position]]:
    """Yields the chunks with their repeated rows marked."""
    seen = Seen()
    for (chunk, position), digests in _results(pool, "digests", chunks):
        hashed = [index for index, digest in enumerate(digests) if digest is not None]
        hashes = np.frombuffer(b"".join(digests[index] for index in hashed), dtype=np.uint64)
        again = np.flatnonzero(seen.repeated(hashes))
        yield replace(chunk, leave_out=frozenset(hashed[index] for index in again)), position


def _results(
    pool: Pool, name: str, chunks: Iterable[tuple[RowChunk, Position]]
) -> Iterator[tuple[tuple[RowChunk, Position], Any]]:
    """Yields each chunk with what the pool made of it."""
    waiting: deque[tuple[RowChunk, Position]] = deque()

    def tasks() -> Iterator[RowChunk]:
        for pair in chunks:
            waiting.append(pair)
            yield pair[0]

    for result in pool.map(name, tasks()):
        yield waiting.popleft(), result
