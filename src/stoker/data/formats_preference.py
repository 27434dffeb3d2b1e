"""Rows that judge answers: pairs, single labelled answers, labelled steps; and prompts with one completion.

The shapes are those of Axolotl's and TRL's documentation: prompt and answers as texts or as messages, the prompt also
inside both answers.
"""

from collections.abc import Mapping
from typing import Any

from stoker.data.formats_chat import conversation
from stoker.data.formats_text import answer_text, prompt_text
from stoker.data.options import Reading
from stoker.data.records import (
    Conversation,
    Pair,
    Row,
    Texts,
    decoded,
    flag_of,
    kind,
    labelled,
    list_of,
    names,
    text_of,
)
from stoker.errors import DataError

STEP_END = "\n"
"""Stands after each step of a solution; the step's label is kept at its last token."""


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | Mapping) or (isinstance(value, list | tuple) and len(value) > 0)


def recognise_pair(row: Row) -> str | None:
    """Returns why a row is a pair, or None."""
    return "rows have 'chosen' and 'rejected'" if all(_is_answer(row.get(k)) for k in ("chosen", "rejected")) else None


def recognise_unpaired(row: Row) -> str | None:
    """Returns why a row is a labelled answer, or None."""
    is_label = isinstance(row.get("label"), bool)
    return "rows have 'completion' and 'label'" if is_label and _is_answer(row.get("completion")) else None


def recognise_steps(row: Row) -> str | None:
    """Returns why a row holds labelled steps, or None."""
    lists = all(isinstance(row.get(name), list | tuple) for name in ("completions", "labels"))
    return "rows have 'completions' and 'labels'" if lists and "input_ids" not in row else None


def recognise_completion(row: Row) -> str | None:
    """Returns why a row is a prompt with its completion, or None."""
    both = all(_is_answer(row.get(name)) for name in ("prompt", "completion"))
    return "rows have 'prompt' and 'completion'" if both else None


def convert_pair(row: Row, reading: Reading) -> Pair:
    """Returns both answers after the prompt they share."""
    if _is_plain(row, reading):
        return Pair(_plain(row, "chosen", reading), _plain(row, "rejected", reading))
    prompt = _prompt(row, reading)
    chosen, rejected = _answer(row, "chosen", reading), _answer(row, "rejected", reading)
    if not prompt:
        length = _shared(chosen, rejected)
        if not length:
            raise DataError("the row has no 'prompt', and 'chosen' and 'rejected' do not begin with the same messages.")
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    else:
        chosen, rejected = _after(prompt, chosen, "chosen"), _after(prompt, rejected, "rejected")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise DataError(f"field {reading.theirs(name)!r} holds nothing but the prompt.")
    return Pair(_joined(prompt, chosen, row, reading), _joined(prompt, rejected, row, reading))


def convert_unpaired(row: Row, reading: Reading) -> Conversation | Texts:
    """Returns the answer after its prompt, with its label."""
    if row.get("label") is None:
        raise DataError(f"field {reading.theirs('label')!r} is missing or null; the row has: {names(row)}.")
    label = flag_of(row["label"], f"field {reading.theirs('label')!r}")
    return labelled(_one(row, reading, plain=_is_plain(row, reading)), int(label))


def convert_completion(row: Row, reading: Reading) -> Conversation | Texts:
    """Returns a completion after its prompt: texts as plain text, messages as a conversation."""
    is_text = isinstance(decoded(row.get("prompt")), str) and isinstance(decoded(row.get("completion")), str)
    return _one(row, reading, plain=is_text or _is_plain(row, reading))


