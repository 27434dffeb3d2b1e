import json

import pytest

from stoker.data.audit import Audit, problems, warnings

GOOD = Audit(
    rows=10,
    documents=10,
    tokens=100,
    trained_tokens=50,
    turns=10,
    turns_with_end=10,
    roles={"user": 10, "assistant": 10},
)


def changed(**changes):
    return Audit(**({"rows": 10, "documents": 10, "tokens": 100, "trained_tokens": 50, "turns": 10} | changes))


def test_sound_data_has_neither_problems_nor_warnings():
    assert problems(GOOD) == []
    assert warnings(GOOD) == []


@pytest.mark.parametrize(
    ("audit", "message"),
    [
        (changed(documents=0, tokens=0, trained_tokens=0), "no row is left"),
        (
            changed(trained_tokens=0, roles={"user": 3, "bot": 2}, train_on=("assistant",)),
            "data.train_on = assistant, but the roles in the data are user (3), bot (2)",
        ),
        (changed(trained_tokens=0, roles={"assistant": 3}, train_on=("assistant",)), "none of 100 tokens is trained"),
        (changed(turns_with_end=0), "the end-of-turn token is trained in none of 10 turns"),
        (changed(turns_with_end=10, doubled_bos=4), "4 of 10 documents begin with two BOS tokens"),
    ],
)
def test_problems_are_told_with_their_counts(audit, message):
    (problem,) = problems(audit)
    assert message in problem.what
    assert problem.fix


def test_end_of_turn_is_no_problem_when_not_wanted():
    assert problems(changed(turns_with_end=0, end_of_turn_wanted=False)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bad_rows": 2, "bad_row_examples": ("f:3: x",)}, "2 malformed rows are left out (first: f:3: x)"),
        ({"truncated": 3, "truncated_tokens": 30}, "3 of 10 rows are cut at the sequence length (30 tokens lost)"),
        ({"dropped": 2}, "2 rows are longer"),
        (
            {"rows_without_trained_token": 1, "untrained_examples": ("f:1",)},
            "1 documents have no trained token (first: f:1)",
        ),
        ({"turns_not_rendered": 1}, "leaves out 1 turns"),
        ({"turns_with_end": 7}, "3 of 10 trained turns end without a trained end"),
        ({"special_in_content": 1}, "text of a special token"),
        ({"rows_by_turn": 5}, "in 5 rows the chat template changes contents"),
        ({"trained_tokens": 1, "tokens": 1000}, "only 0.10% of the tokens are trained"),
    ],
)
def test_warnings_are_told_with_their_counts(changes, message):
    (warning,) = warnings(changed(**({"turns_with_end": 10} | changes)))
    assert message in warning.what


def test_audit_survives_json():
    audit = changed(bad_row_examples=("a", "b"), end_tokens={"</s>": 3}, train_on=("assistant",))
    facts = json.loads(json.dumps(audit.to_dict()))
    assert (facts["trained_share"], facts["end_of_turn_share"]) == (0.5, 0.0)
    assert Audit.from_dict(facts) == audit
