"""What is to be prepared: sources that were found and looked at, cut into chunks, and what makes documents of them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from stoker.data import cache, first_rows, formats, rows, sources, storage
from stoker.data.audit import Audit, Tally
from stoker.data.documents import ON_BAD_ROW, ON_LONG, DocumentMaker, RowChunk, SourceForm
from stoker.data.options import END_OF_TURN, SourceOptions
from stoker.data.readers import Line, Raw
from stoker.data.rows import Training
from stoker.data.sources import BEGINNING, Digest, Position
from stoker.errors import DataError

CHUNK_ROWS = 512
_CHUNK_BYTES = 4 << 20
_SMALL_BYTES = 8 << 20
_SMALL_ROWS = 20_000
_MAX_WORKERS = 16


@dataclass(frozen=True)
class Opened:
    """A source that was found, with its options; `source` is None for rows in memory."""

    options: SourceOptions
    source: sources.Source | None

    @classmethod
    def find(cls, options: SourceOptions, *, streaming: bool = False) -> "Opened":
        """Finds what the options name. Raises DataError if it is not there."""
        if (options.path is None) == (options.rows is None):
            raise ValueError("a source has either a path or rows")
        if options.format != "auto":
            formats.declared(options.format)
        if options.path is None:
            return cls(options, None)
        found = sources.find(
            options.path,
            split=options.split,
            name=options.name,
            data_files=options.data_files,
            revision=options.revision,
            file_type=options.file_type,
            limit=options.limit,
            shard=options.shard,
            num_shards=options.num_shards,
            streaming=streaming,
        )
        return cls(options, found)

    @property
    def label(self) -> str:
        """Its path, for messages."""
        return self.options.path or "rows in memory"

    def read(self, at: Position = BEGINNING) -> Iterator[tuple[Raw, Position]]:
        """Yields the rows from a place on, each with the place after it."""
        if self.source is not None:
            yield from self.source.read(at)
            return
        options = self.options
        chosen = islice(sources.rows_from_list(options.rows or ()), options.limit)
        for number, row in enumerate(islice(chosen, at.row, None), start=at.row + 1):
            yield row, Position(number, 0, number)

    def identity(self, digest: Digest) -> dict[str, Any]:
        """Returns what names the source's rows, as JSON values."""
        options = self.options
        if self.source is None:
            return {"content": sources.fingerprint_of_list(options.rows or ()), "limit": options.limit}
        return {"content": self.source.fingerprint(digest)}

    def made_from(self, digest: Digest) -> dict[str, Any]:
        """Returns what the cache's list shows of the source, and tells by whether it is still what it was."""
        files = self.source.files if self.source else ()
        states = {
            file if storage.is_url(file) else str(Path(file).absolute()): {
                "state": storage.state(file),
                "digest": digest(file),
            }
            for file in files
        }
        return {"label": self.label, "files": states}

    def share(self, at: Position) -> float | None:
        """Returns what part of the rows lies before a place, None if that is not known."""
        if self.source is None:
            return at.row / max(1, len(self.options.rows or ()))
        return self.source.share(at)

    @property
    def is_small(self) -> bool:
        """Whether it is prepared sooner than a worker starts."""
        if self.source is None:
            return len(self.options.rows or ()) < _SMALL_ROWS
        num_bytes = self.source.num_bytes()
        return num_bytes is not None and num_bytes < _SMALL_BYTES


