"""Instructions, plain texts, segments and rows of tokens."""

from collections.abc import Mapping
from functools import cache
from string import Formatter
from typing import Any

from stoker.data.options import PromptTexts, Reading
from stoker.data.records import Conversation, Given, Row, Texts, decoded, flag_of, kind, list_of, text_of
from stoker.errors import DataError

NOT_LEARNED = -100
"""The label of a token that does not train, as PyTorch's cross-entropy ignores it."""


def never(row: Row) -> str | None:
    """Recognises nothing: a format that must be declared."""
    return None


# ---- alpaca ---------------------------------------------------------------------------------------------------------


def recognise_alpaca(row: Row) -> str | None:
    """Returns why a row is an instruction with its answer, or None."""
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        return "rows have 'instruction' and 'output'"
    return None


def convert_alpaca(row: Row, reading: Reading) -> Conversation:
    """Returns a user message (instruction, a blank line, input) and the answer."""
    fields = reading.fields
    instruction, output = text_of(row, "instruction", fields), text_of(row, "output", fields)
    extra = text_of(row, "input", fields, optional=True)
    user: dict[str, Any] = {"role": "user", "content": f"{instruction}\n\n{extra}" if extra.strip() else instruction}
    if extra.strip():
        # The alpaca template prints them apart; others print the joined content.
        user |= {"instruction": instruction, "input": extra}
    system = text_of(row, "system", fields, optional=True) or reading.chat.default_system_message or ""
    keeps_system = system.strip() and not reading.chat.drop_system_message
    first = ({"role": "system", "content": system},) if keeps_system else ()
    return Conversation((*first, user, {"role": "assistant", "content": output}))


# ---- prompt ---------------------------------------------------------------------------------------------------------


def convert_prompt(row: Row, reading: Reading) -> Texts:
    """Returns the row's fields in the texts of its source; the answer trains."""
    fields, texts = reading.fields, reading.prompt
    instruction, output = text_of(row, "instruction", fields), text_of(row, "output", fields)
    extra = text_of(row, "input", fields, optional=True)
    system = text_of(row, "system", fields, optional=True)
    values = {"instruction": instruction, "input": extra, "prompt": instruction}
    prompt = prompt_text(texts, system, values)
    return Texts(((prompt, False), (answer_text(texts, output), True)))


def prompt_text(texts: PromptTexts, system: str, values: Mapping[str, str]) -> str:
    """Returns the prompt: the system text, if there is one, and the format with the values in it."""
    has_input = bool(values.get("input"))
    form = texts.format if has_input or texts.no_input_format is None else texts.no_input_format
    if form is None:
        raise DataError("the prompt's text is missing.", fix="Set data.train[].prompt.format.")
    if not system:
        default = texts.system if has_input or texts.system_no_input is None else texts.system_no_input
        system = default or ""
    if "system" in placeholders(form):
        return filled(form, {**values, "system": system})
    return (filled(texts.system_format, {"system": system}) if system else "") + filled(form, values)


def answer_text(texts: PromptTexts, answer: str) -> str:
    """Returns the answer in its format."""
    names = ("output", "completion", "chosen", "rejected")
    return answer if texts.output_format is None else filled(texts.output_format, dict.fromkeys(names, answer))


@cache
def _parsed(form: str) -> tuple[tuple[str, str | None], ...]:
    try:
        parts = list(Formatter().parse(form))
    except ValueError as error:
        raise DataError(f"the prompt text {form!r} cannot be read: {error}.", fix="Write {{ for a brace.") from error
    for _, name, spec, conversion in parts:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise DataError(f"the prompt text {form!r} has {{{name}}}, which is no field.", fix="Write {{ for a brace.")
    return tuple((literal, name) for literal, name, *_ in parts)


def placeholders(form: str) -> set[str]:
    """Returns the names that stand in braces."""
    return {name for _, name in _parsed(form) if name}


