"""What was counted of a run's rows when they were prepared, kept beside them, for a plan that loads no tokenizer.

The cache of prepared rows is keyed by their content and the tokenizer's; this is keyed by what the YAML says, and holds
as long as the files that it names are as they were.
"""

import glob
import hashlib
import json
import os
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.config.schema import RunConfig
from stoker.plan.workload import Documents

if TYPE_CHECKING:
    from stoker.data.loader import Documents as DocumentsToTrainOn

_VERSION = 1
_FILES = 1000
# Of data's settings, those that change neither documents nor how they are packed.
_NO_MATTER = ("cache_folder", "num_workers", "shuffle", "window_sequences", "prepare")


def remember(config: RunConfig, documents: "DocumentsToTrainOn") -> None:
    """Keeps the lengths of `documents`, those to train on, their trained share and how many rows they fill.

    A cache that cannot be written to keeps nothing.
    """
    from stoker.data.pack import Layout

    lengths, trained = documents.lengths, documents.trained_counts
    used = trained > 0
    kept = lengths[used]
    counts: dict[str, Any] = {
        "version": _VERSION,
        "files": _files(config),
        "documents": int(used.sum()),
        "tokens": int(kept.sum()),
        "trained_tokens": int(trained[used].sum()),
        "lengths": dict(Counter(map(str, kept.tolist()))),
    }
    if config.data.packing and len(kept):
        counts["sequences"] = len(Layout(kept, config.data.sequence_length))
    path = _place(config)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(counts, file)
        Path(aside).replace(path)


def counted(config: RunConfig) -> Documents | None:
    """Returns what was kept for these rows; None where nothing was, or a file has changed since."""
    path = _place(config)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["version"] != _VERSION or facts["files"] != _files(config) or not facts["documents"]:
            return None
        return Documents(
            {int(length): float(count) for length, count in facts["lengths"].items()},
            facts["documents"],
            facts["trained_tokens"] / facts["tokens"],
            f"counted when the rows were prepared ({facts['documents']:,} documents)",
            is_train_part=True,
            sequences=facts.get("sequences"),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _place(config: RunConfig) -> Path:
    data = config.data.model_dump(mode="json", exclude=set(_NO_MATTER))
    model = config.model.model_dump(mode="json", exclude={"quantization", "overrides"})
    text = json.dumps(
        [_VERSION, data, model, config.task.kind, config.train.seed, config.adapter is None], sort_keys=True
    )
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Path(config.data.cache_folder).expanduser() / "counts" / f"{name}.json"


def _files(config: RunConfig) -> list[list[Any]]:
    """Size and time of writing of each local file that data.train names, and of the tokenizer's where that is local."""
    held_out = config.data.validation
    sources = [*config.data.train, *(held_out if isinstance(held_out, list) else [])]
    names = [source.path for source in sources] + [config.model.tokenizer or config.model.base]
    found = []
    for name in names:
        for place in sorted(glob.glob(str(Path(name).expanduser())))[:_FILES]:  # noqa: PTH207 - patterns may be absolute
            path = Path(place)
            inside = sorted(path.iterdir())[:_FILES] if path.is_dir() else [path]
            found += [_state(one) for one in inside if one.is_file()]
    return found


def _state(path: Path) -> list[Any]:
    state = path.stat()
    return [str(path), state.st_size, state.st_mtime_ns]
