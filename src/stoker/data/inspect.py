"""What a person sees of prepared data: rows with their trained tokens in colour, and the audit as a table."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stoker.data.audit import Audit, problems, warnings

TRAINED_STYLE = "bold black on green3"
OTHER_STYLE = "grey58"


class _Documents(Protocol):
    def __len__(self) -> int: ...

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...

    def labels_of(self, index: int) -> np.ndarray | None: ...

    @property
    def audit(self) -> Audit: ...


def rows(prepared: _Documents, tokenizer: Any, *, count: int = 3, first: int = 0) -> Iterator[RenderableType]:
    """Yields `count` documents from number `first` on: a line of counts, then the text, trained tokens in colour.

    Of pairs, `count` and `first` are pairs: the better answer, then the worse. Labels of answers and steps are named.
    """
    size = 2 if prepared.audit.row_kind == "pairs" else 1
    for index in range(first * size, min((first + count) * size, len(prepared))):
        ids, trained = prepared.document(index)
        share = trained.mean() if len(trained) else 0.0
        counts = f"{len(ids):,} tokens, {int(trained.sum()):,} trained ({share:.0%})"
        title = f"{_name(index, size)}: {counts}{_labels(prepared.labels_of(index))}"
        yield Group(Text(title, style="bold"), coloured(ids, trained, tokenizer), Text())


def _name(index: int, size: int) -> str:
    return f"Document {index}" if size == 1 else f"Pair {index // 2}, {('chosen', 'rejected')[index % 2]}"


def _labels(labels: np.ndarray | None) -> str:
    """Returns the labels of a document in words: of its answer, or of its steps in order."""
    if labels is None:
        return ""
    said = labels[labels >= 0].tolist()
    words = ["yes" if label else "no" for label in said]
    return f", label: {words[0]}" if len(set(said)) == 1 else f", labels: {' '.join(words)}"


def coloured(ids: np.ndarray, trained: np.ndarray, tokenizer: Any) -> Text:
    """Returns the document's text, decoded run by run, trained runs in colour; spaces that train are visible as such.

    Without colour, trained runs stand between `⟦` and `⟧`, so that a log or a pipe shows them too.
    """
    text = Text(overflow="fold")
    for is_trained, run in groupby(zip(trained.tolist(), ids.tolist(), strict=True), key=lambda pair: pair[0]):
        piece = tokenizer.decode([token for _, token in run], clean_up_tokenization_spaces=False)
        text.append(f"⟦{piece}⟧" if is_trained else piece, style=TRAINED_STYLE if is_trained else OTHER_STYLE)
    return text


def audit_table(audit: Audit, *, title: str = "Data") -> Table:
    """Returns the audit's figures as a table of two columns."""
    table = Table(title=title, show_header=False, title_justify="left", box=None, pad_edge=False)
    table.add_column(style="grey58")
    table.add_column(overflow="fold")
    for name, value in _figures(audit):
        table.add_row(name, value)
    return table


def findings(audit: Audit) -> list[Text]:
    """Returns one line for each problem (red) and each warning (yellow) of the audit."""
    wrong = [Text(f"Problem: {problem}", style="bold red") for problem in problems(audit)]
    return wrong + [Text(f"Note: {problem}", style="yellow") for problem in warnings(audit)]


def _figures(audit: Audit) -> Iterator[tuple[str, str]]:
    for source, form in audit.formats.items():
        yield "format", f"{source}: {form}"
    yield "chat template", audit.template
    # What is not of documents and tokens was counted before some were held out.
    of = " (all rows)" if audit.held_out else ""
    yield from _rows(audit)
    yield "tokens", f"{audit.tokens:,} (longest document {audit.longest:,}, median {audit.median:,})"
    yield "trained tokens", f"{audit.trained_tokens:,} ({audit.trained_share:.1%})"
    if audit.roles:
        yield f"roles{of}", ", ".join(f"{role}: {count:,}" for role, count in audit.roles.items())
    if audit.turns:
        ends = ", ".join(f"{token!r}: {count:,}" for token, count in audit.end_tokens.items()) or "none"
        yield f"trained turns{of}", f"{audit.turns:,}, end-of-turn trained in {audit.end_of_turn_share:.1%} ({ends})"
    for name in ("truncated", "dropped", "split", "bad_rows"):
        count = getattr(audit, name)
        if count:
            yield name.replace("_", " ") + of, f"{count:,} rows"


def _rows(audit: Audit) -> Iterator[tuple[str, str]]:
    """The line that counts rows and documents."""
    documents = audit.documents + audit.held_out
    cut = f" as {documents:,} documents" if documents != audit.rows else ""
    if audit.held_out:
        yield "rows", f"{audit.rows:,}{cut}, {audit.held_out:,} of them held out: {audit.documents:,} to train on"
    elif audit.rows:
        yield "rows", f"{audit.rows:,}{cut}"
    else:  # a part of rows that were cut into pieces
        yield "documents", f"{documents:,}"
