"""The list of a checkpoint's files with their sizes and hashes, and a hash of the list itself."""

import hashlib
import json
from pathlib import Path
from typing import Any

from stoker.checkpoint import folder as names
from stoker.checkpoint.durable import DurableFile, sha256_of


class Manifest:
    """Collects the files of a checkpoint while they are written."""

    def __init__(self, step: int) -> None:
        self.num_bytes = 0
        self._content: dict[str, Any] = {"format": names.FORMAT, "step": step, "files": {}}

    def add(self, name: str, file: DurableFile) -> None:
        """Notes a finished file."""
        self._content["files"][name] = {"sha256": file.sha256, "bytes": file.num_bytes}
        self.num_bytes += file.num_bytes

    def to_bytes(self) -> bytes:
        """Returns the manifest as JSON, with its own hash."""
        return json.dumps({**self._content, "sha256": _hash(self._content)}, indent=1).encode()


def fault_of(path: Path, step: int) -> str | None:
    """Returns what is wrong with the checkpoint in `path`, or None when it is whole.

    Every file is read and hashed, so a single altered byte is found.
    """
    try:
        content = json.loads((path / names.MANIFEST).read_bytes())
        expected = content.pop("sha256")
        if expected != _hash(content):
            return f"{names.MANIFEST} was altered"
        return _content_fault(path, content, step)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{names.MANIFEST} is damaged"


def _content_fault(path: Path, content: dict[str, Any], step: int) -> str | None:
    if content["format"] != names.FORMAT:
        return f"its format is {content['format']}, this version reads {names.FORMAT}"
    if content["step"] != step:
        return f"it is of step {content['step']}"
    faults = (_file_fault(path / name, facts) for name, facts in content["files"].items())
    return next((fault for fault in faults if fault), None)


def _file_fault(path: Path, facts: dict[str, Any]) -> str | None:
    size = path.stat().st_size
    if size != facts["bytes"]:
        return f"{path.name} has {size:,} bytes instead of {facts['bytes']:,}"
    return None if sha256_of(path) == facts["sha256"] else f"{path.name} was altered: its hash is another"


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
