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


def test_what_neither_path_can_do_is_refused_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match='"t5" is neither native nor a causal language model of Transformers'):
        models.command(str(tmp_path), None, False)
    quantised = {"model_type": "opt", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ModelError, match="gptq"):
        models.command(str(tmp_path), None, False)
