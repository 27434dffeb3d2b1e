"""A hundred malformed inputs: each is named by its file and line, and no good row is lost beside it."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from stoker.data.options import PromptTexts
from stoker.data.prepare import SourceOptions, prepare
from stoker.errors import DataError

USER, ANSWER = {"role": "user", "content": "hot?"}, {"role": "assistant", "content": "yes"}
GOOD = {"messages": [USER, ANSWER]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def said(content, **more):
    return chat(USER, {"role": "assistant", "content": content, **more})


def detail(*spans):
    keys = ("begin_offset", "end_offset", "train")
    return said(
        "yes", detail=[dict(zip(keys, span, strict=False)) if isinstance(span, tuple) else span for span in spans]
    )


# What a line of JSON holds -> what is said of it.
LINES = {
    "not JSON": ("hello", "the line is not JSON: Expecting value at column 1"),
    "cut off": ('{"messages": [', "the line is not JSON"),
    "single quotes": ("{'messages': []}", "Expecting property name enclosed in double quotes at column 2"),
    "a trailing comma": ('{"messages": [],}', "the line is not JSON"),
    "two objects": ('{"messages": []} {"messages": []}', "the line is not JSON: Extra data at column 18"),
    "a comment": ("// rows", "the line is not JSON"),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "the line is not UTF-8 (byte 15)"),
    "half a character": (b'{"messages": "\xc3"}', "the line is not UTF-8"),
    "UTF-16": ('{"messages": []}'.encode("utf-16"), "the line is not UTF-8"),
    "a NUL byte": (b'{"messages": "\x00"}', "the line is not JSON: Invalid control character"),
    "NUL bytes only": (b"\x00" * 64, "the line is not JSON"),
    "nested too deeply": ("[" * 100_000, "the line is JSON nested too deeply"),
    "a list": ("[1, 2]", "the row is a list, not an object with fields"),
    "a text": ('"hello"', "the row is text, not an object with fields"),
    "a number": ("3", "the row is a number, not an object with fields"),
    "null": ("null", "the row is null, not an object with fields"),
    "true": ("true", "the row is true or false, not an object with fields"),
    "a huge broken line": ('{"messages": "' + "x" * 3_000_000, "the line is not JSON: Unterminated string"),
}

# A row of a chat -> what is said of it.
CHATS = {
    "no fields": ({}, "field 'messages' (or 'conversations') is missing or null; the row has: none."),
    "another format": ({"text": "hot"}, "field 'messages' (or 'conversations') is missing or null; the row has: text."),
    "null messages": ({"messages": None}, "is missing or null"),
    "no messages": ({"messages": []}, "field 'messages' is empty."),
    "messages are text": ({"messages": "hot?"}, "field 'messages' is text, not a list."),
    "messages are a number": ({"messages": 3}, "field 'messages' is int, not a list."),
    "messages are an object": ({"messages": {"role": "user"}}, "field 'messages' is an object, not a list."),
    "messages are broken JSON": ({"messages": '[{"role": '}, "field 'messages' is text, not a list."),
    "a message is text": (chat("hot?"), "messages[0] is text, not an object with role and content."),
    "a message is null": (chat(USER, None), "messages[1] is null, not an object"),
    "a message is a list": (chat([USER]), "messages[0] is a list, not an object"),
    "a message is empty": (chat({}), "messages[0].role is missing or null; the message has: none."),
    "no role": (chat({"content": "a"}), "messages[0].role is missing or null; the message has: content."),
    "role is null": (chat({"role": None, "content": "a"}), "messages[0].role is missing or null"),
    "role is a number": (chat({"role": 1, "content": "a"}), "messages[0].role is int, not the name of a role."),
    "role is empty": (chat({"role": "", "content": "a"}), "messages[0].role is empty, not the name of a role."),
    "no content": (chat({"role": "user"}), "messages[0].content is missing or null; the message has: role."),
    "content is null": (said(None), "messages[1].content is missing or null"),
    "content is a number": (said(3), "messages[1].content is int, not text."),
    "content is true": (said(True), "messages[1].content is true or false, not text."),
    "content is an object": (said({"text": "a"}), "messages[1].content is an object, not text."),
    "content has an image": (said([{"type": "image", "url": "x"}]), "has a part that is not text (image)"),
    "content has a bare text": (said(["a"]), "has a part that is not text (text)"),
    "content has a part without text": (said([{"type": "text"}]), "has a part that is not text (text)"),
    "content has a null part": (said([None]), "has a part that is not text (null)"),
    "NUL in an answer": (said("a\0b"), "the text holds a NUL (\\u0000 at character 1)"),
    "NUL in a question": (chat({"role": "user", "content": "\0"}, ANSWER), "the text holds a NUL"),
    "NUL in a part": (said([{"type": "text", "text": "\0"}]), "the text holds a NUL"),
    "half of a surrogate pair": (said("a\ud83d"), "the text holds half of a surrogate pair (\\ud83d at character 1)"),
    "ShareGPT's unknown speaker": (
        {"conversations": [{"from": "alien", "value": "a"}]},
        "conversations[0] is from 'alien', which is not known",
    ),
    "ShareGPT without value": ({"conversations": [{"from": "human"}]}, "conversations[0].value is missing or null"),
    "system is a number": (chat(USER, ANSWER, system=3), "field 'system' is int, not text."),
    "a thought is a number": (
        chat(USER, ANSWER | {"reasoning_content": 3}),
        "messages[1].reasoning_content is int, not text.",
    ),
    "a thought is a list": (chat(USER, ANSWER | {"thinking": ["hm"]}), "messages[1].thinking is a list, not text."),
    "two system messages": (
        chat({"role": "system", "content": "a"}, USER, system="b"),
        "the row has a field 'system' and a system message too.",
    ),
    "tools are a number": (chat(USER, ANSWER, tools=3), "field 'tools' is int, not a list."),
    "tools are an object": (chat(USER, ANSWER, tools={"name": "f"}), "field 'tools' is an object, not a list."),
    "tools are words": (chat(USER, ANSWER, tools=["heat"]), "tools[0] is text, not an object."),
    "tools that no template prints": (
        chat(USER, ANSWER, tools=[{"name": "f"}]),
        "the chat template does not mention them",
    ),
    "calls are text": (chat(USER, CALL | {"tool_calls": "f()"}), "messages[1].tool_calls is text, not a list."),
    "a call is text": (
        chat(USER, CALL | {"tool_calls": ["f"]}),
        "messages[1].tool_calls[0] has no name of a function.",
    ),
    "a call without a name": (chat(USER, CALL | {"tool_calls": [{"arguments": {}}]}), "tool_calls[0] has no name"),
    "no calls": (chat(USER, CALL | {"tool_calls": []}), "messages[1].content is missing or null"),
    "calls that no template prints": (chat(USER, CALL), "the chat template refuses this conversation"),
    "weight of two": (
        said("yes", weight=2),
        "messages[1].weight is 2; a message trains with weight 1 or does not with 0.",
    ),
    "train is a word": (said("yes", learn="maybe"), "messages[1].learn is 'maybe', not true or false."),
    "detail is text": (said("yes", detail="all"), "messages[1].detail is text, not a list."),
    "detail of numbers": (detail(3), "messages[1].detail[0] is int, not an object"),
    "detail without an end": (detail((0,)), "needs begin_offset and end_offset as whole numbers."),
    "detail past the end": (detail((0, 3, True)), "spans characters 0 to 3; spans follow one another and end before 3"),
    "detail backwards": (detail((2, 1, True)), "spans characters 2 to 1"),
    "detail that overlaps": (detail((0, 1, True), (1, 2, True)), "detail[1] spans characters 1 to 2"),
    "detail without a flag": (detail((0, 1)), "detail[0].train is None, not true or false."),
    "detail below zero": (detail((-1, 1, True)), "spans characters -1 to 1"),
}

# Format -> a good row, and malformed ones with what is said of them.
OTHERS = {
    "alpaca": (
        {"instruction": "hot?", "output": "yes"},
        [
            ({"output": "yes"}, "field 'instruction' is missing or null; the row has: output."),
            ({"instruction": "hot?"}, "field 'output' is missing or null"),
            ({"instruction": ["hot?"], "output": "yes"}, "field 'instruction' is a list, not text."),
            ({"instruction": "hot?", "output": 3}, "field 'output' is int, not text."),
            ({"instruction": "hot?", "output": "yes", "input": {}}, "field 'input' is an object, not text."),
            ({"instruction": "hot?", "output": "yes", "system": 1}, "field 'system' is int, not text."),
        ],
    ),
    "prompt": (
        {"instruction": "hot?", "output": "yes"},
        [
            ({"instruction": "hot?"}, "field 'output' is missing or null"),
            ({"instruction": None, "output": "yes"}, "field 'instruction' is missing or null"),
            ({"instruction": "hot?", "output": True}, "field 'output' is true or false, not text."),
        ],
    ),
    "completion": (
        {"text": "hot"},
        [
            ({"text": None}, "field 'text' is missing or null"),
            ({"text": ""}, "field 'text' is empty."),
            ({"text": " \n"}, "field 'text' is empty."),
            ({"text": 3}, "field 'text' is int, not text."),
            ({"text": ["a"]}, "field 'text' is a list, not text."),
            ({"text": "\udc00"}, "half of a surrogate pair"),
            ({"text": "\0" * 1000}, "the text holds a NUL (\\u0000 at character 0)"),
            ({"body": "a"}, "field 'text' is missing or null; the row has: body."),
        ],
    ),
    "prompt_completion": (
        {"prompt": "hot?", "completion": "yes"},
        [
            ({"prompt": "hot?"}, "field 'completion' is missing or null"),
            ({"completion": "yes"}, "field 'prompt' is missing or null"),
            ({"prompt": 3, "completion": "yes"}, "field 'prompt' is int, not text or messages."),
        ],
    ),
    "segments": (
        {"segments": [{"label": True, "text": "a"}]},
        [
            ({"segments": []}, "field 'segments' is empty."),
            ({"segments": "a"}, "field 'segments' is text, not a list."),
            ({"segments": ["a"]}, "segments[0] is text, not an object with label and text."),
            ({"segments": [{"label": True}]}, "segments[0].text is null, not text."),
            ({"segments": [{"text": "a"}]}, "segments[0].label is None, not true or false."),
            ({"segments": [{"label": "yes", "text": "a"}]}, "segments[0].label is 'yes', not true or false."),
        ],
    ),
    "tokenized": (
        {"input_ids": [3, 4]},
        [
            ({"input_ids": []}, "field 'input_ids' is empty."),
            ({"input_ids": "3 4"}, "field 'input_ids' is text, not a list."),
            ({"input_ids": [3, "4"]}, "field 'input_ids': entry 1 is text, not a whole number."),
            ({"input_ids": [3, 4.5]}, "field 'input_ids': entry 1 is float, not a whole number."),
            ({"input_ids": [3, -4]}, "field 'input_ids': -4 at 1 is not a token id."),
            ({"input_ids": [3, 10**6]}, "token id 1000000 is outside the tokenizer's"),
            ({"input_ids": [3, 4], "labels": [3]}, "field 'labels' has 1 entries for 2 token ids."),
            ({"input_ids": [3, 4], "labels": [3, 5]}, "field 'labels': 5 at 1 is neither the token's id 4 nor -100."),
            ({"input_ids": [3, 4], "attention_mask": [1, 1, 1]}, "field 'attention_mask' has 3 entries"),
            ({"input_ids": [3, 4], "attention_mask": [0, 0]}, "every token is padding."),
        ],
    ),
    "preference": (
        {"prompt": "hot?", "chosen": "yes", "rejected": "no"},
        [
            ({"prompt": "hot?", "chosen": "yes"}, "field 'rejected' is missing or null"),
            ({"prompt": "hot?", "chosen": 3, "rejected": "no"}, "field 'chosen' is int, not text or messages."),
            ({"chosen": "yes", "rejected": "no"}, "the row has no 'prompt'"),
            (
                {"prompt": "hot?", "chosen": [ANSWER, USER, ANSWER], "rejected": "no"},
                "field 'chosen' holds 3 messages, which do not begin with those of 'prompt'.",
            ),
            ({"prompt": "hot?", "chosen": {"content": "a"}, "rejected": "no"}, "messages[1].role is missing or null"),
        ],
    ),
    "unpaired": (
        {"prompt": "hot?", "completion": "yes", "label": True},
        [
            ({"prompt": "hot?", "completion": "yes"}, "field 'label' is missing or null"),
            ({"prompt": "hot?", "completion": "yes", "label": "good"}, "field 'label' is 'good', not true or false."),
            ({"prompt": "hot?", "label": True}, "field 'completion' is missing or null"),
        ],
    ),
    "stepwise": (
        {"prompt": "hot?", "completions": ["a"], "labels": [True]},
        [
            (
                {"prompt": "hot?", "completions": ["a", "b"], "labels": [True]},
                "the row has 2 completions and 1 labels.",
            ),
            (
                {"prompt": "hot?", "completions": [""], "labels": [True]},
                "completions[0] is text, not a text with words.",
            ),
            ({"prompt": "hot?", "completions": ["a"], "labels": ["x"]}, "labels[0] is 'x', not true or false."),
            ({"completions": ["a"], "labels": [True]}, "field 'prompt' is missing or null"),
        ],
    ),
}


def as_line(row):
    return row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()


def source_of(file, form, line):
    own = {"train": "learn", "train_detail": "detail"}
    fields = {ours: theirs for ours, theirs in own.items() if f'"{theirs}"'.encode() in line}
    prompt = PromptTexts(format="{instruction}:") if form == "prompt" else PromptTexts()
    return SourceOptions(path=str(file), format=form, prompt=prompt, fields=fields)


def check(tmp_path, tokenizer, form, good, bad, message):
    """The third of five lines is malformed: it is named when rows stop the run, and left out alone when they do not."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(map(as_line, [good, good, bad, good, good])) + b"\n")
    options = {"tokenizer": tokenizer, "sequence_length": 512}
    source = source_of(file, form, as_line(bad))
    with pytest.raises(DataError) as raised:
        prepare([source], **options)
    assert str(raised.value).startswith(f"{file}:3: ")
    assert message in str(raised.value)
    audit = prepare([source], on_bad_row="skip", **options).audit
    assert (audit.rows, audit.bad_rows) == (4, 1)
    assert audit.bad_row_examples[0].startswith(f"{file}:3: ")


