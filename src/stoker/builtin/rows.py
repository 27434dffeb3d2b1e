"""The rows that ship with Stoker: questions and answers about fine-tuning language models.

`fine-tuning` asks each of 74 facts in five ways; `fine-tuning-validation` asks fifty of them in other words, and ten
facts that the training rows do not hold. Written for this project, under its licence.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent / "data"
_NAMES = ("fine-tuning", "fine-tuning-validation")


def row_names() -> tuple[str, ...]:
    """The names of the shipped rows."""
    return _NAMES


def rows_path(name: str) -> Path:
    """The JSONL file of the shipped rows `name` (one of `row_names()`), one `{"messages": [...]}` a line."""
    return _FOLDER / f"{name}.jsonl"
