"""What Stoker can make without a download: a tiny Llama-shaped model, and rows about fine-tuning to train it on.

A name in a YAML that starts with `builtin:` means one of these. Nothing here imports torch.
"""

from pathlib import Path

from stoker.builtin.rows import row_names, rows_path
from stoker.builtin.tiny_llama import default_folder, materialize, model_names
from stoker.errors import DataError, ModelError

PREFIX = "builtin:"

__all__ = [
    "PREFIX",
    "default_folder",
    "is_builtin",
    "materialize",
    "model_names",
    "resolve_model",
    "resolve_rows",
    "row_names",
    "rows_path",
]


def is_builtin(name: str) -> bool:
    """Whether `name` (of a model or of rows) means something that Stoker makes itself."""
    return name.startswith(PREFIX)


def resolve_model(name: str) -> Path:
    """The Hugging Face folder of the model `builtin:...`, made on first use and found again afterwards.

    Raises:
        ModelError: there is no such model, or its folder cannot be written.
    """
    short = name.removeprefix(PREFIX)
    if short not in model_names():
        raise ModelError(f"There is no built-in model {name!r}.", fix=f"Known: {_listed(model_names())}.")
    return materialize(short)


def resolve_rows(name: str) -> Path:
    """The JSONL file of the rows `builtin:...`.

    Raises:
        DataError: there are no such rows.
    """
    short = name.removeprefix(PREFIX)
    if short not in row_names():
        raise DataError(f"There are no built-in rows {name!r}.", fix=f"Known: {_listed(row_names())}.")
    return rows_path(short)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(PREFIX + name for name in names)
