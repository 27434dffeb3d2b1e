"""Chats: a list of messages, with roles and contents under the names that are in use."""

import re
from collections.abc import Mapping
from typing import Any

from stoker.data.options import Reading
from stoker.data.records import Conversation, Detail, Row, decoded, flag_of, kind, names
from stoker.errors import DataError

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
    "function_call": "assistant",
}
"""Names of roles in the wild, and the name that chat templates know. Others pass through unchanged in `role`."""

_LISTS = ("messages", "conversations")
_PLAIN = {"role", "content"}
_THOUGHTS = tuple(
    re.compile(rf"\s*{opening}(.*?){closing}\s*", re.DOTALL)
    for opening, closing in (
        ("<think>", "</think>"),
        ("<thinking>", "</thinking>"),
        ("<reasoning>", "</reasoning>"),
        (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    )
)


def recognise(row: Row) -> str | None:
    """Returns why a row is a chat, or None."""
    for name in _LISTS:
        messages = decoded(row.get(name))
        if isinstance(messages, list | tuple) and messages and isinstance(messages[0], Mapping):
            keys = "from/value" if "from" in messages[0] else "role/content"
            return f"rows have {name!r} with {keys}"
    return None


def convert(row: Row, reading: Reading) -> Conversation:
    """Returns the row's conversation."""
    name = next((name for name in _LISTS if row.get(name) is not None), None)
    if name is None:
        raise DataError(f"field 'messages' (or 'conversations') is missing or null; the row has: {names(row)}.")
    listed = decoded(row[name])
    if not isinstance(listed, list | tuple) or not listed:
        what = "empty" if isinstance(listed, list | tuple) else f"{kind(listed)}, not a list"
        raise DataError(f"field {reading.fields.get('messages', name)!r} is {what}.")
    return conversation(listed, name, row, reading)


def conversation(
    listed: list[Any] | tuple[Any, ...], name: str, row: Row, reading: Reading, *, trained_from: int | None = None
) -> Conversation:
    """Returns the conversation of the messages in field `name`, with the row's system message and tools.

    With `trained_from`, the messages from that index on train where the assistant speaks, and no others.
    """
    read = [_message(message, f"{name}[{index}]", reading) for index, message in enumerate(listed)]
    if trained_from is not None:
        marked = [index >= trained_from and message["role"] == "assistant" for index, (message, *_) in enumerate(read)]
        read = [
            (message, trains if flag is None else flag and trains, detail)
            for (message, flag, detail), trains in zip(read, marked, strict=True)
        ]
    read = [*_system(row, read, reading), *read]
    if reading.chat.drop_system_message:
        read = [entry for entry in read if entry[0]["role"] != "system"]
        if not read:
            raise DataError(f"field {reading.fields.get('messages', name)!r} holds nothing but system messages.")
    messages, trains, details = zip(*read, strict=True)
    return Conversation(
        messages,
        tools_of(row),
        trains if any(flag is not None for flag in trains) else None,
        details if any(detail is not None for detail in details) else None,
    )


def tools_of(row: Row) -> tuple[Any, ...] | None:
    """Returns the row's tools, None if it has none."""
    tools = decoded(row.get("tools"))
    if tools is None or tools == "":
        return None
    if not isinstance(tools, list | tuple):
        raise DataError(f"field 'tools' is {kind(tools)}, not a list.")
    read = tuple(decoded(tool) for tool in tools)
    for index, tool in enumerate(read):
        if not isinstance(tool, Mapping):
            raise DataError(f"tools[{index}] is {kind(tool)}, not an object.")
    return read or None


Read = tuple[dict[str, Any], bool | None, Detail | None]


def _system(row: Row, read: list[Read], reading: Reading) -> list[Read]:
    """Returns the system message that the row's own field, or the default, puts before the others."""
    text = row.get("system")
    if text is not None and not isinstance(text, str):
        raise DataError(f"field 'system' is {kind(text)}, not text.")
    has_one = read[0][0]["role"] == "system"
    if text and text.strip():
        if has_one:
            raise DataError("the row has a field 'system' and a system message too.")
        return [({"role": "system", "content": text}, None, None)]
    default = reading.chat.default_system_message
    return [] if has_one or default is None else [({"role": "system", "content": default}, None, None)]


def _message(message: Any, place: str, reading: Reading) -> Read:
    """Returns a message as templates take it, whether it says that it trains, and which characters do."""
    if (plain := _plain_message(message, reading)) is not None:
        return plain, None, None
    if not isinstance(message, Mapping):
        raise DataError(f"{place} is {kind(message)}, not an object with role and content.")
    fields, sharegpt = reading.fields, "from" in message and "role" not in message
    role_name = fields.get("role", "from" if sharegpt else "role")
    content_name = fields.get("content", "value" if sharegpt else "content")
    theirs = message.get(role_name)
    role = _role(theirs, role_name, place, message, reading, must_be_known=sharegpt)
    used = {role_name, content_name}
    rest = _others(message, used, reading)
    for thought in ("reasoning_content", "thinking"):
        if thought in rest and not isinstance(rest[thought], str):
            raise DataError(f"{place}.{thought} is {kind(rest[thought])}, not text.")
    if str(theirs).lower() == "function_call":
        call = decoded(message.get(content_name))
        rest["tool_calls"], content = (list(call) if isinstance(call, list | tuple) else [call]), None
    else:
        content = _content(message.get(content_name), f"{place}.{content_name}", message, rest)
    if "tool_calls" in rest:
        rest["tool_calls"] = _calls(rest["tool_calls"], f"{place}.tool_calls")
    trains, detail = _training(message, content, place, reading, rest)
    read = {**rest, "role": role} | ({} if content is None else {"content": content})
    if reading.chat.split_thinking and role == "assistant" and content:
        read = _without_thought(read, content)
        if detail is not None and read["content"] != content:
            raise DataError(f"{place} has train_detail, and a thought that split_thinking takes out of its content.")
    return read, trains, detail


def _plain_message(message: Any, reading: Reading) -> dict[str, Any] | None:
    """Returns a message of a known role and a text where nothing is to be looked up, which is nearly all; else None."""
    if type(message) is not dict or message.keys() != _PLAIN or reading.fields or reading.chat.roles:
        return None
    if reading.chat.message_properties or reading.chat.split_thinking:
        return None
    role, content = message["role"], message["content"]
    known = ROLES.get(role) if isinstance(role, str) and role != "function_call" else None
    return {"role": known, "content": content} if known is not None and isinstance(content, str) else None


def _role(theirs: Any, name: str, place: str, message: Row, reading: Reading, *, must_be_known: bool) -> str:
    if theirs is None:
        raise DataError(f"{place}.{name} is missing or null; the message has: {names(message)}.")
    if not isinstance(theirs, str) or not theirs:
        raise DataError(f"{place}.{name} is {'empty' if theirs == '' else kind(theirs)}, not the name of a role.")
    for ours, aliases in reading.chat.roles.items():
        if theirs in aliases:
            return ours
    known = ROLES.get(theirs.lower())
    if known is None and must_be_known:
        fix = "Name it in data.train[].chat.roles, for example roles: {assistant: [" + theirs + "]}."
        raise DataError(f"{place} is from {theirs!r}, which is not known (known: {', '.join(ROLES)}).", fix=fix)
    return known or theirs


def _others(message: Row, used: set[str], reading: Reading) -> dict[str, Any]:
    """Returns the message's other keys under the names that templates read; keys without a value are left out."""
    properties = dict(reading.chat.message_properties)
    if "thinking" in reading.fields:
        properties["reasoning_content"] = reading.fields["thinking"]
    if not properties:
        return {key: value for key, value in message.items() if key not in used and value is not None}
    taken = used | set(properties.values())
    rest = {key: value for key, value in message.items() if key not in taken and value is not None}
    return rest | {ours: message[key] for ours, key in properties.items() if message.get(key) is not None}


def _content(value: Any, place: str, message: Row, rest: Row) -> str | None:
    """Returns a content as text: text parts are joined; only a message of tool calls may have none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        for part in value:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                what = part.get("type") if isinstance(part, Mapping) else kind(part)
                raise DataError(f"{place} has a part that is not text ({what}); only text can be trained on.")
        return "".join(part["text"] for part in value)
    if value is None and rest.get("tool_calls"):
        return None
    if value is None:
        raise DataError(f"{place} is missing or null; the message has: {names(message)}.")
    raise DataError(f"{place} is {kind(value)}, not text.")


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Returns tool calls as templates read them: `{"type": "function", "function": {"name", "arguments"}}`.

    Arguments that are an object in JSON text become the object: a template would print the text as a text in quotes.
    """
    calls = decoded(value)
    if not isinstance(calls, list | tuple):
        raise DataError(f"{place} is {kind(calls)}, not a list.")
    read = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}[{index}] has no name of a function.")
        arguments = decoded(function.get("arguments", {}))
        function = {**function, "arguments": {} if arguments in (None, "") else arguments}
        outer = {key: item for key, item in call.items() if key != "function" and item is not None}
        if "function" not in call:
            outer = {key: item for key, item in outer.items() if key not in function}
        read.append({"type": "function", **outer, "function": function})
    return read


