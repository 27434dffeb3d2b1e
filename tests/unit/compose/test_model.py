import pytest

from stoker.arch.families import read
from stoker.compose.model import Base, fitted
from stoker.config.load import parse
from stoker.errors import ConfigError, ModelError

CONFIG = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64}
NF4 = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


@pytest.fixture
def base(tmp_path):
    return lambda **changes: Base("some/base", None, tmp_path, CONFIG | changes, read(CONFIG | changes, "config.json"))


@pytest.fixture
def run():
    values = {
        "model": {"base": "m"},
        "adapter": {"rank": 2},
        "data": {"train": [{"path": "x"}]},
        "train": {"learning_rate": 1e-3},
        "output": {"folder": "r"},
    }
    return lambda *overrides: parse(values, overrides)


def test_a_base_stored_in_nf4_is_trained_on_as_it_is(base, run):
    assert fitted(run(), base(**NF4)).model.quantization == "nf4"
    assert fitted(run("model.quantization=nf4"), base(**NF4)).model.quantization == "nf4"
    assert fitted(run(), base()).model.quantization == "none"
    assert fitted(run("model.quantization=int8"), base()).model.quantization == "int8"


def test_another_format_than_the_stored_one_is_refused(base, run):
    with pytest.raises(ConfigError, match="= int8, but the weights of some/base are stored in nf4"):
        fitted(run("model.quantization=int8"), base(**NF4))


def test_a_base_stored_in_nf4_cannot_be_trained_in_full(base, run):
    with pytest.raises(ConfigError, match=r"stored in nf4, which cannot be trained.*Add an adapter"):
        fitted(run("adapter=null"), base(**NF4))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        ({"bits": 4}, "bitsandbytes"),
    ],
)
def test_other_stored_formats_are_refused_by_name(base, settings, what):
    with pytest.raises(ModelError, match=f"weights stored as {what} are not computed"):
        base(quantization_config=settings)


def test_a_sequence_length_that_is_not_set_fits_the_model(base, run):
    assert fitted(run(), base()).data.sequence_length == 64