def filled(form: str, values: Mapping[str, str]) -> str:
    """Returns the text with values in place of `{name}`; nothing else of Python's format language is read."""
    unknown = placeholders(form) - set(values)
    if unknown:
        raise DataError(
            f"the prompt text {form!r} has {{{min(unknown)}}}.", fix=f"Fields here are: {', '.join(sorted(values))}."
        )
    return "".join(literal + (values[name] if name else "") for literal, name in _parsed(form))


# ---- completion -----------------------------------------------------------------------------------------------------


def recognise_completion(row: Row) -> str | None:
    """Returns why a row is a text, or None."""
    return "rows have 'text'" if isinstance(row.get("text"), str) else None


def convert_completion(row: Row, reading: Reading) -> Texts:
    """Returns the text, which trains whole."""
    text = text_of(row, "text", reading.fields)
    if not text.strip():
        raise DataError(f"field {reading.theirs('text')!r} is empty.")
    return Texts(((text, True),))


# ---- segments -------------------------------------------------------------------------------------------------------


def recognise_segments(row: Row) -> str | None:
    """Returns why a row holds segments, or None."""
    segments = decoded(row.get("segments"))
    if isinstance(segments, list | tuple) and segments and isinstance(segments[0], Mapping) and "text" in segments[0]:
        return "rows have 'segments' with label/text"
    return None


def convert_segments(row: Row, reading: Reading) -> Texts:
    """Returns the segments: nothing is added to them, no BOS and no EOS."""
    parts = []
    for index, segment in enumerate(list_of(row, "segments", reading.fields)):
        place = f"{reading.theirs('segments')}[{index}]"
        if not isinstance(segment, Mapping):
            raise DataError(f"{place} is {kind(segment)}, not an object with label and text.")
        if not isinstance(segment.get("text"), str):
            raise DataError(f"{place}.text is {kind(segment.get('text'))}, not text.")
        parts.append((segment["text"], flag_of(segment.get("label"), f"{place}.label")))
    return Texts(tuple(parts), whole=False)


# ---- tokenized ------------------------------------------------------------------------------------------------------


def recognise_tokens(row: Row) -> str | None:
    """Returns why a row holds tokens, or None."""
    ids = decoded(row.get("input_ids"))
    return "rows have 'input_ids'" if isinstance(ids, list | tuple) and ids and type(ids[0]) is int else None


def convert_tokens(row: Row, reading: Reading) -> Given:
    """Returns the row's tokens; those whose label is their own id train, or all if there are no labels."""
    fields = reading.fields
    ids = _numbers(row, "input_ids", fields)
    labels = _numbers(row, "labels", fields) if row.get("labels") is not None else ids
    mask = _numbers(row, "attention_mask", fields) if row.get("attention_mask") is not None else [1] * len(ids)
    for name, values in (("labels", labels), ("attention_mask", mask)):
        if len(values) != len(ids):
            raise DataError(f"field {fields.get(name, name)!r} has {len(values)} entries for {len(ids)} token ids.")
    for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token < 0:
            raise DataError(f"field {fields.get('input_ids', 'input_ids')!r}: {token} at {index} is not a token id.")
        if label not in (token, NOT_LEARNED):
            raise DataError(
                f"field {fields.get('labels', 'labels')!r}: {label} at {index} is neither the token's id {token} nor "
                f"{NOT_LEARNED}.",
                fix="Labels stand beside their tokens and are shifted later: give each token its own id, or -100 where "
                "it does not train. Other targets are not learned.",
            )
    kept = [index for index, real in enumerate(mask) if real]
    if not kept:
        raise DataError("every token is padding.")
    return Given(tuple(ids[index] for index in kept), tuple(labels[index] != NOT_LEARNED for index in kept))


def _numbers(row: Row, name: str, fields: Mapping[str, str]) -> list[int]:
    values = list_of(row, name, fields)
    for index, value in enumerate(values):
        if type(value) is not int:
            raise DataError(f"field {fields.get(name, name)!r}: entry {index} is {kind(value)}, not a whole number.")
    return values
