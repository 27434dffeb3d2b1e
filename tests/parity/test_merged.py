"""A merged folder, loaded by Transformers, against PEFT's adapter on the base."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from stoker.export.merged import merge

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_merged_folder_and_gives_pefts_logits(name, use_dora, tmp_path):
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", use_dora=use_dora, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    ids = torch.randint(0, 96, (2, 20))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
    merged, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert report.adapter_effect > 0.1
    # fp32: the merged weights are sums in another order; logits are of the order of one.
    torch.testing.assert_close(merged.eval()(ids).logits, expected, rtol=0, atol=1e-5)
    assert merged.config.to_dict() == base.config.to_dict() | {"_name_or_path": str(tmp_path / "out")}
