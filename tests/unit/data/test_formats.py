import json

import pytest

from stoker.data import formats
from stoker.data.formats import Conversation, Texts
from stoker.data.options import ChatOptions, Reading
from stoker.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
ALPACA = {"instruction": "hi", "input": "", "output": "ho"}
TEXT = {"text": "hi ho"}
HI_HO = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})


def converted(row, name=None, fields=None, **chat):
    form = formats.declared(name) if name else formats.detect([row], "rows", fields=fields).format
    return formats.convert(form, row, Reading(fields or {}, ChatOptions(**chat)))


@pytest.mark.parametrize(
    ("row", "name", "reason"),
    [
        (CHAT, "chat", "rows have 'messages' with role/content"),
        (SHAREGPT, "chat", "rows have 'conversations' with from/value"),
        (CHAT | TEXT, "chat", "rows have 'messages' with role/content"),
        (ALPACA, "alpaca", "rows have 'instruction' and 'output'"),
        (TEXT, "completion", "rows have 'text'"),
    ],
)
def test_format_is_detected_with_its_reason(row, name, reason):
    detection = formats.detect([row, row], "rows")
    assert (detection.format.name, detection.reason) == (name, reason)


def test_detection_takes_what_most_rows_have_and_says_that_some_differ():
    detection = formats.detect([{"question": "a"}, CHAT, CHAT], "rows")
    assert detection.format.name == "chat"
    assert detection.reason.endswith(", 2 of the first 3")


def test_detection_refuses_to_guess_between_formats_or_from_a_minority():
    with pytest.raises(DataError, match="as many rows have the format chat as completion"):
        formats.detect([CHAT, TEXT], "rows")
    with pytest.raises(DataError, match="fit no known format"):
        formats.detect([CHAT, {"question": "a"}, {"question": "b"}], "rows")


def test_unknown_fields_are_named_with_those_expected():
    with pytest.raises(DataError) as raised:
        formats.detect([{"question": "a", "answer": "b"}], "data.jsonl")
    assert str(raised.value).startswith("data.jsonl: the rows fit no known format; their fields are: question, answer.")
    assert "alpaca (instruction, output)" in str(raised.value)


@pytest.mark.parametrize(
    ("row", "fields", "words"),
    [
        ({"messages": []}, {}, "the rows have the fields of format chat, but field 'messages' is empty. Mend the rows"),
        ({"text": 3}, {}, "the rows have the fields of format completion, but field 'text' is int, not text."),
        ({"body": None}, {"text": "body"}, "of format completion, but field 'body' is missing or null; the row has: "),
        ({"instruction": "a", "output": 1}, {}, "of format alpaca, but field 'output' is int, not text."),
        (
            {"text;label": "a;b"},
            {},
            "are: text;label (a single one: columns of CSV are parted by commas, ",
        ),
        ({"label": "b"}, {}, "their fields are: label. Formats"),
    ],
)
def test_rows_that_nearly_fit_a_format_are_told_what_keeps_them_from_it(row, fields, words):
    with pytest.raises(DataError) as raised:
        formats.detect([row], "rows", fields=fields)
    assert words in str(raised.value)


PAIR = {"prompt": "hi", "chosen": "ho", "rejected": "no"}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (PAIR, "preference"),
        (CHAT | {"chosen": HI_HO[1], "rejected": HI_HO[1]}, "preference"),
        ({"prompt": "hi", "completion": "ho", "label": True}, "unpaired"),
        ({"prompt": "hi", "completion": "ho"}, "prompt_completion"),
        ({"prompt": "hi", "completions": ["ho"], "labels": [True]}, "stepwise"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "tokenized"),
        ({"segments": [{"label": True, "text": "hi"}]}, "segments"),
        (TEXT | {"prompt": "hi"}, "completion"),
    ],
)
def test_other_formats_are_detected(row, name):
    assert formats.detect([row], "rows").format.name == name


def test_roles_of_a_source_have_further_names():
    row = {"messages": [{"role": "asker", "content": "hi"}, {"role": "narrator", "content": "ho"}]}
    roles = {"user": ("asker",), "assistant": ("narrator", "chorus")}
    assert converted(row, roles=roles) == Conversation(HI_HO)
    theirs = {"conversations": [{"from": "asker", "value": "hi"}, {"from": "chorus", "value": "ho"}]}
    assert converted(theirs, roles=roles) == Conversation(HI_HO)


def test_messages_give_the_template_further_properties_under_its_names():
    row = {"messages": [{"role": "user", "content": "hi", "author": "Ann", "mood": None, "hm": "why"}]}
    message = converted(row, fields={"thinking": "hm"}, message_properties={"name": "author", "tone": "mood"}).messages[
        0
    ]
    assert message == {"role": "user", "content": "hi", "name": "Ann", "reasoning_content": "why"}


