"""Row formats: a row of a source becomes a conversation or a text. A new format is one entry of `FORMATS`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stoker.errors import DataError

Row = Mapping[str, Any]
Fields = Mapping[str, str]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of roles in the wild, and the name that chat templates know. Others pass through unchanged in `role`."""


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them: `role`, `content` and whatever else the row gave; tools if it has any."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Text:
    """A text to continue."""

    text: str


@dataclass(frozen=True)
class Format:
    """One row format.

    `recognise` returns why a row has this format, or None. `convert` takes the row and the field mapping, and raises
    DataError (without a place) for a row that it cannot take.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    recognise: Callable[[Row], str | None]
    convert: Callable[[Row, Fields], Conversation | Text]
    is_chat: bool = True
    """Whether rows become conversations, which need a chat template."""


@dataclass(frozen=True)
class Detection:
    """The format of a source and, as a clause, why."""

    format: Format
    reason: str


def detect(sample: Sequence[Row], where: str, *, fields: Fields | None = None) -> Detection:
    """Returns the format that most rows of the sample have, at least half of them; the others are malformed rows of it.

    Raises DataError naming the fields found, or the formats where several are equally many.
    """
    mapped = [_with_our_names(row, fields or {}) for row in sample]
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
    wanted = "; ".join(f"{form.name} ({', '.join(form.required)})" for form in FORMATS.values())
    raise DataError(
        f"the rows fit no known format; their fields are: {_names(sample[0])}.",
        where=where,
        fix=f"Formats and the fields they need: {wanted}. If the fields have other names, set data.train[].format and "
        "data.train[].fields, for example fields: {text: body}.",
    )


def declared(name: str) -> Format:
    """Returns the format of that name. Raises DataError naming those that exist."""
    if name not in FORMATS:
        raise DataError(f"format = {name!r} is not known.", fix=f"Use auto or one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def check_fields(form: Format, fields: Fields, where: str) -> None:
    """Raises DataError if the mapping renames something that the format does not have."""
    known = (*form.required, *form.optional)
    for ours in fields:
        if ours not in known:
            raise DataError(
                f"fields names {ours!r}, which the format {form.name} does not have.",
                where=where,
                fix=f"Map our names to yours; ours are: {', '.join(known)}.",
            )


def convert(form: Format, row: Row, fields: Fields) -> Conversation | Text:
    """Returns the row's conversation or text. Raises DataError without a place."""
    return form.convert(_with_our_names(row, fields), fields)


def _with_our_names(row: Row, fields: Fields) -> Row:
    renamed = {ours: row[theirs] for ours, theirs in fields.items() if theirs in row}
    return {**row, **renamed} if renamed else row


