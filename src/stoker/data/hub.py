"""Datasets of the Hugging Face Hub, through the library that fetches and keeps them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from stoker.data.readers import Row, without_missing
from stoker.data.selection import Split
from stoker.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """A split that was fetched; `label` names it in the places of its rows."""

    label: str
    content: Any

    @property
    def fingerprint(self) -> str:
        """The library's hash of what the rows were made from: the repository's commit, its files, the split."""
        return self.content._fingerprint

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Yields the rows from number `start` on (from 0)."""
        rest = self.content.select(range(start, len(self.content))) if start else self.content
        for number, value in enumerate(rest, start=start + 1):
            yield Row(without_missing(dict(value)), f"{self.label}:{number}")


def load(
    path: str, *, name: str | None, split: Split, data_files: tuple[str, ...] = (), revision: str | None = None
) -> Dataset:
    """Fetches a split (the library reads slices in its name) unless it is here already."""
    import datasets

    options: dict[str, Any] = {"data_files": list(data_files)} if data_files else {}
    if revision is not None:
        options["revision"] = revision
    try:
        content = datasets.load_dataset(path, name, split=split.name, **options)
    except (OSError, ValueError, AssertionError, datasets.exceptions.DatasetsError) as error:
        _refuse(path, split.name, error)
    return Dataset(f"{path}[{split.name}]", content)


def files(
    path: str, *, name: str | None, split: str, data_files: tuple[str, ...] = (), revision: str | None = None
) -> tuple[str, ...]:
    """Returns the addresses of a split's files (`hf://...` with their commit), to be read where they are."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(
            path, name, data_files=list(data_files) or None, revision=revision
        )  # fmt: skip
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        _refuse(path, split, error)
    splits = builder.config.data_files or {}
    if split not in splits:
        raise DataError(
            f"dataset {path!r} has no files of a split {split!r} that could be streamed.",
            fix=f"It has: {', '.join(map(str, splits)) or 'none'}. Without data.streaming it is fetched first.",
        )
    return tuple(str(file) for file in splits[split])


def _refuse(path: str, split: str, error: Exception) -> NoReturn:
    reason = (str(error).splitlines() or [repr(error)])[0]
    raise DataError(
        f"dataset {path!r} (split {split!r}) cannot be loaded: {reason.rstrip('.')}.",
        fix="Check the id, the split and the connection (HF_HUB_OFFLINE allows only what is downloaded already), "
        "or give a local file.",
    ) from error
