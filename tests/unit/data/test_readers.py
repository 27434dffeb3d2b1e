import gzip
import json

import datasets
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from stoker.data.readers import read_file
from stoker.errors import DataError

ROWS = [{"text": "a 🙂"}, {"text": 'b, "quoted"\nline'}]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write_arrow_file(path):
    table = pa.Table.from_pylist(ROWS)
    with ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.ndjson": write_jsonl,
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "rows.json.zst": lambda path: path.write_bytes(zstd(json.dumps(ROWS).encode())),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "data.json": lambda path: path.write_text(json.dumps({"data": ROWS})),
    "lines.json": write_jsonl,
    "rows.csv": lambda path: path.write_text('text\na 🙂\n"b, ""quoted""\nline"\n', encoding="utf-8"),
    "rows.tsv": lambda path: path.write_text('text\na 🙂\n"b, ""quoted""\nline"\n', encoding="utf-8"),
    "rows.parquet": lambda path: parquet.write_table(pa.Table.from_pylist(ROWS), path),
    "rows.feather": write_arrow_file,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_gives_the_same_rows(name, tmp_path):
    WRITERS[name](tmp_path / name)
    rows = list(read_file(tmp_path / name))
    assert [row.value for row in rows] == ROWS
    assert all(row.error is None and row.where.startswith(str(tmp_path / name)) for row in rows)


def test_arrow_streams_of_saved_datasets_are_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert [row.value for row in read_file(file)] == ROWS


def test_keys_that_only_other_rows_have_are_not_there(tmp_path):
    calls = [{"name": "heat", "arguments": {"to": 900}}, {"name": "cool", "arguments": {"by": 3, "slowly": None}}]
    rows = [{"calls": [call], "ids": [1, None], "text": None} for call in calls]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = [row.value for row in read_file(tmp_path / "rows.parquet")]
    assert read[0] == {"calls": [{"name": "heat", "arguments": {"to": 900}}], "ids": [1, None], "text": None}
    assert read[1]["calls"] == [{"name": "cool", "arguments": {"by": 3}}]


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert [row.value for row in read_file(tmp_path / "a.txt")] == [{"text": "one\n\ntwo\n"}]


def test_broken_jsonl_line_is_reported_with_its_line_and_reading_goes_on(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n{"text": "b"\n"just text"\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"text": "c"}\n')
    rows = list(read_file(file))
    assert [(row.where.rsplit(":", 1)[1], row.error) for row in rows] == [
        ("1", None),
        ("3", "the line is not JSON: Expecting ',' delimiter at column 13."),
        ("4", "the row is text, not an object with fields."),
        ("5", "the line is not UTF-8 (byte 1). Save the file as UTF-8."),
        ("6", "the line is JSON nested too deeply."),
        ("7", None),
    ]


def test_json_list_named_jsonl_gets_a_hint(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS, indent=1))
    assert "name it .json" in next(read_file(tmp_path / "rows.jsonl")).error


def test_broken_json_is_reported_with_its_line(tmp_path):
    (tmp_path / "rows.json").write_text('[\n{"text": "a"},\n{"text": }\n]')
    with pytest.raises(DataError, match=r"rows.json:3: the file is not JSON: Expecting value"):
        list(read_file(tmp_path / "rows.json"))


def test_json_object_without_rows_names_what_it_holds(tmp_path):
    (tmp_path / "rows.json").write_text('{"train": [], "test": []}')
    with pytest.raises(DataError, match="an object with: train, test"):
        list(read_file(tmp_path / "rows.json"))


def test_csv_row_with_too_few_values_is_reported_with_its_line(tmp_path):
    (tmp_path / "rows.csv").write_text('a,b\n1,"two\nlines"\n3\n4,5\n')
    rows = list(read_file(tmp_path / "rows.csv"))
    assert [row.where.rsplit(":", 1)[1] for row in rows] == ["2", "4", "5"]
    assert rows[1].error == "the row has 1 values for 2 columns."
    assert rows[2].value == {"a": "4", "b": "5"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"no parquet", "not Parquet"),
        ("x.arrow", b"no arrow at all", "not Arrow"),
        ("x.csv", b'a\n"b" c\n', "not CSV"),
        ("x.csv", b"a\n\xff\n", "not UTF-8"),
        ("x.json", b"\xff", "not UTF-8"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:40], "cannot be read"),
        ("x.jsonl.gz", b"not gzip", "cannot be read"),
        ("x.jsonl.zst", b"not zstd", "cannot be read"),
        ("x.jsonl.zst", zstd(b'{"text": "a"}\n' * 1000)[:30], "cannot be read"),
        ("x.xlsx", b"", "does not tell what it holds"),
    ],
)
def test_unreadable_file_is_an_error_that_names_it(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        list(read_file(tmp_path / name))
    assert str(tmp_path / name) in str(raised.value)


def test_declared_file_type_overrides_the_suffix(tmp_path):
    (tmp_path / "rows.dat").write_text('{"text": "a"}\n')
    assert [row.value for row in read_file(tmp_path / "rows.dat", file_type="jsonl")] == [{"text": "a"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_byte_order_mark_is_no_part_of_the_first_row(name, tmp_path):
    WRITERS[name](tmp_path / name)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert [(row.value, row.error) for row in read_file(tmp_path / name)] == [(row, None) for row in ROWS]
