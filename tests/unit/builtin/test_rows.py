import json
import re
from collections import Counter

import pytest

from stoker.builtin import resolve_rows, row_names
from stoker.builtin.rows import rows_path

TRAIN, VALIDATION = "fine-tuning", "fine-tuning-validation"


def _rows(name: str) -> list[list[dict]]:
    lines = rows_path(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def _questions(name: str) -> list[str]:
    """Every user message, without case and punctuation, so that near-copies count as copies."""
    messages = [message for row in _rows(name) for message in row if message["role"] == "user"]
    return [" ".join(re.findall(r"\w+", message["content"].lower())) for message in messages]


def _answers(name: str) -> list[str]:
    return [message["content"] for row in _rows(name) for message in row if message["role"] == "assistant"]


@pytest.mark.parametrize("name", row_names())
def test_each_row_is_a_conversation_that_ends_with_an_answer(name):
    for row in _rows(name):
        roles = [message["role"] for message in row]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert turns
        for message in row:
            assert set(message) == {"role", "content"}
            assert message["content"] == message["content"].strip() != ""


@pytest.mark.parametrize("name", row_names())
def test_no_question_is_asked_twice(name):
    repeated = [question for question, count in Counter(_questions(name)).items() if count > 1]
    assert repeated == []


def test_no_validation_question_is_trained_on():
    assert set(_questions(TRAIN)) & set(_questions(VALIDATION)) == set()


def test_most_validation_answers_are_known_from_training_and_ten_are_not():
    known = set(_answers(TRAIN))
    unknown = [answer for answer in _answers(VALIDATION) if answer not in known]
    assert len(_rows(VALIDATION)) == 60
    assert len(unknown) == 10


def test_training_rows_hold_each_fact_in_five_or_more_phrasings():
    rows = _rows(TRAIN)
    assert 350 <= len(rows) <= 400
    assert min(Counter(_answers(TRAIN)).values()) >= 5
    assert sum(len(row) >= 4 for row in rows) >= 30
    assert any(row[0]["role"] == "system" for row in rows)


@pytest.mark.parametrize("name", row_names())
def test_answers_are_short(name):
    for answer in _answers(name):
        assert 15 <= len(answer.split()) <= 45


def test_rows_are_found_by_their_builtin_name():
    assert resolve_rows("builtin:fine-tuning") == rows_path("fine-tuning")
