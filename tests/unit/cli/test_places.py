import pytest

from stoker.cli import places


@pytest.mark.parametrize(
    ("name", "model", "dataset"),
    [
        ("org/name", True, True),
        ("gpt2", True, False),
        ("org/name-1.5B", True, True),
        ("data/train.jsonl", True, False),
        ("./x", False, False),
        ("~/x", False, False),
        ("/x/y", False, False),
        ("a/b/c", False, False),
        ("a b", False, False),
    ],
)
def test_what_may_be_meant_for_the_hub(name, model, dataset):
    assert places.may_be_model_id(name) is model
    assert places.may_be_dataset_id(name) is dataset


def test_files_folders_and_globs_are_found(here):
    (here / "a").mkdir()
    (here / "a" / "b.jsonl").write_text("")
    assert all(places.exists(name) for name in ("a", "a/b.jsonl", "a/*.jsonl", "**/*.jsonl", str(here / "a" / "*")))
    assert not any(places.exists(name) for name in ("b", "a/*.csv"))


def test_a_missing_name_is_explained_with_the_nearest_or_the_current_folder(here):
    (here / "train.jsonl").write_text("")
    assert places.missing("trian.jsonl") == ("trian.jsonl does not exist", "Did you mean train.jsonl?")
    assert str(here) in places.missing("nowhere/x.csv")[1]
