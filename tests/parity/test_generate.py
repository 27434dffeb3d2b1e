"""Greedy decoding against Transformers' `generate` on the same weights, for each rope scaling and kind of attention."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from stoker.arch.families import read
from stoker.generate.decode import generate
from stoker.models.folder import read_config
from stoker.models.native import load

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
# 24 tokens of prompt and 40 more pass the original context of each scaling.
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
CASES = {
    "llama": lambda: LlamaConfig(**SIZES),
    "grouped heads, tied": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "linear": lambda: LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "dynamic": lambda: LlamaConfig(**{**SIZES, "max_position_embeddings": 32}, rope_parameters=DYNAMIC),
    "llama3": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "yarn": lambda: LlamaConfig(**SIZES, rope_parameters=YARN),
    "sliding window": lambda: MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8),
    "window wider than the prompt": lambda: MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=30),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_transformers(case, tmp_path):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(CASES[case](), attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, read(read_config(tmp_path), str(tmp_path)))
    prompt = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 24:].tolist()
    assert len(set(expected)) > 5
    assert list(generate(ours, prompt[0].tolist(), max_new_tokens=40)) == expected


def test_greedy_with_a_repetition_penalty_and_a_stop_token_equals_transformers(tmp_path):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, read(read_config(tmp_path), str(tmp_path)))
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.3}
    free = list(generate(ours, [5, 6, 7], max_new_tokens=30, repetition_penalty=1.3))
    stop = free[-5]
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), eos_token_id=stop, **options)
    tokens = list(generate(ours, [5, 6, 7], max_new_tokens=30, repetition_penalty=1.3, stop_ids={stop}))
    assert [*tokens, stop] == expected[0, 3:].tolist()
