"""Llama's family: Llama 1, 2, 3, 3.1, 3.2, Yi (whose model type is "llama") and Mistral with its sliding window.

A key that is absent has the default that Transformers gives it for that model type; a key whose value Stoker does not
compute is refused. Checked against transformers 5.24: `configuration_llama.py`, `configuration_mistral.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_heads
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.families.stored import stored_quantization
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, WeightEntry

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "sliding_window": None,
    },
    "mistral": {
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "llama" or "mistral" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS[config["model_type"]])
    _refuse_what_is_not_computed(reader)
    is_llama = config["model_type"] == "llama"
    hidden_size = reader.size("hidden_size", 4096)
    max_positions = reader.size("max_position_embeddings")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps", 1e-6))
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    # Mistral's own code has neither of these biases, whatever its configuration says.
    attention_bias = is_llama and reader.flag("attention_bias", False)
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=read_rope(reader, head_dim=head_dim, max_positions=max_positions),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        # A sliding window in a Llama configuration means nothing to Transformers either.
        window=None if is_llama else _window(reader),
    )
    feed_forward = GatedSpec(
        intermediate_size=reader.size("intermediate_size"), bias=is_llama and reader.flag("mlp_bias", False)
    )
    layer = LayerSpec(mixer=attention, feed_forward=feed_forward, norm=norm)
    return ArchSpec(
        family="llama",
        model_type=config["model_type"],
        vocab_size=reader.size("vocab_size", 32000),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=(layer,) * reader.size("num_hidden_layers", 32),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())


def _window(reader: ConfigReader) -> int | None:
    """The sliding window, None for full attention; mixtures of the two by layer are refused."""
    window = reader.optional_size("sliding_window")
    expected = "full_attention" if window is None else "sliding_attention"
    layer_types = reader.get("layer_types")
    if layer_types is not None and (not isinstance(layer_types, list) or set(map(str, layer_types)) != {expected}):
        raise reader.error(
            f"layer_types contradicts sliding_window = {window}, and a Mistral model has one kind of attention."
        )
    return window


def _refuse_what_is_not_computed(reader: ConfigReader) -> None:
    """Refuses the settings that would change the result. `pretraining_tp` does not: it orders the same sums."""
    reader.require("hidden_act", "silu", fix="Only SwiGLU feed-forwards (silu) are native.")
    reader.require("attention_dropout", 0, fix="Set it to 0.0 in config.json: Stoker trains without attention dropout.")
    reader.require("partial_rotary_factor", 1.0, fix="Llama models rotate whole heads.")
    stored_quantization(reader.config, reader.where)
