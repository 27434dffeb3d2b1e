import functools
import gzip
import http.server
import json
import threading

import datasets
import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from stoker.data import storage
from stoker.data.readers import parsed
from stoker.data.sources import find, fingerprint_of_list, read_rows, rows_from_list
from stoker.errors import DataError

ROWS = [{"text": f"row {number}"} for number in range(50)]
LINES = "".join(json.dumps(row) + "\n" + "\n" * (index % 3) for index, row in enumerate(ROWS)).encode()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def as_parquet(rows):
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


FILES = {
    "rows.jsonl": LINES,
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.jsonl.zst": zstd(LINES),
    "rows.parquet": as_parquet(ROWS),
    "rows.json": json.dumps(ROWS).encode(),
    "rows.csv": ("text\n" + "".join(row["text"] + "\n" for row in ROWS)).encode(),
}


@pytest.fixture
def memory():
    """An empty file system in memory, behind memory:// URLs."""
    system = fsspec.filesystem("memory")
    for name, content in FILES.items():
        system.pipe(f"/bucket/{name}", content)
    yield system
    system.rm("/bucket", recursive=True)


@pytest.fixture
def server(tmp_path):
    """A web server without range requests, and how often it was asked for content."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def values(source):
    return [row.value for row in source.rows()]


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_through_urls(name, memory, server):
    for url in (f"memory://bucket/{name}", f"{server}/{name}", f"{server}/{name}?token=a.b"):
        source = find(url)
        rows = list(source.rows())
        assert [row.value for row in rows] == ROWS
        assert rows[0].where.startswith(url)


def test_folder_glob_and_data_files_of_a_url(memory):
    for name in FILES:
        if name != "rows.jsonl":
            memory.rm(f"/bucket/{name}")
    memory.pipe("/bucket/part/more.jsonl", b'{"text": "more"}\n')
    memory.pipe("/bucket/README.md", b"no rows")
    assert values(find("memory://bucket")) == [{"text": "more"}, *ROWS]
    assert values(find("memory://bucket/*.jsonl")) == ROWS
    assert values(find("memory://bucket", data_files=["part/*.jsonl"])) == [{"text": "more"}]


def test_missing_url_is_an_error_with_its_place(memory, server):
    with pytest.raises(DataError, match=r"there is no file at 'memory://bucket/nothing.jsonl'"):
        find("memory://bucket/nothing.jsonl")
    with pytest.raises(DataError, match=r"nothing.jsonl: the file cannot be read"):
        list(find(f"{server}/nothing.jsonl").rows())


def test_fingerprint_of_a_url_changes_with_its_content(memory, server, tmp_path):
    for url, write in (
        ("memory://bucket/rows.jsonl", lambda content: memory.pipe("/bucket/rows.jsonl", content)),
        (f"{server}/rows.jsonl", (tmp_path / "rows.jsonl").write_bytes),
    ):
        before = find(url).fingerprint()
        assert find(url).fingerprint() == before
        write(LINES + LINES)
        assert find(url).fingerprint() != before
        assert storage.state(url) is not None


@pytest.mark.parametrize("name", FILES)
def test_reading_goes_on_from_any_place(name, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / f"a-{name}").write_bytes(FILES[name])
    (folder / "b.jsonl").write_bytes(LINES)
    for options in ({}, {"split": "train[7:80]", "num_shards": 3, "shard": 1}, {"limit": 60}):
        source = find(str(folder), **options)
        everything = list(source.read())
        for index in (0, 3, 20, len(everything) - 2):
            rest = [parsed(raw) for raw, _ in source.read(everything[index][1])]
            assert rest == [parsed(raw) for raw, _ in everything[index + 1 :]]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(50)),
        ("train[:20%]", range(10)),
        ("train[10:13]", range(10, 13)),
        ("train[-10%:]", range(45, 50)),
        ("train[40:90]", range(40, 50)),
        ("train[:3%]", range(2)),
        ("train[-3:-1]", range(47, 49)),
    ],
)
def test_slices_take_the_rows_that_the_datasets_library_takes(split, expected, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    assert values(find(str(tmp_path / "rows.jsonl"), split=split)) == [ROWS[index] for index in expected]
    theirs = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split=split, cache_dir=tmp_path)
    assert list(theirs) == [ROWS[index] for index in expected]


@pytest.mark.parametrize("split", ["train[", "train[:120%]", "train[a:b]", "train+test", "train[1]"])
def test_split_that_is_none_is_refused(split, folder):
    with pytest.raises(DataError, match="split = "):
        find(str(folder), split=split)


def test_shards_part_the_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    shards = [
        values(find(str(tmp_path / "rows.jsonl"), num_shards=3, shard=shard, split="train[5:]")) for shard in range(3)
    ]
    assert shards[1] == ROWS[6::3]
    assert sorted(row["text"] for shard in shards for row in shard) == sorted(row["text"] for row in ROWS[5:])
    assert values(find(str(tmp_path / "rows.jsonl"), num_shards=3, shard=1, limit=2)) == ROWS[1:7:3]
    with pytest.raises(DataError, match="not below"):
        find(str(tmp_path), num_shards=3, shard=3)


def test_hub_dataset_is_streamed_from_its_files(tmp_path, monkeypatch):
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    load = datasets.load_dataset_builder
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda _, name, **options: load(str(tmp_path), name, **options)
    )
    source = find("owner/set", split="train[:60]", streaming=True)
    assert len(source.files) == 2
    assert values(source) == ROWS + ROWS[:10]
    with pytest.raises(DataError, match=r"no files of a split 'dev'.*train, test"):
        find("owner/set", split="dev", streaming=True)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    for name in ("b.jsonl", "a.jsonl", "part/c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    for name in ("README.md", ".hidden.jsonl", "dataset_info.json", "notes.xyz"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def texts(path, **options):
    return [row.value["text"] for row in read_rows(str(path), **options)]


def test_folder_is_read_in_the_order_of_its_paths_without_other_files(folder):
    assert texts(folder) == ["a.jsonl", "b.jsonl", "part/c.jsonl"]


def test_glob_and_limit(folder):
    assert texts(folder / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert texts(folder / "**" / "*.jsonl", limit=1) == ["a.jsonl"]


def test_split_folder_of_a_saved_dataset_is_chosen(tmp_path):
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")})
    saved.save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved", split="test") == ["test"]


def test_missing_file_names_the_one_that_is_alike(folder):
    with pytest.raises(DataError, match=r"does not exist. Did you mean .*a.jsonl"):
        find(str(folder / "aa.jsonl"))


def test_missing_file_names_what_the_folder_holds(folder):
    with pytest.raises(DataError, match=r"holds: README.md, a.jsonl"):
        find(str(folder / "nothing" / "zzzzzzzz.csv"))


def test_glob_without_a_match_and_folder_without_data_are_errors(folder, tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        find(str(folder / "*.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no data file.*Known suffixes: jsonl"):
        find(str(tmp_path / "empty"))


def test_unknown_protocol_says_what_to_install_and_unknown_file_type_is_refused(folder):
    with pytest.raises(DataError, match=r"s3:// cannot be read here.*pip install s3fs"):
        find("s3://bucket/rows.jsonl")
    with pytest.raises(DataError, match=r"nowhere:// cannot be read here.*Download the file"):
        find("nowhere://bucket/rows.jsonl")
    with pytest.raises(DataError, match="file_type = 'xml' is not known"):
        find(str(folder), file_type="xml")


def test_hub_dataset_that_is_not_there_offline_is_an_error(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"dataset 'no-owner/no-dataset' \(split 'train'\) cannot be loaded"):
        list(read_rows("no-owner/no-dataset"))


def test_hub_dataset_rows_carry_id_split_and_number(monkeypatch):
    asked = []

    def load(path, name, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows("owner/set", split="validation", name="small"))
    assert asked == [("owner/set", "small", "validation")]
    assert [(row.value, row.where) for row in rows] == [
        ({"text": "a"}, "owner/set[validation]:1"),
        ({"text": "b"}, "owner/set[validation]:2"),
    ]


def test_rows_in_memory_are_numbered_and_checked():
    good, bad = rows_from_list([{"text": "a"}, "b"])
    assert (good.value, good.where, good.error) == ({"text": "a"}, "row 1", None)
    assert bad.error == "the row is str, not an object with fields."


def test_fingerprint_changes_with_content_only(folder):
    before = find(str(folder)).fingerprint()
    (folder / "README.md").write_text("changed")
    assert find(str(folder)).fingerprint() == before
    assert find(str(folder), split="train[:2]").fingerprint() != before
    (folder / "a.jsonl").write_text('{"text": "changed"}\n')
    assert find(str(folder)).fingerprint() != before
    assert fingerprint_of_list([{"a": 1}]) != fingerprint_of_list([{"a": 2}])
