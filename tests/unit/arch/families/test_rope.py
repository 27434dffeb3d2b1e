import math

import pytest

from stoker.arch.families import read
from stoker.arch.spec import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling
from stoker.errors import ModelError

LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


def rope(**changes):
    return read({"model_type": "llama", "max_position_embeddings": 100, **changes}, "config.json").layers[0].mixer.rope


def test_both_forms_give_the_same_rope():
    old = rope(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = rope(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0})
    assert old == new
    assert old.theta == 5e5
    assert old.scaling == LinearScaling(2.0)


def test_no_scaling_is_none():
    assert rope().scaling is None
    assert rope().theta == 10_000.0
    assert rope(rope_scaling=None, rope_theta=1e6).theta == 1e6
    assert rope(rope_parameters={"rope_type": "default", "rope_theta": 1e6}).scaling is None


def test_dynamic_starts_at_the_models_own_context():
    found = rope(rope_scaling={"type": "dynamic", "factor": 2, "original_max_position_embeddings": 50})
    assert found.scaling == DynamicScaling(2.0, 100)


def test_the_original_length_comes_from_the_top_then_the_rope_then_the_context():
    def original(**changes):
        return rope(**changes).scaling.original_max_positions

    assert original(rope_scaling={"rope_type": "llama3", **LLAMA3}) == 100
    inner = {"rope_type": "llama3", "original_max_position_embeddings": 50, **LLAMA3}
    assert original(rope_scaling=inner) == 50
    assert original(rope_scaling=inner, original_max_position_embeddings=25) == 25
    assert rope(rope_scaling=inner).scaling == Llama3Scaling(8.0, 1.0, 4.0, 50)


def test_yarn_derives_what_is_not_written():
    found = rope(rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 25})
    assert found.scaling == YarnScaling(4.0, 25, attention_factor=0.1 * math.log(4) + 1)
    given = rope(rope_scaling={"type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 16})
    assert (given.scaling.attention_factor, given.scaling.beta_fast) == (1.5, 16.0)
    both = rope(rope_scaling={"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0})
    assert both.scaling.attention_factor == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "proportional", "factor": 2}, "'proportional' is not native"),
        ({"type": ["linear"], "factor": 2}, "is not native"),
        ({"type": "linear"}, "factor = None"),
        ({"type": "linear", "factor": "2"}, "factor = '2'"),
        ({"type": "linear", "factor": 2, "beta_fast": 3}, "no settings beta_fast"),
        ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1}, "high_freq_factor = 1 is not above"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("linear", "rope_scaling = 'linear' is not a mapping"),
    ],
)
def test_what_is_not_known_is_refused(settings, message):
    with pytest.raises(ModelError) as error:
        rope(rope_scaling=settings)
    assert message in str(error.value)
