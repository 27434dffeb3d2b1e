"""Training rows that come in windows: streamed, or prepared while training runs."""

import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.compose.source_options import source_options
from stoker.compose.sources import cache_folder, row_options
from stoker.config.schema import RunConfig
from stoker.data import cache, storage
from stoker.data.batch import Batch
from stoker.data.collate import Collator
from stoker.data.growing import GrowingWindows
from stoker.data.preparation import Preparation
from stoker.data.prepare import Prepared, Progress, describe, pool_for, through_cache
from stoker.data.shared_pool import SharedPool
from stoker.data.stream_loader import StreamLoader
from stoker.data.streaming import StreamedWindows
from stoker.data.windows import RowStream, Windows
from stoker.data.workers import Workers
from stoker.data.writers import MemoryWriter

if TYPE_CHECKING:
    from stoker.distributed.ranks import Ranks

_JOIN_SECONDS = 10.0


def is_windowed(config: RunConfig) -> bool:
    """Whether training begins before all rows are prepared."""
    return config.data.streaming or config.data.prepare == "overlap"


def preparation_of(config: RunConfig, tokenizer: object) -> Preparation:
    """Returns what the training rows are made from; sources are found, their first rows are not looked at yet."""
    sources = [source_options(source) for source in config.data.train]
    return describe(sources, tokenizer=tokenizer, streaming=config.data.streaming, **row_options(config))


def sample(preparation: Preparation) -> Prepared:
    """Returns the documents of each source's first rows, whose audit stands for the rest.

    Raises:
        DataError: a source is empty or malformed, or one of these rows is wrong.
    """
    maker, writer, tally = preparation.maker, MemoryWriter(), preparation.tally.taken()
    for number in range(len(preparation.sources)):
        writer.begin_source()
        chunk, _ = next(preparation.chunks(number))
        made = maker.make(chunk)
        writer.add(made.tokens)
        tally.merge(made.tally)
    audit = preparation.audit(tally)
    return writer.finish(audit, documents_per_example=preparation.documents_per_example)


def stream_loader(
    config: RunConfig,
    preparation: Preparation,
    *,
    micro_batch_size: int,
    pad_id: int,
    first: list[Batch],
    ranks: "Ranks | None" = None,
    rank: int = 0,
    world_size: int = 1,
    part: int = 0,
    num_parts: int = 1,
) -> StreamLoader:
    """Returns the batches of rows in windows; `first` are those to measure the loss on.

    `ranks` are the processes that read the same rows and share the work, None if there is one; this one gets share
    `rank` of `world_size` of each step, and of its rows part `part` of `num_parts`.
    """
    data, together = config.data, preparation.documents_per_example
    collator = Collator(
        micro_batch_size=micro_batch_size,
        sequence_length=data.sequence_length,
        packing=data.packing,
        rank=rank,
        world_size=world_size,
        pad_id=pad_id,
        documents_per_example=together,
        part=part,
        num_parts=num_parts,
    )
    window_tokens = data.window_sequences * collator.row_tokens
    weights = [source.weight for source in data.train if source.weight is not None]
    opened = (
        _streamed(config, preparation, window_tokens, ranks)
        if data.streaming
        else _overlapped(config, preparation, window_tokens)
    )
    streams = [
        RowStream(
            one,
            seed=config.train.seed,
            salt=number,
            capacity=collator.row_tokens if data.packing else None,
            shuffle=data.shuffle,
            ahead=opened.ahead,
        )
        for number, one in enumerate(opened.windows)
    ]
    assert config.train.steps is not None  # a rule of the configuration
    return StreamLoader(
        streams,
        collator=collator,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        steps_per_epoch=config.train.steps,
        weights=weights or None,
        sample=first,
        on_close=opened.close,
    )


@dataclass(frozen=True)
class _Opened:
    """Windows, whether to fetch them in a thread, and what ends it all: called before the threads end, and after."""

    windows: Sequence[Windows]
    ahead: bool
    close: tuple[Callable[[], None], Callable[[], None]]


def _streamed(config: RunConfig, preparation: Preparation, window_tokens: int, ranks: "Ranks | None") -> _Opened:
    is_shared = ranks is not None and ranks.world_size > 1
    pool = pool_for(preparation, config.data.num_workers, num_cores=_cores(ranks) if is_shared else None)
    if is_shared:
        pool = SharedPool(pool, ranks.gather, rank=ranks.rank, world_size=ranks.world_size)
    pool.__enter__()
    numbers = range(len(preparation.sources))
    is_mixed = config.data.train[0].weight is not None
    parts = [(number,) for number in numbers] if is_mixed else [tuple(numbers)]
    windows = [StreamedWindows(preparation, part, pool, window_tokens=window_tokens) for part in parts]
    # One maker in this process serves one thread at a time, and ranks speak to each other in one thread each.
    return _Opened(windows, isinstance(pool, Workers), (lambda: None, lambda: pool.__exit__(None, None, None)))


def _cores(ranks: "Ranks") -> int:
    """Returns how many cores this process has to itself; those that several processes may use, they share."""
    host, own = socket.gethostname(), storage.cores()
    users = Counter(core for name, cores in ranks.gather((host, own)) if name == host for core in cores)
    return max(1, int(sum(1 / users[core] for core in own)))


class _EnoughError(Exception):
    """Training has ended before the preparation has."""


def _overlapped(config: RunConfig, preparation: Preparation, window_tokens: int) -> _Opened:
    place, stopped = cache_folder(config.data), threading.Event()
    folder = place / cache.key(preparation.identity(cache.Digests(place)))

    def report(_: Progress) -> None:
        if stopped.is_set():
            raise _EnoughError

    def prepare() -> Prepared:
        return through_cache(preparation, place, num_workers=config.data.num_workers, report=report)

    windows = GrowingWindows(
        prepare, folder, window_tokens=window_tokens, documents_per_example=preparation.documents_per_example
    )
    # Whoever fetches a window may wait for a preparation that ends before it comes to it.
    return _Opened([windows], True, (stopped.set, lambda: windows.join(_JOIN_SECONDS)))
