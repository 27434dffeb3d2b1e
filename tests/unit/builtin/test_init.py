import pytest

from stoker.builtin import is_builtin, resolve_model, resolve_rows
from stoker.errors import DataError, ModelError


def test_only_names_with_the_prefix_are_builtin():
    assert is_builtin("builtin:tiny-llama")
    assert not is_builtin("meta-llama/Llama-3.2-1B")
    assert not is_builtin("data/builtin:rows.jsonl")


def test_an_unknown_model_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ModelError, match=r"'builtin:big-llama'.*Known: builtin:tiny-llama\."):
        resolve_model("builtin:big-llama")


def test_unknown_rows_are_an_error_that_lists_the_known_ones():
    with pytest.raises(DataError, match=r"'builtin:poems'.*builtin:fine-tuning, builtin:fine-tuning-validation"):
        resolve_rows("builtin:poems")
