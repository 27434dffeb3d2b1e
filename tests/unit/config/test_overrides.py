import pytest

from stoker.config.load import load
from stoker.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.learning_rate=1e-4", lambda config: config.train.learning_rate == 1e-4),
        ("adapter.rank=8", lambda config: config.adapter.rank == 8),
        ("adapter=null", lambda config: config.adapter is None),
        ("data.train.0.limit=3", lambda config: config.data.train[0].limit == 3),
        ("data.train[0].limit=3", lambda config: config.data.train[0].limit == 3),
        ("adapter.targets=[q_proj, v_proj]", lambda config: config.adapter.targets == ["q_proj", "v_proj"]),
        ("output.questions=['a=b?']", lambda config: config.output.questions == ["a=b?"]),
        ("train.max_gradient_norm=null", lambda config: config.train.max_gradient_norm is None),
    ],
)
def test_any_field_can_be_set(minimal, override, read):
    assert read(load(minimal, [override]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr=3", "train.lr is not a setting. Here it is train.learning_rate."),
        ("train.learning_rate=fast", "must be a number above 0"),
        ("train.batch_size=2.5", "train.batch_size = 2.5: must be a whole number of at least 1."),
        ("train.batch_size", "is written as name=value"),
        ("train..seed=1", "is written as name=value"),
        ("data.train.3.limit=1", "data.train is a list of 1"),
        ("train.seed.x=1", "train.seed = {'x': 1}"),
        ("model.base.x=1", "model.base holds no settings of its own"),
        ("output.questions=[a", "not valid YAML"),
    ],
)
def test_what_is_wrong_with_an_override_names_the_override(minimal, override, words):
    with pytest.raises(ConfigError) as caught:
        load(minimal, [override])
    (problem,) = caught.value.problems
    assert problem.where == f"--set {override}"
    assert words in str(problem)


def test_a_later_override_wins(minimal):
    assert load(minimal, ["train.seed=1", "train.seed=2"]).train.seed == 2