def test_calls_of_sharegpt_become_calls():
    row = {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "ho"},
        ]
    }
    messages = converted(row).messages
    function = {"name": "f", "arguments": {"a": 1}}
    assert messages[1] == {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    assert messages[2] == {"role": "tool", "content": "ho"}


def test_arguments_in_json_become_what_they_say_and_other_texts_stay():
    for text, value in (('{"a": 1}', {"a": 1}), ("[1]", [1]), ("a", "a"), ("", {}), (None, {})):
        call = {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": text}}]}
        read = converted({"messages": [HI_HO[0], call]}).messages[1]["tool_calls"]
        assert read == [{"type": "function", "id": "x", "function": {"name": "f", "arguments": value}}]


def test_conversation_of_system_messages_alone_is_refused_when_they_are_dropped():
    with pytest.raises(DataError, match="holds nothing but system messages"):
        converted({"messages": [{"role": "system", "content": "a"}]}, drop_system_message=True)


@pytest.mark.parametrize("row", [CHAT, SHAREGPT, ALPACA, {"messages": json.dumps(CHAT["messages"])}])
def test_chat_like_rows_become_the_same_messages(row):
    assert converted(row) == Conversation(HI_HO)


def test_completion_is_its_text():
    assert converted(TEXT) == Texts((("hi ho", True),))


def test_fields_rename_columns_and_keys_of_messages():
    row = {"dialog": [{"speaker": "user", "words": "hi"}, {"speaker": "assistant", "words": "ho"}]}
    fields = {"messages": "dialog", "role": "speaker", "content": "words"}
    assert converted(row, fields=fields) == Conversation(HI_HO)
    assert converted({"q": "hi", "a": "ho"}, fields={"instruction": "q", "output": "a"}) == Conversation(HI_HO)
    assert converted({"body": "x"}, fields={"text": "body"}) == Texts((("x", True),))


def test_mapping_a_field_that_the_format_lacks_is_refused():
    with pytest.raises(DataError, match="fields names 'txt', which the format completion does not have"):
        formats.check_fields(formats.declared("completion"), {"txt": "body"}, "rows")


def test_alpaca_input_is_joined_and_kept_apart_for_its_own_template():
    user = converted(ALPACA | {"input": "there", "system": "s"}).messages[1]
    assert user == {"role": "user", "content": "hi\n\nthere", "instruction": "hi", "input": "there"}


def test_system_field_becomes_the_first_message():
    assert converted(SHAREGPT | {"system": "brief"}).messages == ({"role": "system", "content": "brief"}, *HI_HO)


def test_text_parts_are_joined_and_other_keys_kept():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [{"role": "user", "content": parts, "name": "Ann", "weight": None}]
    assert converted({"messages": messages}).messages == ({"role": "user", "content": "hi", "name": "Ann"},)


def test_tools_and_calls_without_content_pass_through():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    conversation = converted({"messages": [HI_HO[0], call], "tools": '[{"name": "f"}]'})
    assert conversation.tools == ({"name": "f"},)
    called = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert conversation.messages[1] == {"role": "assistant", "tool_calls": called}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "field 'messages' (or 'conversations') is missing or null; the row has: text."),
        ({"messages": []}, "field 'messages' is empty."),
        ({"messages": "hello"}, "field 'messages' is text, not a list."),
        ({"messages": ["hello"]}, "messages[0] is text, not an object with role and content."),
        ({"messages": [{"content": "a"}]}, "messages[0].role is missing or null; the message has: content."),
        (
            {"messages": [{"role": "user", "text": "a"}]},
            "messages[0].content is missing or null; the message has: role, text.",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is missing or null"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content is int, not text."),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has a part that is not text (image)"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "conversations[0] is from 'alien', which is not known"),
        (CHAT | {"tools": 3}, "field 'tools' is int, not a list."),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}]},
            "a field 'system' and a system message too",
        ),
    ],
)
def test_malformed_chat_rows_say_what_is_wrong(row, message):
    with pytest.raises(DataError) as raised:
        converted(row, "chat")
    assert message in str(raised.value)


def test_malformed_flat_rows_say_what_is_wrong():
    with pytest.raises(DataError, match="field 'body' is missing or null; the row has: title"):
        converted({"title": "t"}, "completion", {"text": "body"})
    with pytest.raises(DataError, match="field 'output' is int, not text"):
        converted(ALPACA | {"output": 3}, "alpaca")
    with pytest.raises(DataError, match="field 'text' is empty"):
        converted({"text": " \n"}, "completion")


def test_unknown_format_names_those_that_exist():
    with pytest.raises(DataError, match="Use auto or one of preference, stepwise"):
        formats.declared("sharegpt")
