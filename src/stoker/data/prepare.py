"""From sources to tokenised, masked documents: read, convert, render, tokenise, count, keep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker.data.prepared import Prepared, Selection

__all__ = ["Prepared", "Selection", "SourceOptions", "prepare", "split"]


@dataclass(frozen=True)
class SourceOptions:
    """One source of rows: a file, folder, glob or Hub id in `path`, or the rows themselves in `rows`.

    `format` is a name of `formats.FORMATS` or "auto"; `fields` maps our field names to the source's; `split`, `name`
    (a configuration) apply to Hub ids; `limit` takes the first rows only; `file_type` overrides the file's suffix.
    """

    path: str | None = None
    rows: Sequence[Mapping[str, Any]] | None = None
    format: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    name: str | None = None
    limit: int | None = None
    file_type: str | None = None


def prepare(
    sources: Sequence[SourceOptions],
    *,
    tokenizer: Any,
    sequence_length: int,
    train_on: str | Sequence[str] = "assistant",
    train_on_end_of_turn: bool = True,
    template: str | None = None,
    on_bad_row: str = "stop",
    on_long: str = "truncate",
    cache_folder: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Prepared:
    """Returns the sources as masked documents of at most `sequence_length` tokens.

    - `train_on`: "assistant", "all" or roles; `train_on_end_of_turn`: whether the token that ends such a turn trains.
    - `template`: None for the tokenizer's own, a name of `template.NAMED` or a Jinja file.
    - `on_bad_row`: "stop" or "skip"; `on_long`: "truncate", "drop", "stop" or "split" (into pieces).
    - `cache_folder`: where prepared data is kept by content; None keeps it in memory only.
    - `progress`: called with the number of rows done so far.

    Raises DataError for what is wrong with a source, a row or the template, with its place.
    """
    from stoker.data.build import build

    return build(
        sources,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        train_on=train_on,
        train_on_end_of_turn=train_on_end_of_turn,
        template=template,
        on_bad_row=on_bad_row,
        on_long=on_long,
        cache_folder=cache_folder,
        progress=progress,
    )


def split(prepared: Prepared, share_or_count: float | int, *, seed: int = 0) -> tuple[Selection, Selection]:
    """Returns `(train, validation)`: validation is a share below 1 or a count of documents, drawn by `seed`."""
    import numpy as np

    from stoker.errors import DataError

    total = len(prepared)
    count = round(total * share_or_count) if share_or_count < 1 else int(share_or_count)
    count = max(1, count)
    if count >= total:
        raise DataError(
            f"data.validation = {share_or_count} takes {count} of {total} rows and leaves none to train on.",
            fix="Use a smaller share or count.",
        )
    order = np.random.default_rng(seed).permutation(total)
    return Selection(prepared, np.sort(order[count:])), Selection(prepared, np.sort(order[:count]))
