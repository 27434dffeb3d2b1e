"""What follows training: weights saved, questions answered, the report written, and a word on what to do next."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stoker.compose.model import Base
from stoker.compose.run_folder import RunFolder
from stoker.compose.session import Session
from stoker.errors import OutputError
from stoker.observe import report
from stoker.train.loop import TrainingResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stoker.models.open import Model

_ANSWER_TOKENS = 128


def save_weights(
    base: Base, decoder: "Model", tokenizer: "PreTrainedTokenizerBase", target: Path, *, is_adapter: bool
) -> Path:
    """Writes the adapter in PEFT's format, or the model in Transformers', and the tokenizer; returns `target`."""
    from stoker.export import adapter
    from stoker.models import open as models
    from stoker.models.folder import save_tokenizer

    with _whole_disk_named(target):
        if is_adapter:
            adapter.save(decoder, target, base_name=_portable_name(base), revision=base.revision)
        else:
            models.save(decoder, base.spec, target, config=base.config, source=base.folder)
        save_tokenizer(tokenizer, target)
    return target


def _portable_name(base: Base) -> str:
    """Returns the base's name so that it is found from any working directory: local folders become absolute."""
    path = Path(base.name).expanduser()
    return str(path.resolve()) if path.is_dir() else base.name


@contextmanager
def _whole_disk_named(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, OutputError) as error:
        refused = error.__cause__ if isinstance(error, OutputError) else error
        raise OutputError(
            f"the trained weights cannot be written: {getattr(refused, 'strerror', None) or error}.",
            where=str(target),
            fix="Free some space, then use --resume: the last checkpoint holds them and training is not repeated.",
        ) from error


def answer(session: Session, questions: Sequence[str], console: Console) -> tuple[tuple[str, str], ...]:
    """Returns each question with the tuned model's greedy answer."""
    answers = []
    for question in questions:
        with console.status(f"answering: {question}"):
            answers.append((question, session.answer(question, max_new_tokens=_ANSWER_TOKENS)))
    return tuple(answers)


def conclude(
    console: Console,
    folder: RunFolder,
    *,
    losses: Mapping[str, Mapping[str, float]],
    answers: Sequence[tuple[str, str]],
    weights: Path,
    result: TrainingResult,
) -> None:
    """Writes report.html and says what was reached, where everything is and how to talk to the model."""
    page = report.write(folder.path)
    console.print()
    console.print(_loss_table(losses))
    for question, text in answers:
        console.print(f"\n[bold cyan]Q[/] {_plain(question)}\n[bold green]A[/] {_plain(text)}", highlight=False)
    console.print()
    places = [("adapter" if weights == folder.adapter else "model", weights), ("checkpoint", result.checkpoint)]
    if result.best_checkpoint is not None and result.best_checkpoint != result.checkpoint:
        places.append((f"best (validation loss {result.best_loss:.4f})", result.best_checkpoint))
    places.append(("report", page))
    table = Table.grid(padding=(0, 2))
    for name, place in places:
        table.add_row(f"[dim]{name}[/]", str(place))
    table.add_row("[dim]chat[/]", f"[bold]{escape(program())} chat {escape(str(folder.path))}[/]")
    console.print(table, soft_wrap=True)


def say_interrupted(console: Console, folder: RunFolder, result: TrainingResult) -> None:
    """Writes report.html of what there is and says how to go on."""
    report.write(folder.path)
    by = f" by {result.interrupted_by}" if result.interrupted_by else ""
    console.print(
        f"\nInterrupted{by} after step {result.step}; saved in {result.checkpoint}."
        "\nGo on with the same command and --resume.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def program() -> str:
    """Returns what to type for `stoker`: its path from here when the shell would not find the one that is running."""
    running = Path(sys.argv[0])
    found = shutil.which("stoker")
    if running.name != "stoker" or (found is not None and Path(found).samefile(running)):
        return "stoker"
    return os.path.relpath(running)


def _loss_table(losses: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("loss", "before", "after"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for split, pair in losses.items():
        table.add_row(split, f"{pair['before']:.4f}", f"[bold green]{pair['after']:.4f}[/]")
    return table


def _plain(text: str) -> str:
    return escape(text) if text else "[dim](nothing)[/]"
