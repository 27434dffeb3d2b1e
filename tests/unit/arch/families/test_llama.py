import pytest

from stoker.arch.families import read, weight_map
from stoker.errors import ModelError


def llama(**changes):
    return read({"model_type": "llama", "num_hidden_layers": 2, **changes}, "folder/config.json")


def mistral(**changes):
    return read({"model_type": "mistral", "num_hidden_layers": 2, **changes}, "folder/config.json")


def test_heads_follow_from_the_configuration():
    mixer = llama(hidden_size=64, num_attention_heads=8, num_key_value_heads=2).layers[0].mixer
    assert (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim) == (8, 2, 8)
    assert llama(hidden_size=64, num_attention_heads=8, head_dim=16).layers[0].mixer.head_dim == 16
    assert llama(num_attention_heads=8, num_key_value_heads=None).layers[0].mixer.num_kv_heads == 8


def test_only_mistral_has_a_window_and_only_llama_has_biases():
    settings = {"sliding_window": 32, "attention_bias": True, "mlp_bias": True}
    ours, theirs = llama(**settings).layers[0], mistral(**settings).layers[0]
    assert ours.mixer.window is None
    assert theirs.mixer.window == 32
    assert ours.mixer.qkv_bias and ours.mixer.out_bias and ours.feed_forward.bias
    assert not (theirs.mixer.qkv_bias or theirs.mixer.out_bias or theirs.feed_forward.bias)
    assert mistral(sliding_window=None).layers[0].mixer.window is None
    assert mistral().layers[0].mixer.window == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "not a multiple of num_key_value_heads = 3"),
        ({"hidden_size": 60, "num_attention_heads": 8}, "hidden_size = 60"),
        ({"head_dim": 7}, "head_dim = 7 is odd"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        ({"rope_theta": True}, "rope_theta = True"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes, message):
    with pytest.raises(ModelError, match=r"^folder/config\.json: ") as error:
        llama(**changes)
    assert message in str(error.value)


def test_layer_types_that_contradict_the_window_are_refused():
    assert mistral(layer_types=["sliding_attention"] * 2).layers[0].mixer.window == 4096
    with pytest.raises(ModelError, match="layer_types"):
        mistral(layer_types=["sliding_attention", "full_attention"])


def test_pretraining_tp_only_orders_sums_and_is_accepted():
    assert llama(pretraining_tp=2) == llama()


def test_the_weight_map_names_each_tensor_once():
    entries = weight_map(llama(attention_bias=True))
    theirs = [name for entry in entries for name in entry.theirs]
    assert len(theirs) == len(set(theirs)) == 2 * (9 + 4) + 3
    assert [e.theirs for e in entries if e.ours == "blocks.1.attention.qkv.bias"] == [
        tuple(f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkv")
    ]
    assert "lm_head.weight" in theirs
    assert "lm_head.weight" not in [n for e in weight_map(llama(tie_word_embeddings=True)) for n in e.theirs]


def test_an_unknown_architecture_says_what_is_native_and_what_will_run_it():
    with pytest.raises(ModelError) as error:
        read({"model_type": "no_such_type"}, "folder/config.json")
    for part in ("no_such_type", "not native", "llama, mistral", "Transformers with PEFT", "folder/config.json"):
        assert part in str(error.value)
    with pytest.raises(ModelError, match="model_type"):
        read({}, "folder/config.json")
