import json

import pytest
from transformers import BloomConfig

from stoker.arch.support import rows
from stoker.cli import models
from stoker.errors import ModelError


def said(capsys, *arguments, **options):
    models.command(*arguments, **{"revision": None, "trust_remote_code": False, **options})
    return capsys.readouterr().out


def test_the_table_has_a_line_for_each_model_type(capsys):
    lines = said(capsys, None).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [row.model_type for row in rows()]


def test_a_model_type_is_looked_up(capsys):
    text = said(capsys, "rwkv")
    assert "borrowed: RWKV 4" in text
    assert "packing     by document" in text


def test_a_native_folder_says_why_it_has_or_has_no_kernel(capsys, tmp_path):
    config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = said(capsys, str(tmp_path))
    assert "native: family llama" in text
    assert "each can be one operation" in text


def test_a_borrowed_folder_says_whose_class_runs_it_and_why(capsys, tmp_path):
    BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2).save_pretrained(tmp_path)
    text = said(capsys, str(tmp_path))
    assert "borrowed: through Transformers' BloomForCausalLM" in text
    assert 'model_type "bloom" is not native' in text
    assert "query_key_value" in text


def test_a_setting_that_the_family_does_not_compute_is_the_reason_for_borrowing(capsys, tmp_path):
    config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "mish", "intermediate_size": 24}))
    text = said(capsys, str(tmp_path))
    assert "borrowed: through Transformers' LlamaForCausalLM" in text
    assert "mish" in text


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "bert"}, '"bert" is an encoder: each token sees those after it.*Name a causal'),
        ({"model_type": "llava"}, '"llava" is no causal language model: .* a model of images'),
        ({"model_type": "nobody_knows"}, '"nobody_knows" is neither native nor'),
        ({"model_type": "opt", "hidden_size": "wide"}, "'hidden_size' expected int, got str.* Mend config.json"),
        ({"model_type": "opt", "num_attention_heads": 0}, "Transformers cannot make this model: .* Mend config.json"),
        # A family refuses these, and Transformers' class is no remedy.
        (
            {"model_type": "qwen3", "num_attention_heads": "four"},
            "'four' is not a whole number.*expected int, got str",
        ),
        ({"model_type": "qwen3", "num_attention_heads": 0}, "= 0 is not a whole number of at least 1.*cannot make"),
        ({"model_type": "qwen3", "num_hidden_layers": 7, "layer_types": ["full_attention"]}, "for each of 7 layers"),
        ({"model_type": "qwen3", "rms_norm_eps": "x"}, "rms_norm_eps = 'x' is not a number greater than 0"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "weird"}}, "'weird' is not native.*cannot make"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused_with_the_reason_and_a_remedy(tmp_path, config, reason):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=reason) as refused:
        models.command(str(tmp_path), None, False)
    assert all(problem.fix for problem in refused.value.problems)
    assert "Until then" not in str(refused.value)


def test_what_neither_path_can_do_is_refused_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match='"t5" is no causal language model: Transformers has it as an encoder'):
        models.command(str(tmp_path), None, False)
    quantised = {"model_type": "opt", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ModelError, match="gptq"):
        models.command(str(tmp_path), None, False)
