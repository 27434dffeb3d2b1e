import pytest

from stoker.arch import arithmetic, shapes
from stoker.errors import ModelError


def test_there_are_more_than_thirty():
    assert len(shapes.names()) > 30


@pytest.mark.parametrize("name", shapes.names())
def test_a_shape_has_the_parameters_that_were_published(name):
    assert arithmetic.num_parameters(shapes.spec(name)) == shapes.num_parameters(name)


def test_what_is_null_in_a_config_is_null_here():
    assert all(layer.mixer.window is None for layer in shapes.spec("mistral-7b").layers)
    assert all(layer.mixer.window is None for layer in shapes.spec("mixtral-8x7b").layers)
    assert {layer.mixer.window for layer in shapes.spec("gemma-3-1b").layers} == {512, None}


def test_an_unknown_shape_gets_the_nearest():
    with pytest.raises(ModelError, match=r"Did you mean .*llama-3.1-8b"):
        shapes.spec("llama-3-8b")


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("someone/own-model", None),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
    ],
)
def test_hub_ids_are_recognised(base, name):
    assert shapes.of_model(base) == name
