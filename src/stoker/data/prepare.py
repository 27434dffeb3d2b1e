"""From sources to tokenised, masked documents: read, convert, render, tokenise, count, keep."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from stoker.data import cache, formats, rows, sources
from stoker.data.audit import Audit, Tally
from stoker.data.options import END_OF_TURN, ChatOptions, PromptTexts, Reading
from stoker.data.pack import split_long
from stoker.data.prepared import Prepared, Selection
from stoker.data.readers import Row
from stoker.data.rows import RowReader, Training
from stoker.data.tokenize import Document, Tokenizer
from stoker.errors import DataError

__all__ = ["Prepared", "Selection", "SourceOptions", "prepare", "split"]

ON_BAD_ROW = ("stop", "skip")
ON_LONG = ("truncate", "drop", "stop", "split")
_CHUNK_ROWS = 512
_SAMPLE_ROWS = 32


@dataclass(frozen=True)
class SourceOptions:
    """One source of rows: a file, folder, glob or Hub id in `path`, or the rows themselves in `rows`.

    `format` is a name of `formats.FORMATS` or "auto"; `fields` maps our field names to the source's; `chat` and
    `prompt` say how its conversations and prompts are read; `split`, `name` (a configuration) apply to Hub ids; `limit`
    takes the first rows only; `file_type` overrides the file's suffix.
    """

    path: str | None = None
    rows: Sequence[Mapping[str, Any]] | None = None
    format: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    name: str | None = None
    limit: int | None = None
    file_type: str | None = None
    chat: ChatOptions = field(default_factory=ChatOptions)
    prompt: PromptTexts = field(default_factory=PromptTexts)

    @property
    def reading(self) -> Reading:
        """How its rows are read."""
        return Reading(self.fields, self.chat, self.prompt)


def prepare(
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
    cache_folder: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Prepared:
    """Returns the sources as masked documents of at most `sequence_length` tokens.

    - `train_on`: "assistant", "all" or roles.
    - `train_on_end_of_turn`: whose end-of-turn token trains: "turn" (or True) of such turns, "all", "last", "none" (or
      False); `end_of_turn_tokens`: what may end a turn, unless the first special token after it.
    - `template`: None for the tokenizer's own, a name of `template.NAMED`, a Jinja file or Jinja itself.
    - `on_bad_row`: "stop" or "skip"; `on_long`: "truncate", "drop", "stop" or "split" (into pieces).
    - `cache_folder`: where prepared data is kept by content; None keeps it in memory only.
    - `progress`: called with the number of rows done so far.

    Raises DataError for what is wrong with a source, a row or the template, with its place; OutputError if the cache
    cannot be written.
    """
    if on_bad_row not in ON_BAD_ROW or on_long not in ON_LONG:
        raise ValueError(f"on_bad_row is one of {ON_BAD_ROW}, on_long one of {ON_LONG}")
    end_of_turn = {True: "turn", False: "none"}.get(train_on_end_of_turn, train_on_end_of_turn)  # type: ignore[arg-type]
    if end_of_turn not in END_OF_TURN:
        raise ValueError(f"train_on_end_of_turn is true, false or one of {END_OF_TURN}")
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, got {sequence_length}")
    job = _Job(
        sources=[_Opened.find(options) for options in sources],
        tokenizer=Tokenizer(tokenizer, end_of_turn_tokens=end_of_turn_tokens),
        hf_tokenizer=tokenizer,
        template_choice=template,
        sequence_length=sequence_length,
        training=Training((train_on,) if isinstance(train_on, str) else tuple(train_on), end_of_turn),
        end_of_turn_tokens=tuple(end_of_turn_tokens),
        on_bad_row=on_bad_row,
        on_long=on_long,
        progress=progress,
    )
    return job.run() if cache_folder is None else _through_cache(job, Path(cache_folder))


def split(prepared: Prepared, share_or_count: float, *, seed: int = 0) -> tuple[Selection, Selection]:
    """Returns `(train, validation)`: validation is a share below 1 or a count of documents, drawn by `seed`.

    Raises DataError if it would leave nothing to train on.
    """
    total = len(prepared)
    count = max(1, round(total * share_or_count) if share_or_count < 1 else int(share_or_count))
    if count >= total:
        raise DataError(
            f"data.validation = {share_or_count} takes {count} of {total} documents and leaves none to train on.",
            fix="Use a smaller share or count.",
        )
    order = np.random.default_rng(seed).permutation(total)
    return Selection(prepared, np.sort(order[count:])), Selection(prepared, np.sort(order[:count]))


def _through_cache(job: "_Job", cache_folder: Path) -> Prepared:
    folder = cache_folder.expanduser() / cache.key(job.identity())
    notices: tuple[str, ...] = ()
    try:
        found = cache.load(folder)
        if found is not None:
            return found
    except cache.DamagedError as damage:
        notices = (f"The prepared data in {folder} was damaged ({damage}); it was made anew.",)
    return job.run(folder, notices)


@dataclass(frozen=True)
class _Opened:
    """A source that was found, with its options."""

    options: SourceOptions
    source: sources.Source | None

    @classmethod
    def find(cls, options: SourceOptions) -> "_Opened":
        if (options.path is None) == (options.rows is None):
            raise ValueError("a source has either a path or rows")
        if options.format != "auto":
            formats.declared(options.format)
        if options.path is None:
            return cls(options, None)
        found = sources.find(options.path, split=options.split, name=options.name, file_type=options.file_type)
        return cls(options, found)

    @property
    def label(self) -> str:
        return self.options.path or "rows in memory"

    def rows(self) -> Iterator[Row]:
        rows = self.source.rows() if self.source else sources.rows_from_list(self.options.rows or ())
        return islice(rows, self.options.limit)

    def identity(self) -> dict[str, Any]:
        options = self.options
        content = self.source.fingerprint() if self.source else sources.fingerprint_of_list(options.rows or ())
        return {"content": content, "limit": options.limit}


@dataclass
class _Job:
    """One preparation: what was asked for, and the steps from rows to documents."""

    sources: list[_Opened]
    tokenizer: Tokenizer
    hf_tokenizer: Any
    template_choice: str | None
    sequence_length: int
    training: Training
    end_of_turn_tokens: tuple[str, ...]
    on_bad_row: str
    on_long: str
    progress: Callable[[int], None] | None
    tally: Tally = field(default_factory=Tally)

    def identity(self) -> dict[str, Any]:
        """Everything that shapes the result."""
        return {
            "sources": [source.identity() | self._reading_identity(source.options) for source in self.sources],
            "tokenizer": cache.tokenizer_fingerprint(self.hf_tokenizer),
            "sequence_length": self.sequence_length,
            "training": asdict(self.training),
            "end_of_turn_tokens": self.end_of_turn_tokens,
            "on_bad_row": self.on_bad_row,
            "on_long": self.on_long,
            "libraries": cache.library_versions(),
        }

    def _reading_identity(self, options: SourceOptions) -> dict[str, Any]:
        return rows.identity(options.format, options.reading, self.hf_tokenizer, self.template_choice)

    def run(self, folder: Path | None = None, notices: tuple[str, ...] = ()) -> Prepared:
        """Prepares all rows, into `folder` or into memory."""
        done = 0
        with cache.MemoryWriter() if folder is None else cache.FolderWriter(folder) as writer:
            for source in self.sources:
                reader, found = self._opened(source)
                while chunk := list(islice(found, _CHUNK_ROWS)):
                    self._chunk(chunk, reader, writer)
                    done += len(chunk)
                    if self.progress:
                        self.progress(done)
            prepared = writer.finish(self._audit())
        return Prepared(prepared.ids, prepared.trained, prepared.offsets, prepared.audit, notices)

    def _audit(self) -> Audit:
        wanted = self.training.end_of_turn != "none"
        return self.tally.audit(train_on=self.training.train_on, end_of_turn_wanted=wanted)

    def _opened(self, source: _Opened) -> tuple[RowReader, Iterator[Row]]:
        """Returns the reader for the source's format, detected on its first rows if not declared, and its rows."""
        found = source.rows()
        sample = list(islice(found, _SAMPLE_ROWS))
        if not sample:
            raise DataError(
                "the source holds no rows.", where=source.label, fix="Check the file, or remove the source."
            )
        good = [row.value for row in sample if row.error is None]
        options = source.options
        if not good:
            raise DataError(f"the first {len(sample)} rows are all malformed: {sample[0].error}", where=sample[0].where)
        if options.format == "auto":
            detection = formats.detect(good, source.label, fields=options.fields)
            form, reason = detection.format, f"detected: {detection.reason}"
        else:
            form, reason = formats.declared(options.format), "declared"
        formats.check_fields(form, options.fields, source.label)
        self._one_kind(form, source.label)
        self.tally.formats[source.label] = f"{form.name} ({reason})"
        reader = RowReader(
            form,
            options.reading,
            training=self.training,
            tokenizer=self.hf_tokenizer,
            template_choice=self.template_choice,
            tally=self.tally,
        )
        reader.ready(good)
        return reader, chain(sample, found)

    def _one_kind(self, form: formats.Format, label: str) -> None:
        """Documents, pairs and labelled rows are trained on in different ways, so they do not mix."""
        if self.tally.formats and form.kind != self.tally.row_kind:
            raise DataError(
                f"its rows are {form.kind} ({form.name}), those of the sources before it {self.tally.row_kind}.",
                where=label,
                fix="Prepare them in runs of their own.",
            )
        self.tally.row_kind = form.kind

    def _chunk(self, found: list[Row], reader: RowReader, writer: cache.Writer) -> None:
        places, counts, pieces = [], [], []
        for row in found:
            try:
                if row.error is not None:
                    raise DataError(row.error)
                of_row = reader.pieces(row.value)
            except DataError as error:
                self._bad_row(row, error)
                continue
            pieces.extend(of_row)
            counts.append(len(of_row))
            places.append(row.where)
        documents = iter(self.tokenizer.documents(pieces))
        for where, count in zip(places, counts, strict=True):
            self._keep(where, list(islice(documents, count)), writer)

    def _bad_row(self, row: Row, error: DataError) -> None:
        problem = error.problems[0]
        if self.on_bad_row == "stop":
            fix = f"{problem.fix} " if problem.fix else ""
            raise DataError(problem.what, where=row.where, fix=f"{fix}(data.on_bad_row: skip leaves such rows out.)")
        self.tally.bad_row(f"{row.where}: {problem.what}")

    def _keep(self, where: str, documents: list[Document], writer: cache.Writer) -> None:
        """Applies the limit of length to a row's documents, counts, and writes. The two of a pair go the same way."""
        counts, limit = self.tally.counts, self.sequence_length
        length = max(len(document.ids) for document in documents)
        on_long = "truncate" if self.on_long == "split" and len(documents) > 1 else self.on_long
        if length > limit:
            if on_long == "stop":
                raise DataError(
                    f"the row has {length:,} tokens, more than data.sequence_length = {limit:,}.",
                    where=where,
                    fix="Raise data.sequence_length, or set data.on_long to truncate or drop.",
                )
            counts[_LONG_COUNTS[on_long]] += 1
            if on_long == "drop":
                return
        counts["rows"] += 1
        for document in documents:
            length = len(document.ids)
            pieces = [(document.ids, document.trained)]
            if length > limit and on_long == "truncate":
                counts["truncated_tokens"] += length - limit
                pieces = [(document.ids[:limit], document.trained[:limit])]
            elif length > limit:
                pieces = split_long(document.ids, document.trained, limit)
            self._count_turns(document, length if on_long == "split" else limit)
            for ids, trained in pieces:
                self.tally.document(where, length=len(ids), num_trained=int(np.count_nonzero(trained)))
                writer.add(ids, trained)

    def _count_turns(self, document: Document, limit: int) -> None:
        counts = self.tally.counts
        counts["doubled_bos"] += document.doubled_bos
        counts["special_in_content"] += document.special_in_content
        for first, end in document.turns:
            if first < limit:
                counts["turns"] += 1
                if 0 <= end < limit and document.trained[end]:
                    counts["turns_with_end"] += 1
                    self.tally.end_tokens[self.tokenizer.token_text(document.ids[end])] += 1


_LONG_COUNTS = {"truncate": "truncated", "drop": "dropped", "split": "split"}
