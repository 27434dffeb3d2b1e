import io
import json
import random

import pytest

from stoker.data import json_text, sources
from stoker.data.readers import FILE_TYPES
from stoker.errors import DataError

BLOCK_BYTES = 1 << 20


def entries(content):
    return list(json_text.entries(b"", io.BytesIO(content), "x.json"))


def rows_of(content):
    return [row.value for row in FILE_TYPES["json"](io.BytesIO(content), "x.json")]


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Every value is cut somewhere."""
    monkeypatch.setattr(json_text, "_BLOCK_BYTES", 1)


@pytest.mark.parametrize(("form", "between"), [("[%s]", ",\n"), ("[%s]", ","), ('{"data": [%s]}', ",\n")])
def test_the_first_rows_are_read_without_the_rest(form, between):
    rows = between.join(json.dumps({"text": "a" * 1000}) for _ in range(20_000))
    opened = io.BytesIO((form % rows).encode())
    reading = FILE_TYPES["json"](opened, "x.json")
    lines = (1, 2, 3) if "\n" in between else (1, 1, 1)
    assert [next(reading).where for _ in range(3)] == [
        f"x.json:{line} (row {row})" for row, line in enumerate(lines, start=1)
    ]
    assert opened.tell() <= 2 * BLOCK_BYTES < len(opened.getvalue()) / 5


VALUES = [12.5, -1e-7, 10**30, True, None, 'q"\\ü🙂\n', {"a": {"b": [1, {}]}}, [], "", [[[0.5]]], float("-inf"), 3]


@pytest.mark.parametrize("indent", [None, 2])
def test_values_that_are_cut_between_blocks_are_read_whole(tiny_blocks, indent):
    for ascii_only in (True, False):
        text = json.dumps(VALUES, indent=indent, ensure_ascii=ascii_only)
        assert [value for _, value in entries(text.encode())] == VALUES
        held = json.dumps({"version": 1.5, "data": VALUES, "end": "x"}, indent=indent, ensure_ascii=ascii_only)
        assert [value for _, value in entries(held.encode())] == VALUES


def test_lines_are_counted_across_blocks(tiny_blocks):
    assert [line for line, _ in entries(b'\n[\n1,\n\n{"a":\n2},"b"\n,3]\n')] == [3, 5, 6, 7]


# What json.loads says of the whole, and where.
BROKEN = [
    b"", b"[", b"[1", b"[1,", b"[1 2]", b"[1,]", b"[,1]", b"[1]]", b"[1] x", b"[nul]", b'["a', b'["\\x"]', b'["\\u12"]',
    b'["a\nb"]', b"[1.]", b"[-]", b"[1e]", b'{"data"', b'{"data": [1]', b'{"data": [1]} 2', b"{data: [1]}",
    b'{"data" [1]}', b'{"data": [1],}', b'{"data": [1] "b": 2}', b'{"a": }', b'\n\n[{"a": 1},\n{"a": }\n]',
]  # fmt: skip


@pytest.mark.parametrize("content", BROKEN)
def test_what_breaks_is_told_on_its_line_however_it_is_cut(content, tiny_blocks):
    with pytest.raises(ValueError, match=r".") as whole:
        json.loads(content)
    with pytest.raises(DataError, match="the file is not JSON: ") as raised:
        entries(content)
    assert raised.value.problems[0].where == f"x.json:{whole.value.lineno}"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "may_be_cut"),
    [(b'[{"a": "b', True), (b'[{"a": 1}', True), (b"[1,", True), (b'[{"a" 1}]', False), (b'{"data": [1]', True)],
)
def test_a_file_that_ends_too_soon_is_said_to(content, may_be_cut):
    with pytest.raises(DataError) as raised:
        entries(content)
    assert ("it may be cut off" in str(raised.value)) == may_be_cut
    assert "starting at." not in str(raised.value)


@pytest.mark.parametrize("cut", [1, BLOCK_BYTES])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_what_is_not_utf8_is_told_with_its_line_and_byte(cut, mark, monkeypatch):
    monkeypatch.setattr(json_text, "_BLOCK_BYTES", cut)
    content = mark + '["ü",\n"ü'.encode() + b'\xc3"]'
    byte = content.index(b'\xc3"') + 1
    with pytest.raises(DataError, match=rf"x.json:2: the file is not UTF-8 \(byte {byte}\)"):
        list(json_text.entries(content, io.BytesIO(), "x.json"))


def test_random_documents_are_read_as_python_reads_them(tiny_blocks):
    chance = random.Random(0)
    for _ in range(300):
        rows = [chance.choice(VALUES) for _ in range(chance.randrange(6))]
        text = json.dumps(rows, indent=chance.choice([None, 1]))
        cut = chance.randrange(len(text) + 1)
        text = text[:cut] + chance.choice(["", *'[]{},:"1 ']) + text[cut + chance.randrange(2) :]
        try:
            expected = json.loads(text)
        except ValueError:
            expected = None
        if isinstance(expected, list):
            assert [value for _, value in entries(text.encode())] == expected
        else:
            with pytest.raises(DataError):
                entries(text.encode())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"train": [], "test": []}', "an object with: train, test"),
        (b'{"data": 1, "b": 2}', "an object with: data, which is no list, b"),
        (b"{}", "an object with: nothing"),
        (b'"text"', "holds text"),
        (b'{"data": [], "data": []}', 'two lists called "data"'),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_holds_no_rows_says_what_it_holds(content, words):
    with pytest.raises(DataError, match=words):
        entries(content)


def test_json_lines_under_the_name_of_json_are_recognised():
    assert rows_of(b'\n{"data": [1], "b": 2}\n\n{"data": [3]}\n') == [{"data": [1], "b": 2}, {"data": [3]}]
    assert rows_of(b'\n{"data": [{"a": 1}]}\n\n') == [{"a": 1}]
    assert rows_of(b'{"data": [{"a": 1}]}') == [{"a": 1}]
    lines = FILE_TYPES["json"](io.BytesIO(b'\n{"a": 1}\n\n{"a": }\n{"a": 2}'), "x.json")
    assert [row.error is None for row in lines] == [True, False, True]


def test_reading_goes_on_from_a_place_within_such_lines(tmp_path):
    (tmp_path / "x.json").write_text('\n{"a": 1}\n\n{"a": 2}\n\n\n{"a": 3}\n')
    source = sources.find(str(tmp_path / "x.json"))
    places = [place for _, place in source.read()]
    assert [[row.value["a"] for row, _ in source.read(place)] for place in places] == [[2, 3], [3], []]
