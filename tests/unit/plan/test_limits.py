import pytest

from stoker.arch import families
from stoker.plan import limits


def _spec(scaling):
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return families.read(config | {"max_position_embeddings": 1024, "rope_scaling": scaling}, "config.json")


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 1024),
        ({"rope_type": "linear", "factor": 2.0}, 2048),
        ({"rope_type": "dynamic", "factor": 4.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
    ],
)
def test_scaling_stretches_the_context(scaling, length):
    assert limits.max_sequence_length(_spec(scaling)) == length


def test_a_longer_sequence_is_a_problem_with_its_setting(run):
    ((path, problem),) = limits.problems(run(), _spec(None))
    assert path == ("data", "sequence_length")
    assert "some/model was made for sequences of at most 1024 tokens" in problem.what
    assert limits.problems(run("data.sequence_length=1024"), _spec(None)) == []


def test_targets_that_match_no_layer_are_a_problem_with_their_setting(run):
    ((path, _),) = limits.problems(run("data.sequence_length=512", "adapter.targets=[nope]"), _spec(None))
    assert path == ("adapter", "targets")


def test_length_that_is_not_set_fits_the_model(run):
    default = run()
    data = default.data.model_copy()
    data.model_fields_set.discard("sequence_length")
    fitted = limits.fitted(default.model_copy(update={"data": data}), _spec(None))
    assert fitted.data.sequence_length == 1024
    assert limits.problems(fitted, _spec(None)) == []
    assert limits.fitted(fitted, _spec({"rope_type": "linear", "factor": 0.5})).data.sequence_length == 512


def test_length_that_is_set_stays(run):
    assert limits.fitted(run("data.sequence_length=512"), _spec(None)).data.sequence_length == 512
    assert limits.fitted(run("data.sequence_length=4096"), _spec(None)).data.sequence_length == 4096


def test_what_training_leaves_out_of_a_configuration_is_said(llama_8b):
    assert limits.left_out_notice(llama_8b) == ""
    assert "resid_pdrop = 0.1, embd_pdrop = 0.1" in limits.left_out_notice(families.read({"model_type": "gpt2"}, ""))


def test_learned_positions_bound_a_sequence():
    assert limits.max_sequence_length(families.read({"model_type": "gpt2"}, "")) == 1024