def _names(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"


def _text_of(row: Row, name: str, fields: Fields, *, optional: bool = False) -> str:
    value = row.get(name)
    if value is None and optional:
        return ""
    theirs = fields.get(name, name)
    if value is None:
        raise DataError(f"field {theirs!r} is missing or null; the row has: {_names(row)}.")
    if not isinstance(value, str):
        raise DataError(f"field {theirs!r} is {type(value).__name__}, not text.")
    return value


# ---- chat -----------------------------------------------------------------------------------------------------------

_LISTS = ("messages", "conversations")


def _recognise_chat(row: Row) -> str | None:
    for name in _LISTS:
        messages = _decoded(row.get(name))
        if isinstance(messages, list | tuple) and messages and isinstance(messages[0], Mapping):
            keys = "from/value" if "from" in messages[0] else "role/content"
            return f"rows have {name!r} with {keys}"
    return None


def _decoded(value: Any) -> Any:
    """CSV and some Parquet files keep lists as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _convert_chat(row: Row, fields: Fields) -> Conversation:
    name = next((name for name in _LISTS if row.get(name) is not None), None)
    if name is None:
        raise DataError(f"field 'messages' (or 'conversations') is missing or null; the row has: {_names(row)}.")
    messages = _decoded(row[name])
    if not isinstance(messages, list | tuple) or not messages:
        what = "empty" if isinstance(messages, list | tuple) else f"{type(messages).__name__}, not a list"
        raise DataError(f"field {fields.get('messages', name)!r} is {what}.")
    system = row.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    converted = [_message(message, f"{name}[{index}]", fields) for index, message in enumerate(messages)]
    if first and converted[0]["role"] == "system":
        raise DataError("the row has a field 'system' and a system message too.")
    tools = _decoded(row.get("tools"))
    if tools is not None and not isinstance(tools, list | tuple):
        raise DataError(f"field 'tools' is {type(tools).__name__}, not a list.")
    return Conversation((*first, *converted), tuple(tools) if tools else None)


def _message(message: Any, place: str, fields: Fields) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{place} is {type(message).__name__}, not an object with role and content.")
    sharegpt = "from" in message and "role" not in message
    role_name = fields.get("role", "from" if sharegpt else "role")
    content_name = fields.get("content", "value" if sharegpt else "content")
    role = message.get(role_name)
    if not isinstance(role, str) or not role:
        raise DataError(f"{place} has no {role_name!r}; it has: {_names(message)}.")
    known = ROLES.get(role.lower())
    if known is None and sharegpt:
        raise DataError(f"{place} is from {role!r}, which is not known (known: {', '.join(ROLES)}).")
    rest = {key: value for key, value in message.items() if key not in (role_name, content_name) and value is not None}
    content = _content(message.get(content_name), f"{place}.{content_name}", message, rest)
    return {**rest, "role": known or role} | ({} if content is None else {"content": content})


def _content(value: Any, place: str, message: Mapping[str, Any], rest: Mapping[str, Any]) -> str | None:
    """Returns a content as text: text parts are joined; only a message of tool calls may have none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        for part in value:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise DataError(f"{place} has a part that is not text ({kind}); only text can be trained on.")
        return "".join(part["text"] for part in value)
    if value is None and rest.get("tool_calls"):
        return None
    if value is None:
        raise DataError(f"{place} is missing or null; the message has: {_names(message)}.")
    raise DataError(f"{place} is {type(value).__name__}, not text.")


# ---- alpaca ---------------------------------------------------------------------------------------------------------


def _recognise_alpaca(row: Row) -> str | None:
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        return "rows have 'instruction' and 'output'"
    return None


def _convert_alpaca(row: Row, fields: Fields) -> Conversation:
    instruction, output = _text_of(row, "instruction", fields), _text_of(row, "output", fields)
    extra = _text_of(row, "input", fields, optional=True)
    user: dict[str, Any] = {"role": "user", "content": f"{instruction}\n\n{extra}" if extra.strip() else instruction}
    if extra.strip():
        # The alpaca template prints them apart; others print the joined content.
        user |= {"instruction": instruction, "input": extra}
    system = _text_of(row, "system", fields, optional=True)
    first = ({"role": "system", "content": system},) if system.strip() else ()
    return Conversation((*first, user, {"role": "assistant", "content": output}))


# ---- completion -----------------------------------------------------------------------------------------------------


def _recognise_completion(row: Row) -> str | None:
    return "rows have 'text'" if isinstance(row.get("text"), str) else None


def _convert_completion(row: Row, fields: Fields) -> Text:
    text = _text_of(row, "text", fields)
    if not text.strip():
        raise DataError(f"field {fields.get('text', 'text')!r} is empty.")
    return Text(text)


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("chat", ("messages",), ("role", "content", "system", "tools"), _recognise_chat, _convert_chat),
        Format("alpaca", ("instruction", "output"), ("input", "system"), _recognise_alpaca, _convert_alpaca),
        Format("completion", ("text",), (), _recognise_completion, _convert_completion, is_chat=False),
    )
}
"""Every format, in the order in which `detect` tries them."""