def _training(
    message: Row, content: str | None, place: str, reading: Reading, rest: dict[str, Any]
) -> tuple[bool | None, Detail | None]:
    """Returns whether the message itself says that it trains, and which characters of its content do."""
    fields = reading.fields
    # OpenAI's fine-tuning rows keep the same wish in `weight`.
    name = fields.get("train", "weight")
    value = message.get(name)
    if "train" in fields or value in (0, 1):
        rest.pop(name, None)
    elif value is not None:
        raise DataError(f"{place}.{name} is {value!r}; a message trains with weight 1 or does not with 0.")
    trains = None if value is None else flag_of(value, f"{place}.{name}")
    detail_name = fields.get("train_detail")
    if detail_name is None or message.get(detail_name) is None:
        rest.pop(detail_name or "", None)
        return trains, None
    rest.pop(detail_name, None)
    return trains, _detail(decoded(message[detail_name]), content or "", f"{place}.{detail_name}")


def _detail(spans: Any, content: str, place: str) -> Detail:
    """Returns the characters that train, as `(start, end)`; the row gives both ends inclusive."""
    if not isinstance(spans, list | tuple):
        raise DataError(f"{place} is {kind(spans)}, not a list.")
    found: list[tuple[int, int]] = []
    last = 0
    for index, span in enumerate(spans):
        if not isinstance(span, Mapping):
            raise DataError(f"{place}[{index}] is {kind(span)}, not an object with begin_offset, end_offset and train.")
        start, end = span.get("begin_offset"), span.get("end_offset")
        if type(start) is not int or type(end) is not int:
            raise DataError(f"{place}[{index}] needs begin_offset and end_offset as whole numbers.")
        if not last <= start <= end < len(content):
            raise DataError(
                f"{place}[{index}] spans characters {start} to {end}; spans follow one another and end before "
                f"{len(content)}, the content's length."
            )
        if flag_of(span.get("train"), f"{place}[{index}].train"):
            found.append((start, end + 1))
        last = end + 1
    return tuple(found)


def _without_thought(message: dict[str, Any], content: str) -> dict[str, Any]:
    for pattern in _THOUGHTS:
        found = pattern.match(content)
        if found and message.get("reasoning_content") is None:
            return message | {"reasoning_content": found[1].strip(), "content": content[found.end() :]}
    return message
