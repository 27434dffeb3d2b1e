"""Row formats: a row of a source becomes a conversation, texts or tokens. A new format is one entry of `FORMATS`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stoker.data import formats_chat as chat
from stoker.data import formats_preference as preference
from stoker.data import formats_text as text
from stoker.data.options import Reading
from stoker.data.records import Conversation, Converted, Given, Pair, Row, Texts, names, with_our_names
from stoker.errors import DataError

__all__ = ["FORMATS", "Conversation", "Converted", "Detection", "Format", "Given", "Pair", "Texts"]


@dataclass(frozen=True)
class Format:
    """One row format.

    `recognise` returns why a row has this format, or None. `convert` takes the row and the options of its source, and
    raises DataError (without a place) for a row that it cannot take.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    recognise: Callable[[Row], str | None]
    convert: Callable[[Row, Reading], Converted]
    kind: str = "documents"
    """What a row gives: "documents" to learn, "pairs" of which one is better, or "labelled" documents."""


@dataclass(frozen=True)
class Detection:
    """The format of a source and, as a clause, why."""

    format: Format
    reason: str


def detect(sample: Sequence[Row], where: str, *, fields: Mapping[str, str] | None = None) -> Detection:
    """Returns the format that most rows of the sample have, at least half of them; the others are malformed rows of it.

    Raises DataError naming the fields found, or the formats where several are equally many.
    """
    mapped = [with_our_names(row, fields or {}) for row in sample]
    reasons: dict[str, list[str]] = {name: [] for name in FORMATS}
    for row in mapped:
        # A row that fits several (messages beside a text) counts for the first of them.
        found = ((name, form.recognise(row)) for name, form in FORMATS.items())
        name, reason = next(((name, reason) for name, reason in found if reason), ("", ""))
        if reason:
            reasons[name].append(reason)
    best, second, *_ = sorted(reasons, key=lambda name: -len(reasons[name]))
    count = len(reasons[best])
    if count and count == len(reasons[second]):
        raise DataError(
            f"as many rows have the format {best} as {second}.",
            where=where,
            fix="Put them in files of their own, or set data.train[].format.",
        )
    if count and 2 * count >= len(sample):
        doubt = "" if count == len(sample) else f", {count} of the first {len(sample)}"
        return Detection(FORMATS[best], reasons[best][0] + doubt)
    if reason := _nearly(mapped[0], fields or {}):
        raise DataError(reason, where=where, fix="Mend the rows, or set data.train[].format if they are of another.")
    wanted = "; ".join(f"{form.name} ({', '.join(form.required)})" for form in FORMATS.values())
    raise DataError(
        f"the rows fit no known format; their fields are: {names(sample[0])}{_if_one(sample[0])}.",
        where=where,
        fix=f"Formats and the fields they need: {wanted}. If the fields have other names, set data.train[].format and "
        "data.train[].fields, for example fields: {text: body}.",
    )


def _nearly(row: Row, fields: Mapping[str, str]) -> str:
    """Returns what keeps a row from the format whose fields it has, or "" where it has those of none."""
    for form in FORMATS.values():
        if set(form.required) <= row.keys() and form.recognise is not text.never:
            try:
                form.convert(row, Reading(fields))
            except DataError as error:
                return f"the rows have the fields of format {form.name}, but {error.problems[0].what}"
    return ""


def _if_one(row: Row) -> str:
    """Returns what a table's only field may mean, or ""."""
    name = str(*row) if len(row) == 1 else ""
    return " (a single one: columns of CSV are parted by commas, of TSV by tabs)" if set(name) & set(";,|\t") else ""


def declared(name: str) -> Format:
    """Returns the format of that name. Raises DataError naming those that exist."""
    if name not in FORMATS:
        raise DataError(f"format = {name!r} is not known.", fix=f"Use auto or one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def check_fields(form: Format, fields: Mapping[str, str], where: str) -> None:
    """Raises DataError if the mapping renames something that the format does not have."""
    known = (*form.required, *form.optional)
    for ours in fields:
        if ours not in known:
            raise DataError(
                f"fields names {ours!r}, which the format {form.name} does not have.",
                where=where,
                fix=f"Map our names to yours; ours are: {', '.join(known)}.",
            )


def convert(form: Format, row: Row, reading: Reading) -> Converted:
    """Returns what the row holds. Raises DataError without a place."""
    return form.convert(with_our_names(row, reading.fields), reading)


_MESSAGE = ("role", "content", "thinking", "train", "train_detail", "tools")

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format(
            "preference",
            ("chosen", "rejected"),
            ("prompt", "system", *_MESSAGE),
            preference.recognise_pair,
            preference.convert_pair,
            "pairs",
        ),
        Format(
            "stepwise",
            ("prompt", "completions", "labels"),
            (),
            preference.recognise_steps,
            preference.convert_steps,
            "labelled",
        ),
        Format(
            "unpaired",
            ("completion", "label"),
            ("prompt", "system", *_MESSAGE),
            preference.recognise_unpaired,
            preference.convert_unpaired,
            "labelled",
        ),
        Format("tokenized", ("input_ids",), ("labels", "attention_mask"), text.recognise_tokens, text.convert_tokens),
        Format("segments", ("segments",), (), text.recognise_segments, text.convert_segments),
        Format("chat", ("messages",), ("system", *_MESSAGE), chat.recognise, chat.convert),
        Format("alpaca", ("instruction", "output"), ("input", "system"), text.recognise_alpaca, text.convert_alpaca),
        Format(
            "prompt_completion",
            ("prompt", "completion"),
            ("system", *_MESSAGE),
            preference.recognise_completion,
            preference.convert_completion,
        ),
        Format("completion", ("text",), (), text.recognise_completion, text.convert_completion),
        Format("prompt", ("instruction", "output"), ("input", "system"), text.never, text.convert_prompt),
    )
}
"""Every format, in the order in which `detect` tries them; `prompt` is only declared, since it needs texts."""
