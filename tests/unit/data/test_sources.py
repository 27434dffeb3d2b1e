import json

import datasets
import pytest

from stoker.data.sources import find, fingerprint_of_list, read_rows, rows_from_list
from stoker.errors import DataError


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


def test_url_and_unknown_file_type_are_refused(folder):
    with pytest.raises(DataError, match="is a URL"):
        find("s3://bucket/rows.jsonl")
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
    (folder / "a.jsonl").write_text('{"text": "changed"}\n')
    assert find(str(folder)).fingerprint() != before
    assert fingerprint_of_list([{"a": 1}]) != fingerprint_of_list([{"a": 2}])