def convert_steps(row: Row, reading: Reading) -> Texts:
    """Returns the prompt and the steps, each with a line break and its label at its last token."""
    prompt = text_of(row, "prompt", reading.fields)
    steps, labels = list_of(row, "completions", reading.fields), list_of(row, "labels", reading.fields)
    if len(steps) != len(labels):
        raise DataError(f"the row has {len(steps)} completions and {len(labels)} labels.")
    for index, step in enumerate(steps):
        if not isinstance(step, str) or not step:
            raise DataError(f"{reading.theirs('completions')}[{index}] is {kind(step)}, not a text with words.")
    flags = [int(flag_of(value, f"{reading.theirs('labels')}[{index}]")) for index, value in enumerate(labels)]
    parts = ((f"{prompt}{STEP_END}", False), *((f"{step}{STEP_END}", False) for step in steps))
    return Texts(parts, steps=(-1, *flags))


def _is_plain(row: Row, reading: Reading) -> bool:
    """Whether the row is printed in the source's own texts instead of a chat template."""
    return reading.prompt.format is not None


def _one(row: Row, reading: Reading, *, plain: bool) -> Conversation | Texts:
    if plain:
        return _plain(row, "completion", reading)
    prompt, answer = _prompt(row, reading), _answer(row, "completion", reading)
    if not prompt:
        prompt, answer = answer[:-1], answer[-1:]
        if not prompt:
            raise DataError(f"field {reading.theirs('prompt')!r} is missing or null; the row has: {names(row)}.")
    else:
        answer = _after(prompt, answer, "completion")
    if not answer:
        raise DataError(f"field {reading.theirs('completion')!r} holds nothing but the prompt.")
    return _joined(prompt, answer, row, reading)


def _plain(row: Row, name: str, reading: Reading) -> Texts:
    prompt, answer = text_of(row, "prompt", reading.fields), text_of(row, name, reading.fields)
    system = text_of(row, "system", reading.fields, optional=True)
    if reading.prompt.format is not None:
        prompt = prompt_text(reading.prompt, system, {"prompt": prompt, "instruction": prompt, "input": ""})
    elif system:
        raise DataError("the row has a field 'system', but no text says where it stands.", fix="Set prompt.format.")
    return Texts(((prompt, False), (answer_text(reading.prompt, answer), True)))


def _prompt(row: Row, reading: Reading) -> list[Any]:
    """Returns the prompt's messages; none if the row has no prompt."""
    value = decoded(row.get("prompt"))
    if value is None or value == "":
        return []
    return _messages(value, "user", reading.theirs("prompt"), reading)


def _answer(row: Row, name: str, reading: Reading) -> list[Any]:
    value = decoded(row.get(name))
    if value is None:
        raise DataError(f"field {reading.theirs(name)!r} is missing or null; the row has: {names(row)}.")
    return _messages(value, "assistant", reading.theirs(name), reading)


def _messages(value: Any, role: str, place: str, reading: Reading) -> list[Any]:
    if isinstance(value, str):
        return [{reading.theirs("role"): role, reading.theirs("content"): value}]
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list | tuple):
        return list(value)
    raise DataError(f"field {place!r} is {kind(value)}, not text or messages.")


def _shared(first: list[Any], second: list[Any]) -> int:
    """Returns how many messages both begin with."""
    return next((index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)


def _after(prompt: list[Any], answer: list[Any], name: str) -> list[Any]:
    """Returns the answer without the prompt, which some rows repeat at its beginning."""
    if len(answer) == 1:
        return answer
    if answer[: len(prompt)] == prompt:
        return answer[len(prompt) :]
    # Some rows keep only the question beside whole conversations.
    said = [message.get("content", message.get("value")) for message in prompt if isinstance(message, Mapping)]
    begins = [message.get("content", message.get("value")) for message in answer if isinstance(message, Mapping)]
    if said == begins[: len(said)]:
        return answer[len(prompt) :]
    raise DataError(f"field {name!r} holds {len(answer)} messages, which do not begin with those of 'prompt'.")


def _joined(prompt: list[Any], answer: list[Any], row: Row, reading: Reading) -> Conversation:
    return conversation([*prompt, *answer], "messages", row, reading, trained_from=len(prompt))
