"""The rows of a run as masked documents, with their audit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from stoker.compose.counted import remember
from stoker.compose.sources import prepare_sources
from stoker.compose.streams import is_windowed, preparation_of, sample
from stoker.config.row_formats import not_learned
from stoker.config.schema import RunConfig
from stoker.data.audit import Audit, problems, warnings
from stoker.data.loader import Documents, StepLoader
from stoker.data.pack import Layout
from stoker.data.preparation import Preparation
from stoker.data.prepare import split
from stoker.data.prepared import Prepared, Selection
from stoker.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Data:
    """Documents to train on and, if asked for, documents held out; `notices` are sentences for the user."""

    train: Prepared | Selection
    validation: Prepared | Selection | None
    audits: dict[str, Audit]
    notices: tuple[str, ...]
    windows: Preparation | None = None
    """What the rows to train on are made from, if training begins before they are prepared; `train` is a sample."""

    @property
    def longest(self) -> int:
        """Tokens of the longest document; the limit where not all are known."""
        if self.windows is not None:
            return self.windows.sequence_length
        return max(int(part.lengths.max(initial=0)) for part in (self.train, self.validation) if part is not None)


def prepare_data(config: RunConfig, tokenizer: "PreTrainedTokenizerBase", *, console: Console) -> Data:
    """Reads, renders and tokenises the rows that the configuration names, or takes them from the cache.

    Raises:
        DataError: a source or a row is wrong; faults that the audit finds are for `refuse_faults`.
    """
    data = _prepared(config, tokenizer, console=console)
    if data.windows is None:
        remember(config, data.train)
    return data


def _prepared(config: RunConfig, tokenizer: "PreTrainedTokenizerBase", *, console: Console) -> Data:
    held_out = config.data.validation
    if is_windowed(config):
        return _windowed(config, tokenizer, console=console)
    whole = prepare_sources(config, config.data.train, tokenizer, console=console, label="train")
    notices = list(whole.notices)
    if held_out is None:
        return Data(whole, None, {"train": whole.audit}, tuple(notices))
    if isinstance(held_out, (int, float)):
        train, validation = split(whole, held_out, seed=config.train.seed)
        return Data(train, validation, {"train": train.audit, "validation": validation.audit}, tuple(notices))
    other = prepare_sources(config, held_out, tokenizer, console=console, label="validation")
    notices += other.notices
    return Data(whole, other, {"train": whole.audit, "validation": other.audit}, tuple(notices))


def _windowed(config: RunConfig, tokenizer: "PreTrainedTokenizerBase", *, console: Console) -> Data:
    preparation = preparation_of(config, tokenizer)
    first = sample(preparation)
    how = "streamed" if config.data.streaming else "prepared while training runs"
    notices = [f"data.train is {how}: what is said of it here is of its first {first.audit.rows:,} rows."]
    held_out, validation = config.data.validation, None
    audits = {"train": first.audit}
    if isinstance(held_out, list):
        validation = prepare_sources(config, held_out, tokenizer, console=console, label="validation")
        notices += validation.notices
        audits["validation"] = validation.audit
    return Data(first, validation, audits, tuple(notices), preparation)


def refuse_faults(audits: dict[str, Audit]) -> list[str]:
    """Returns the audit's warnings as sentences.

    Raises:
        DataError: the data would train nothing, or something other than what was asked for; it carries every fault.
    """
    found = [
        Problem(f"data.{split}: {one.what}", one.where, one.fix)
        for split, audit in audits.items()
        for one in problems(audit)
    ]
    if found:
        raise DataError(found)
    return [f"data.{split}: {one}" for split, audit in audits.items() for one in warnings(audit)]


def refuse_rows_of_other_tasks(config: RunConfig, audits: dict[str, Audit]) -> None:
    """Refuses rows that judge answers, which neither supervised fine-tuning nor pre-training learns from.

    Raises:
        DataError: the rows are pairs or labelled; they can be prepared and inspected.
    """
    for part, audit in audits.items():
        if audit.row_kind != "documents":
            formats = "; ".join(audit.formats.values())
            what = f"data.{part}: the rows are {audit.row_kind} ({formats})"
            raise DataError([not_learned(what, config.task.kind)])


def loader(
    config: RunConfig,
    documents: Documents,
    *,
    micro_batch_size: int,
    pad_id: int,
    mixed: bool = False,
    rank: int = 0,
    world_size: int = 1,
    part: int = 0,
    num_parts: int = 1,
) -> StepLoader:
    """Returns the batches of `documents`, as the configuration lays them out; `mixed` by the weights of data.train."""
    weights = [source.weight for source in config.data.train if source.weight is not None]
    return StepLoader(
        documents,
        batch_size=config.train.batch_size,
        micro_batch_size=micro_batch_size,
        sequence_length=config.data.sequence_length,
        packing=config.data.packing,
        seed=config.train.seed,
        rank=rank,
        world_size=world_size,
        pad_id=pad_id,
        shuffle=config.data.shuffle,
        weights=weights if mixed and weights else None,
        part=part,
        num_parts=num_parts,
    )


def summary(config: RunConfig, data: Data) -> Sequence[tuple[str, str]]:
    """Returns a line for each split: name, what it holds, and how it is packed."""
    lines = []
    for name, audit in data.audits.items():
        documents = data.train if name == "train" else data.validation
        packed = packing(config, documents) if documents is not None else ""
        lines.append((name, f"{_holds(audit)}, {packed}" if packed else _holds(audit)))
    return lines


def packing(config: RunConfig, documents: Documents) -> str:
    """Returns how full the sequences are that documents are packed into, "" without packing."""
    if not config.data.packing or not config.data.shuffle or not len(documents):
        return ""
    together = documents.documents_per_example
    lengths = documents.lengths.reshape(-1, together).sum(axis=1)
    capacity = config.data.sequence_length * together
    layout = Layout(lengths[documents.trained_counts.reshape(-1, together).sum(axis=1) > 0], capacity)
    if not len(layout):  # nothing is trained, which the audit says
        return ""
    return f"packed into {len(layout):,} sequences of {capacity:,}, {layout.efficiency:.1%} full"


def _holds(audit: Audit) -> str:
    formats = sorted({text.split(" ")[0].strip(":,;") for text in audit.formats.values()})
    parts: list[Any] = [f"{audit.documents:,} {' and '.join(formats) or 'text'} documents"]
    parts.append(f"{audit.tokens:,} tokens, {audit.trained_share:.0%} trained")
    parts.append(f"longest {audit.longest:,}")
    of = f" of all {audit.rows:,} rows" if audit.held_out else ""
    for name, count in (
        (f"truncated{of}", audit.truncated),
        ("dropped", audit.dropped),
        ("bad rows skipped", audit.bad_rows),
        ("too short", audit.short),
        ("duplicates left out", audit.duplicates),
    ):
        if count:
            parts.append(f"{count:,} {name}")
    return ", ".join(parts)
