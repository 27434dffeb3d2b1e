import pytest

from stoker.adapters.targets import select
from stoker.errors import ModelError

NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        ("all-linear", NAMES),
        (["q_proj"], [NAMES[0], NAMES[3]]),
        (["self_attn.q_proj", "up_proj"], [NAMES[0], NAMES[2], NAMES[3], NAMES[5]]),
        ([NAMES[4]], [NAMES[4]]),
        (r".*\.1\..*(q|v)_proj", [NAMES[3], NAMES[4]]),
    ],
)
def test_selects_what_peft_would(targets, chosen):
    assert select(NAMES, targets) == frozenset(chosen)


def test_a_name_is_not_matched_in_the_middle_of_a_component():
    with pytest.raises(ModelError, match="no linear layer is called 'proj'"):
        select(NAMES, ["proj"])


def test_every_unknown_name_is_reported_with_what_there_is_and_what_was_meant():
    with pytest.raises(ModelError) as caught:
        select(NAMES, ["q_proj", "up_porj", "lm_head"])
    message = str(caught.value)
    assert "no linear layer is called 'up_porj', 'lm_head'." in message
    assert "Did you mean 'up_proj'?" in message
    assert "There are 'q_proj', 'v_proj', 'up_proj'" in message


@pytest.mark.parametrize("targets", ["q_proj", []])
def test_targets_that_match_nothing_are_refused(targets):
    with pytest.raises(ModelError, match=r"match no linear layer.*There are 'q_proj'"):
        select(NAMES, targets)


def test_a_broken_regular_expression_is_refused():
    with pytest.raises(ModelError, match=r"'\(q' is no regular expression"):
        select(NAMES, "(q")


def test_all_dense_leaves_experts_out():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj", "model.layers.0.out_proj"]
    apart = {"by_name_only": {names[2]}, "experts": {names[1]}}

    assert select(names, "all-dense", **apart) == {names[0]}
    assert select(names, "all-linear", **apart) == {names[0], names[1]}