@pytest.mark.parametrize("name", LINES)
def test_malformed_lines_are_named(name, tmp_path, chatml):
    check(tmp_path, chatml, "chat", GOOD, *LINES[name])


@pytest.mark.parametrize("name", CHATS)
def test_malformed_chats_are_named(name, tmp_path, chatml):
    check(tmp_path, chatml, "chat", GOOD, *CHATS[name])


CASES = [(form, number) for form, (_, rows) in OTHERS.items() for number in range(len(rows))]


@pytest.mark.parametrize(("form", "number"), CASES)
def test_malformed_rows_of_other_formats_are_named(form, number, tmp_path, chatml):
    good, rows = OTHERS[form]
    check(tmp_path, chatml, form, good, *rows[number])


# Files that cannot be read as a whole: nothing in them can be told from nothing.
FILES = {
    "empty.jsonl": (b"", "empty.jsonl: the source holds no rows."),
    "blank.jsonl": (b"\n \n\t\n", "blank.jsonl: the source holds no rows."),
    "broken.jsonl": (b"{\n{\n", "broken.jsonl:1: the first 2 rows are all malformed: the line is not JSON"),
    "broken.json": (b'[{"text": "a"},\n{"text": ]', "broken.json:2: the file is not JSON"),
    "word.json": (b'"hello"', "word.json: the file holds text."),
    "object.json": (b'{"text": "a"}\n', "object.json: the file holds an object with: text."),
    "other.json": (b'{"rows": {"text": "a"}}', "other.json: the file holds an object with: rows."),
    "broken.csv": (b'text\n"a\n', "broken.csv:2: the file is not CSV"),
    "latin.csv": ("text\nhot\nStraße\n".encode("latin-1"), "latin.csv:3: the file is not UTF-8"),
    "twice.csv": (b"text,text\na,b\n", "twice.csv:1: the column 'text' is named twice. Rename one of them."),
    "no.parquet": (b"PAR1 is not enough", "no.parquet: the file is not Parquet"),
    "no.arrow": (b"ARROW1 is not enough", "no.arrow: the file is not Arrow"),
    "latin.txt": (
        "a\nStraße".encode("latin-1"),
        "latin.txt:2: the first row is malformed: the file is not UTF-8",
    ),
    "latin.json": (
        '[{"text": "a"},\n{"text": "Straße"}]'.encode("latin-1"),
        "latin.json:2: the file is not UTF-8 (byte",
    ),
    "nul.txt": (b"a\n\nb\0", "nul.txt:3: the first row is malformed: the file holds a NUL byte (byte 5)"),
    "nul.json": (b'[{"text": "a"},\n{"text": "\0"}]', "nul.json:2: the file is not JSON: Invalid control character"),
    "comma.json": (b'[\n{"text": "a"},\n]', "comma.json:3: the file is not JSON: Trailing comma"),
    "two.json": (b'[{"text": "a"}]\n[{"text": "a"}]', "two.json:2: the file is not JSON: Extra data"),
    "deep.json": (b"[" * 100_000, "deep.json: the file is JSON nested too deeply."),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "hot"}\n' * 100)[:-9], "cut.jsonl.gz: the file cannot be read"),
    "no.jsonl.gz": (b'{"text": "a"}', "no.jsonl.gz: the file cannot be read"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read_are_named(name, tmp_path, chatml):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    source = SourceOptions(path=str(tmp_path / name))
    with pytest.raises(DataError) as raised:
        prepare([source], tokenizer=chatml, sequence_length=64)
    assert message in str(raised.value)


def table(bad):
    return b"".join(line + b"\n" for line in [b"text\tn", b"hot\t1", b"warm\t2", bad, b"ice\t4"])


# Files of four rows, the third of them malformed -> its content, the place of that row, and what is said of it.
TABLES = {
    "nul.tsv": (table(b"co\0ld\t3"), ":4", "the row holds a NUL byte"),
    "few.tsv": (table(b"cold"), ":4", "the row has 1 values for 2 columns."),
    "many.tsv": (table(b"cold\t3\t4"), ":4", "the row has 3 values for 2 columns."),
    "nul.csv": (b'text,n\nhot,1\n"wa\nrm",2\n\0,3\nice,4\n', ":5", "the row holds a NUL byte"),
    "nul.json": (
        b'[{"text": "hot"},\n {"text": "warm"},\n {"text": "\\u0000"},\n {"text": "ice"}]',
        ":3 (row 3)",
        "the text holds a NUL",
    ),
    "line.json": (b'[{"text": "hot"}, {"text": "warm"}, 3, {"text": "ice"}]', ":1 (row 3)", "the row is a number"),
    "lines.json": (b'{"text": "hot"}\n\n{"text": "warm"}\nnull\n{"text": "ice"}\n', ":4", "the row is null"),
    "nul.parquet": (["hot", "warm", "\0", "ice"], ":row 3", "the text holds a NUL"),
    "null.parquet": (["hot", "warm", None, "ice"], ":row 3", "field 'text' is missing or null"),
}


@pytest.mark.parametrize("name", TABLES)
def test_malformed_rows_of_other_files_are_named(name, tmp_path, chatml):
    content, place, message = TABLES[name]
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        parquet.write_table(pyarrow.table({"text": content}), file)
    source, options = SourceOptions(path=str(file)), {"tokenizer": chatml, "sequence_length": 64}
    with pytest.raises(DataError) as raised:
        prepare([source], **options)
    assert str(raised.value).startswith(f"{file}{place}: ")
    assert message in str(raised.value)
    audit = prepare([source], on_bad_row="skip", **options).audit
    assert (audit.rows, audit.bad_rows) == (3, 1)
    assert audit.bad_row_examples[0].startswith(f"{file}{place}: ")


def test_one_file_of_all_of_them_loses_no_good_row(tmp_path, chatml, monkeypatch):
    """Every malformed line and chat at once, a good row after each, in chunks that part them anywhere."""
    monkeypatch.setattr("stoker.data.preparation.CHUNK_ROWS", 10)
    monkeypatch.setattr("stoker.data.audit.MAX_EXAMPLES", 1000)
    bad = [as_line(row) for row, _ in (*LINES.values(), *CHATS.values())]
    bad = [line for line in bad if b"weight" not in line]  # where fields.train names a flag, nobody asks for a weight
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"".join(line + b"\n" + as_line(GOOD) + b"\n" for line in bad))
    numbers = range(1, 2 * len(bad), 2)
    fields = {"train": "learn", "train_detail": "detail"}
    source = SourceOptions(path=str(file), format="chat", fields=fields)
    audit = prepare([source], tokenizer=chatml, sequence_length=512, on_bad_row="skip").audit
    assert (audit.rows, audit.bad_rows) == (len(numbers), len(numbers))
    assert [example.split(": ")[0] for example in audit.bad_row_examples] == [f"{file}:{number}" for number in numbers]


