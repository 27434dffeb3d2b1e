"""State-space models from a folder to an adapter, an answer and a merged model."""

import json

import pytest

import stoker as api
from stoker.errors import DataError

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path, tiny_model):
    """A function: a Transformers class and configuration to a folder, its tokenizer with a chat template or without."""
    import torch
    from transformers import AutoTokenizer

    def make(kind, config, *, has_template=True):
        path = tmp_path / "base"
        torch.manual_seed(0)
        kind(config).save_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        if not has_template:
            tokenizer.chat_template = None
        tokenizer.save_pretrained(path)
        return path

    return make


def vocabulary(tiny_model):
    return {"vocab_size": json.loads((tiny_model / "config.json").read_text())["vocab_size"], "eos_token_id": 0}


def test_mamba_needs_a_template_then_trains_packed_answers_and_merges(
    stoker, run_values, write_yaml, tmp_path, tiny_model, folder, rows, monkeypatch
):
    from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    path = folder(MambaForCausalLM, MambaConfig(**vocabulary(tiny_model), **sizes), has_template=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"model\.chat_template"):
        api.load(str(path), device="cpu").add_lora(rank=2).train(rows(4), learning_rate=0.01, steps=1)
    run_values["model"] |= {"base": str(path), "chat_template": "zephyr"}
    run_values["adapter"] |= {"targets": ["in_proj", "out_proj"], "dropout": 0.0}
    run_values["data"]["packing"] = True
    run_values["output"] |= {"questions": ["What is 1 plus one?"]}
    said = stoker("train", write_yaml(run_values)).stdout
    assert "PEFT loads no adapter on backbone.layers.0.mixer.out_proj" in said
    losses = json.loads((tmp_path / "run/run.json").read_text())["losses"]
    assert losses["train"]["after"] < losses["train"]["before"]
    assert "verified" in stoker("merge", "run", "-o", "merged").stdout
    answer = stoker("generate", "merged", "--prompt", "What is 1 plus one?", "--max-new-tokens", "8").stdout
    assert answer.strip()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    plain = AutoModelForCausalLM.from_pretrained(path).state_dict()
    changed = {name.rpartition("mixer.")[2] for name, tensor in merged.items() if not tensor.equal(plain[name])}
    assert changed == {"in_proj.weight", "out_proj.weight"}


def test_a_hybrid_trains_answers_and_loads_again(tmp_path, tiny_model, rows, folder, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, FalconH1Config, FalconH1ForCausalLM

    monkeypatch.chdir(tmp_path)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_state": 4}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "mamba_d_ssm": 32, **heads}
    path = folder(FalconH1ForCausalLM, FalconH1Config(**vocabulary(tiny_model), **sizes))
    model = api.load(str(path), device="cpu")
    model.add_lora(rank=4, alpha=8)
    run = model.train(rows(12), learning_rate=0.02, steps=6, batch_size=4, validation=2)
    assert run.losses["train"]["after"] < run.losses["train"]["before"]
    answer = model.generate("What is 3 plus one?", max_new_tokens=8)
    adapter = model.save(tmp_path / "adapter")
    again = api.load(str(adapter), device="cpu")
    assert again.generate("What is 3 plus one?", max_new_tokens=8) == answer
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), adapter).peft_config
