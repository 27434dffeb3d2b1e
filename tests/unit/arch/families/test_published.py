"""Published models have the published number of parameters: their config.json gives the shape, defaults the rest."""

import pytest

from stoker.arch import arithmetic, families


def shape(hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads=None, **more):
    grouped = {} if num_kv_heads is None else {"num_key_value_heads": num_kv_heads}
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        **grouped,
        **more,
    }


FALCON_40B = {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8}
PUBLISHED = {
    "tiiuae/falcon-7b": ("falcon", {}, 6_921_720_704),  # the tied head counted once
    "tiiuae/falcon-40b": ("falcon", {**FALCON_40B, "new_decoder_architecture": True}, 41_303_293_952),
    "EleutherAI/pythia-1.4b": ("gpt_neox", shape(2048, 8192, 24, 16, vocab_size=50304), 1_414_647_808),
    "EleutherAI/gpt-neox-20b": ("gpt_neox", {}, 20_554_567_680),
    "openai-community/gpt2": ("gpt2", {}, 124_439_808),
    "microsoft/phi-2": ("phi", shape(2560, 10240, 32, 32), 2_779_683_840),
    "microsoft/Phi-3-mini-4k-instruct": ("phi3", {}, 3_821_079_552),
    "microsoft/Phi-4-mini-instruct": (
        "phi3",
        shape(3072, 8192, 32, 24, 8, vocab_size=200064, tie_word_embeddings=True),
        3_836_021_760,
    ),
    "google/gemma-2b": ("gemma", shape(2048, 16384, 18, 8, 1), 2_506_172_416),
    "google/gemma-7b": ("gemma", {}, 8_537_680_896),
    "google/gemma-2-2b": ("gemma2", {}, 2_614_341_888),
    "google/gemma-2-9b": ("gemma2", shape(3584, 14336, 42, 16, 8), 9_241_705_984),
    "google/gemma-3-1b-pt": ("gemma3_text", shape(1152, 6912, 26, 4, 1, vocab_size=262144), 999_885_952),
    "Qwen/Qwen2.5-1.5B": ("qwen2", shape(1536, 8960, 28, 12, 2, tie_word_embeddings=True), 1_543_714_304),
    "Qwen/Qwen3-8B": ("qwen3", shape(4096, 12288, 36, 32, 8), 8_190_735_360),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_number_of_parameters(name):
    model_type, config, expected = PUBLISHED[name]
    assert arithmetic.num_parameters(families.read({"model_type": model_type, **config}, name)) == expected
