"""The rows of a run as masked documents, with their audit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from stoker import builtin
from stoker.config.row_formats import expanded
from stoker.config.schema import Pretrain, RunConfig, Source
from stoker.data.audit import Audit, problems, warnings
from stoker.data.loader import Documents, StepLoader
from stoker.data.options import ChatOptions, PromptTexts
from stoker.data.prepare import Prepared, SourceOptions, prepare, split
from stoker.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Data:
    """Documents to train on and, if asked for, documents held out; `notices` are sentences for the user."""

    train: Documents
    validation: Documents | None
    audits: dict[str, Audit]
    notices: tuple[str, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(int(part.lengths.max(initial=0)) for part in (self.train, self.validation) if part is not None)


def prepare_data(config: RunConfig, tokenizer: "PreTrainedTokenizerBase", *, console: Console) -> Data:
    """Reads, renders and tokenises the rows that the configuration names, or takes them from the cache.

    Raises:
        DataError: a source or a row is wrong; faults that the audit finds are for `refuse_faults`.
    """
    held_out = config.data.validation
    whole = _prepare(config, config.data.train, tokenizer, console=console, label="train")
    notices = list(whole.notices)
    if held_out is None:
        return Data(whole, None, {"train": whole.audit}, tuple(notices))
    if isinstance(held_out, (int, float)):
        train, validation = split(whole, held_out, seed=config.train.seed)
        return Data(train, validation, {"train": train.audit, "validation": validation.audit}, tuple(notices))
    other = _prepare(config, held_out, tokenizer, console=console, label="validation")
    notices += other.notices
    return Data(whole, other, {"train": whole.audit, "validation": other.audit}, tuple(notices))


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


def loader(config: RunConfig, documents: Documents, *, micro_batch_size: int, pad_id: int) -> StepLoader:
    """Returns the batches of `documents`, as the configuration lays them out."""
    return StepLoader(
        documents,
        batch_size=config.train.batch_size,
        micro_batch_size=micro_batch_size,
        sequence_length=config.data.sequence_length,
        packing=config.data.packing,
        seed=config.train.seed,
        pad_id=pad_id,
    )


def _prepare(
    config: RunConfig,
    sources: Iterable[Source],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    console: Console,
    label: str,
) -> Prepared:
    data = config.data
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"preparing {label} rows")

        def show(rows: int) -> None:
            bar.update(task, description=f"preparing {label} rows: {rows:,}")

        return prepare(
            [_options(source) for source in sources],
            tokenizer=tokenizer,
            sequence_length=data.sequence_length,
            train_on=data.train_on if isinstance(data.train_on, str) else tuple(data.train_on),
            train_on_end_of_turn=data.train_on_end_of_turn,
            end_of_turn_tokens=tuple(data.end_of_turn_tokens),
            template=config.model.chat_template,
            on_bad_row=data.on_bad_row,
            on_long="split" if isinstance(config.task, Pretrain) else data.on_long,
            cache_folder=Path(data.cache_folder).expanduser() / "data",
            progress=show,
        )


def _options(source: Source) -> SourceOptions:
    source = expanded(source)
    path = str(builtin.resolve_rows(source.path)) if builtin.is_builtin(source.path) else source.path
    chat = source.chat.model_dump()
    train_on = chat.pop("train_on")
    return SourceOptions(
        path=path,
        format=source.format,
        fields=source.fields.model_dump(exclude_none=True, exclude={"message_properties"}),
        split=source.split,
        name=source.name,
        limit=source.limit,
        file_type=source.file_type,
        chat=ChatOptions(
            **chat,
            message_properties=source.fields.message_properties,
            train_on=(train_on,) if isinstance(train_on, str) else None if train_on is None else tuple(train_on),
        ),
        prompt=PromptTexts(**source.prompt.model_dump()),
    )


def summary(audits: dict[str, Audit]) -> Sequence[tuple[str, str]]:
    """Returns a line for each split: name, and what it holds."""
    return [(split, _holds(audit)) for split, audit in audits.items()]


def _holds(audit: Audit) -> str:
    formats = sorted({text.split(" ")[0].strip(":,;") for text in audit.formats.values()})
    parts: list[Any] = [f"{audit.documents:,} {' and '.join(formats) or 'text'} documents"]
    parts.append(f"{audit.tokens:,} tokens, {audit.trained_share:.0%} trained")
    parts.append(f"longest {audit.longest:,}")
    for name, count in (
        ("truncated", audit.truncated),
        ("dropped", audit.dropped),
        ("bad rows skipped", audit.bad_rows),
    ):
        if count:
            parts.append(f"{count:,} {name}")
    return ", ".join(parts)