@dataclass
class Preparation:
    """Rows to prepare, and how: everything that shapes the documents. `prepare.prepare` says what the options mean.

    Raises DataError for a source that is not there, ValueError for an option that does not exist.
    """

    sources: list[Opened]
    tokenizer: Any
    sequence_length: int
    training: Training
    end_of_turn_tokens: tuple[str, ...] = ()
    template_choice: str | None = None
    on_bad_row: str = "stop"
    on_long: str = "truncate"
    min_length: int = 1
    deduplicate: bool = False
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        if self.on_bad_row not in ON_BAD_ROW or self.on_long not in ON_LONG:
            raise ValueError(f"on_bad_row is one of {ON_BAD_ROW}, on_long one of {ON_LONG}")
        if self.training.end_of_turn not in END_OF_TURN:
            raise ValueError(f"train_on_end_of_turn is true, false or one of {END_OF_TURN}")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {self.sequence_length}")

    @property
    def label(self) -> str:
        """The sources' places, for messages."""
        return ", ".join(source.label for source in self.sources)

    def identity(self, digest: Digest = storage.digest) -> dict[str, Any]:
        """Returns everything that shapes the result, as JSON values."""
        return {
            "sources": [source.identity(digest) | self._reading_of(source.options) for source in self.sources],
            "tokenizer": cache.tokenizer_fingerprint(self.tokenizer),
            "sequence_length": self.sequence_length,
            "training": asdict(self.training),
            "end_of_turn_tokens": self.end_of_turn_tokens,
            "on_bad_row": self.on_bad_row,
            "on_long": self.on_long,
            "min_length": self.min_length,
            "deduplicate": self.deduplicate,
            "libraries": cache.library_versions(),
        }

    def made_from(self, digest: Digest = storage.digest) -> dict[str, Any]:
        """Returns what the cache's list shows and compares."""
        return {
            "sources": [source.made_from(digest) for source in self.sources],
            "libraries": cache.library_versions(),
        }

    @cached_property
    def maker(self) -> DocumentMaker:
        """What makes documents of chunks; looks at each source's first rows for their format.

        Raises DataError if a source is empty, malformed or of no known format, or if there is no chat template.
        """
        forms = [self._form(source) for source in self.sources]
        maker = DocumentMaker(
            sources=[form for form, _ in forms],
            tokenizer=self.tokenizer,
            training=self.training,
            end_of_turn_tokens=self.end_of_turn_tokens,
            template_choice=self.template_choice,
            sequence_length=self.sequence_length,
            on_bad_row=self.on_bad_row,
            on_long=self.on_long,
            min_length=self.min_length,
        )
        maker.check()
        for number, (_, sample) in enumerate(forms):
            maker.reader(number).ready(sample)
        return maker

    @property
    def documents_per_example(self) -> int:
        """How many documents a row gives: two for pairs."""
        return 2 if self.tally.row_kind == "pairs" else 1

    def chunks(self, number: int, at: Position = BEGINNING) -> Iterator[tuple[RowChunk, Position]]:
        """Yields the rows of source `number` in chunks, each with the place after it."""
        found: list[Raw] = []
        position, num_bytes = at, 0
        for raw, after in self.sources[number].read(at):
            found.append(raw)
            position = after
            num_bytes += len(raw.content) if isinstance(raw, Line) else 0
            if len(found) >= CHUNK_ROWS or num_bytes >= _CHUNK_BYTES:
                yield RowChunk(number, tuple(found)), position
                found, num_bytes = [], 0
        if found:
            yield RowChunk(number, tuple(found)), position

    def share(self, number: int, at: Position) -> float | None:
        """Returns what part of all rows lies before a place in source `number`, None if that is not known.

        Sources count by their bytes; where those are not known, as equal.
        """
        own = self.sources[number].share(at)
        if own is None:
            return None
        sizes = self._sizes
        return (sum(sizes[:number]) + own * sizes[number]) / sum(sizes)

    @cached_property
    def _sizes(self) -> list[int]:
        found = [source.source.num_bytes() if source.source else None for source in self.sources]
        known = [size for size in found if size is not None]
        return known if len(known) == len(found) and sum(known) else [1] * len(found)

    def audit(self, counted: Tally | None = None) -> Audit:
        """Returns what was counted: of its rows so far, unless given what was counted of some."""
        chats = [source.options.chat for source in self.sources]
        wanted = {chat.train_on_end_of_turn or self.training.end_of_turn for chat in chats}
        wanted |= {chat.train_on_eos for chat in chats if chat.train_on_eos}
        return (counted or self.tally).audit(
            train_on=self.training.train_on,
            end_of_turn_wanted=wanted != {"none"},
            every_end_wanted=wanted <= {"turn", "all"},
        )

    def num_workers(self, wanted: str | int, *, num_cores: int | None = None) -> int:
        """Returns how many processes to use: as many as wanted; for "auto" none if there is little to do, else one for
        each of `num_cores` (all that this process may use for None), up to a limit."""
        if isinstance(wanted, int):
            return wanted
        if all(source.is_small for source in self.sources):
            return 0
        return min(_MAX_WORKERS, num_cores or len(storage.cores()))

    def _reading_of(self, options: SourceOptions) -> dict[str, Any]:
        return rows.identity(options.format, options.reading, self.tokenizer, self.template_choice)

    def _form(self, source: Opened) -> tuple[SourceForm, list[dict[str, Any]]]:
        """Returns the source's format, detected on its first rows if not declared, and those of them that are good."""
        options = source.options
        raws = (raw for raw, _ in source.read())
        looked = first_rows.look(raws, format_name=options.format, fields=options.fields, where=source.label)
        form = looked.format
        if self.tally.formats and form.kind != self.tally.row_kind:
            # They are trained on in different ways, so they do not mix.
            raise DataError(
                f"its rows are {form.kind} ({form.name}), those of the sources before it {self.tally.row_kind}.",
                where=source.label,
                fix="Prepare them in runs of their own.",
            )
        self.tally.row_kind = form.kind
        self.tally.formats[source.label] = f"{form.name} ({looked.reason})"
        return SourceForm(form.name, options.reading), looked.sound