def test_rows_of_mixed_schemas_are_told_apart_or_named(tmp_path, chatml):
    file = tmp_path / "mixed.jsonl"
    rows = [GOOD, {"text": "a"}, GOOD, {"instruction": "a", "output": "b"}, GOOD]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"mixed.jsonl:2: field 'messages' .* the row has: text"):
        prepare([SourceOptions(path=str(file))], tokenizer=chatml, sequence_length=64)
    audit = prepare([SourceOptions(path=str(file))], tokenizer=chatml, sequence_length=64, on_bad_row="skip").audit
    assert (audit.rows, audit.bad_rows) == (3, 2)
    assert [example.split(": ")[0] for example in audit.bad_row_examples] == [f"{file}:2", f"{file}:4"]


def test_a_huge_row_is_read(tmp_path, chatml):
    file = tmp_path / "huge.jsonl"
    file.write_text(json.dumps(said("hot " * 100_000)) + "\n" + json.dumps(GOOD) + "\n")
    audit = prepare([SourceOptions(path=str(file))], tokenizer=chatml, sequence_length=64).audit
    assert (audit.rows, audit.truncated) == (2, 1)


def test_a_hundred_inputs_are_tried():
    assert len(LINES) + len(CHATS) + len(CASES) + len(FILES) + len(TABLES) >= 150
