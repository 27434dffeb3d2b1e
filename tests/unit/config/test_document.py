import pytest

from stoker.config import document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E6", 1e6),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("1_000", 1000),
        ("on", "on"),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("'5'", "5"),
        ("0x10", "0x10"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{kind: wsd, floor: 0.1}", {"kind": "wsd", "floor": 0.1}),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    found = document.scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_every_key_and_entry_has_its_line():
    lines = document.read("a:\n  b: 1\n  c:\n    - x\n    - y: 2\n", "f").lines
    assert lines["a", "b"] == 2
    assert lines["a", "c", 1] == 5
    assert lines["a", "c", 1, "y"] == 5


def test_a_duplicate_key_is_named_with_both_lines():
    (problem,) = document.read("train:\n  seed: 1\n  seed: 2\n", "f").problems
    assert str(problem) == "f:3: train.seed is set twice (first in line 2). Remove one of them."


def test_a_tag_constructs_nothing():
    found = document.read("model: !!python/object/apply:os.system ['true']", "f")
    assert found.value == {"model": None}
    assert "!!python/object/apply:os.system is not allowed" in found.problems[0].what


def test_an_anchor_is_copied_and_one_that_holds_itself_is_refused():
    assert document.read("a: &x [1]\nb: *x", "f").value == {"a": [1], "b": [1]}
    (problem,) = document.read("a: &x [*x]", "f").problems
    assert "refers to what contains it" in problem.what


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a:\n\tb: 1", 2, "a tab"),
        ("a: b: 1", 1, "a second `key:`"),
        ("a: [1, 2\nb: 3", 2, "not valid YAML"),
        ("a:\n  b: 1\n c: 2", 3, "not valid YAML"),
    ],
)
def test_broken_yaml_is_reported_with_its_line(text, line, words):
    (problem,) = document.read(text, "f").problems
    assert problem.where == f"f:{line}"
    assert words in problem.what
    assert problem.fix


def test_keys_that_are_not_text_become_text_or_are_refused():
    assert document.read("1: a", "f").value == {"1": "a"}
    assert "a key must be a word" in document.read("? [a]\n: b", "f").problems[0].what
