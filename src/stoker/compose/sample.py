"""Lengths of a run's rows from a look at its local files, without a tokenizer: good to a quarter, and said to be so.

Prepared data and `audit.json` know the real counts; this is for a run that has neither yet.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stoker.compose.counted import counted
from stoker.config.schema import RunConfig
from stoker.plan.workload import Documents, from_audit, from_sample

# English text has 4 to 4.5 characters a token with vocabularies of 100,000; code and other languages have fewer.
CHARACTERS_PER_TOKEN = 4.2
_SAMPLED_ROWS = 500
# What a chat template adds to each message.
_TOKENS_PER_MESSAGE = 5
_ANSWERS = {"assistant", "gpt", "model", "bot", "output", "completion", "response", "answer", "chosen"}


def known_documents(config: RunConfig) -> Documents | None:
    """Returns what is known of the rows: counted when they were prepared, or by an earlier run in output.folder, or by
    a look at local files."""
    if (prepared := counted(config)) is not None:
        return prepared
    audit = Path(config.output.folder).expanduser() / "audit.json"
    if audit.is_file():
        facts = json.loads(audit.read_text(encoding="utf-8")).get("train", {})
        found = from_audit(facts, f"counted in the prepared rows of an earlier run ({audit})")
        if found is not None:
            return found
    return _sampled(config)


def _sampled(config: RunConfig) -> Documents | None:
    from stoker import builtin  # its numpy takes a fifth of the time that a plan has

    lengths: list[int] = []
    trained = total = 0
    rows = 0.0
    for source in config.data.train:
        path = builtin.resolve_rows(source.path) if builtin.is_builtin(source.path) else Path(source.path).expanduser()
        if path.suffix not in (".jsonl", ".ndjson") or not path.is_file():
            return None
        sample, share = _first_rows(path)
        if not sample:
            return None
        count = len(sample) / share
        rows += min(count, source.limit) if source.limit is not None else count
        for row in sample:
            learned, read = _characters(row)
            whole = learned + read
            lengths.append(max(1, round(whole / CHARACTERS_PER_TOKEN) + _TOKENS_PER_MESSAGE * _messages(row)))
            trained, total = trained + learned, total + whole
    if not total:
        return None
    learns_all = config.data.train_on == "all" or not trained
    source = f"{len(lengths):,} rows sampled, {CHARACTERS_PER_TOKEN} characters a token (coarse)"
    return from_sample(lengths, round(rows), 1.0 if learns_all else trained / total, source)


def _first_rows(path: Path) -> tuple[list[Any], float]:
    """Returns the first rows, and what share of the file's bytes they are."""
    rows, read = [], 0
    with path.open("rb") as lines:
        for line in lines:
            read += len(line)
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue  # what cannot be read is for `stoker inspect` to say
            if len(rows) >= _SAMPLED_ROWS:
                break
    return rows, read / max(1, path.stat().st_size)


def _messages(row: Any) -> int:
    lists = [value for value in row.values() if isinstance(value, list)] if isinstance(row, Mapping) else []
    return max(map(len, lists), default=1)


def _characters(value: Any, *, is_answer: bool = False) -> tuple[int, int]:
    """Returns the characters of a row's texts that are learned, and those of the others."""
    if isinstance(value, str):
        return (len(value), 0) if is_answer else (0, len(value))
    if isinstance(value, Mapping):
        role = value.get("role", value.get("from"))
        texts = [(key, inner) for key, inner in value.items() if key not in ("role", "from")]
        return _sum(
            _characters(inner, is_answer=is_answer or role in _ANSWERS or key in _ANSWERS) for key, inner in texts
        )
    if isinstance(value, list):
        return _sum(_characters(inner, is_answer=is_answer) for inner in value)
    return 0, 0


def _sum(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    learned = read = 0
    for one, other in pairs:
        learned, read = learned + one, read + other
    return learned, read
