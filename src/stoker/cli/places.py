"""Whether a name means something on this disk or can be meant for the Hub; nothing asks the network."""

import difflib
import glob
import re
from pathlib import Path

_FILE_ENDINGS = {f".{name}" for name in ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "pq", "arrow", "feather")}
_FILE_ENDINGS |= {".text", ".txt", ".md", ".gz", ".zst", ".zip", ".xz"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")


def is_pattern(name: str) -> bool:
    """Whether the name is a glob."""
    return glob.has_magic(name)


def is_url(name: str) -> bool:
    """Whether the name is an address that only the network can answer for."""
    return "://" in name


def exists(name: str) -> bool:
    """Whether there is a file or folder of this name, or one that the glob matches."""
    path = str(Path(name).expanduser())
    # pathlib's glob takes no absolute patterns.
    return any(glob.iglob(path, recursive=True)) if is_pattern(name) else Path(path).exists()  # noqa: PTH207


def may_be_model_id(name: str) -> bool:
    """Whether a name that does not exist here can be a model's on the Hub: `name` or `owner/name`."""
    return bool(_HUB_ID.fullmatch(name))


def may_be_dataset_id(name: str) -> bool:
    """Whether a name that does not exist here can be a dataset's on the Hub: `owner/name`, and no file's ending."""
    return bool(_HUB_ID.fullmatch(name)) and "/" in name and Path(name).suffix.lower() not in _FILE_ENDINGS


def nearest(name: str) -> str | None:
    """Returns what lies in the same folder under the most similar name."""
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        return None
    close = difflib.get_close_matches(path.name, [item.name for item in path.parent.iterdir()], 1, 0.6)
    return str(path.parent / close[0]) if close else None


def missing(name: str) -> tuple[str, str]:
    """Returns what is wrong with a path that does not exist, and what to do."""
    if is_pattern(name):
        return f"no file matches {name}", f"Look at the pattern; it starts from {Path.cwd()}."
    close = nearest(name)
    fix = f"Did you mean {close}?" if close else f"Relative paths start from {Path.cwd()}."
    return f"{name} does not exist", fix
