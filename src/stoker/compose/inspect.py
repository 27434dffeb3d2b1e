"""`stoker inspect`: the data as the model will see it, and what is wrong with it."""

from typing import TYPE_CHECKING

from rich.console import Console

from stoker.compose.data import packing, prepare_data, refuse_faults
from stoker.compose.model import Base, load_tokenizer_of, open_base_of
from stoker.compose.sources import say
from stoker.config.row_formats import not_learned
from stoker.config.schema import RunConfig
from stoker.data import inspect as show
from stoker.errors import ConfigError
from stoker.plan.limits import fitted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def inspect(config: RunConfig, *, rows: int, split: str, console: Console | None = None) -> None:
    """Prints the audit and the first `rows` documents of a split, trained tokens in colour.

    Raises:
        DataError: the data cannot be read, or the audit finds a fault; that comes after the rows are shown.
    """
    base = open_base_of(config)
    inspect_for(base, load_tokenizer_of(config, base), config, rows=rows, split=split, console=console)


def inspect_for(
    base: Base,
    tokenizer: "PreTrainedTokenizerBase",
    config: RunConfig,
    *,
    rows: int,
    split: str = "train",
    console: Console | None = None,
) -> None:
    """Does the same for a base and a tokenizer that are open already."""
    console = console or Console()
    config = fitted(config, base.spec)
    data = prepare_data(config, tokenizer, console=console)
    documents = data.train if split == "train" else data.validation
    if documents is None:
        raise ConfigError("--split validation: data.validation is not set.", fix="Set it, or look at --split train.")
    for row in show.rows(documents, tokenizer, count=rows):
        console.print(row)
    for name, audit in data.audits.items():
        console.print(show.audit_table(audit, title=name))
        if packed := packing(config, data.train if name == "train" else data.validation or data.train):
            console.print(packed, highlight=False)
        console.print(*show.findings(audit), sep="\n")
    for notice in data.notices:
        console.print(notice, style="yellow", markup=False)
    refuse_faults(data.audits)
    if others := sorted({audit.row_kind for audit in data.audits.values()} - {"documents"}):
        but = f"Nothing is wrong with the rows, but they are {' and '.join(others)}"
        say(console, not_learned(but, config.task.kind).what, style="yellow")
    else:
        console.print("[green]Nothing in the data stops a run.[/]")
