"""The list of a checkpoint's files with their sizes and hashes, and a hash of the list itself."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stoker.checkpoint import folder as names
from stoker.checkpoint.durable import DurableFile, sha256_of


def facts_of(file: DurableFile) -> dict[str, Any]:
    """Returns what the list says of a finished file."""
    return {"sha256": file.sha256, "bytes": file.num_bytes}


def to_bytes(step: int, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Returns the list of a checkpoint's files, by name, as JSON with its own hash."""
    content = {"format": names.FORMAT, "step": step, "files": {name: dict(files[name]) for name in sorted(files)}}
    return json.dumps({**content, "sha256": _hash(content)}, indent=1).encode()


def fault_of(path: Path, step: int, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Returns what is wrong with the checkpoint in `path`, or None when it is whole.

    Every file is read and hashed, so a single altered byte is found; `share` (i, n): every n-th from the i-th on.
    """
    try:
        content = json.loads((path / names.MANIFEST).read_bytes())
        expected = content.pop("sha256")
        if expected != _hash(content):
            return f"{names.MANIFEST} was altered"
        return _content_fault(path, content, step, share)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{names.MANIFEST} is damaged"


def _content_fault(path: Path, content: dict[str, Any], step: int, share: tuple[int, int]) -> str | None:
    if content["format"] > names.FORMAT:
        return f"its format is {content['format']}, this version reads up to {names.FORMAT}"
    if content["step"] != step:
        return f"it is of step {content['step']}"
    mine = sorted(content["files"].items())[share[0] :: share[1]]
    faults = (_file_fault(path / name, facts) for name, facts in mine)
    return next((fault for fault in faults if fault), None)


def _file_fault(path: Path, facts: dict[str, Any]) -> str | None:
    size = path.stat().st_size
    if size != facts["bytes"]:
        return f"{path.name} has {size:,} bytes instead of {facts['bytes']:,}"
    return None if sha256_of(path) == facts["sha256"] else f"{path.name} was altered: its hash is another"


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
