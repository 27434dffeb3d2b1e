"""Llama's family: Llama 1, 2, 3, 3.1, 3.2, Yi (whose model type is "llama") and Mistral with its sliding window.

A key that is absent has the default that Transformers gives it for that model type; a key whose value Stoker does not
compute is refused. `pretraining_tp` is not: it orders the same sums. Checked against transformers 5.24:
`configuration_llama.py`, `configuration_mistral.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import (
    FULL,
    LIKE_LLAMA,
    SLIDING,
    read_attention,
    read_decoder,
    read_head_rope,
    refuse_dropout,
)
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, GatedSpec, LayerSpec, NormSpec, WeightEntry

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**LIKE_LLAMA},
    "mistral": {
        **LIKE_LLAMA,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "llama" or "mistral" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS[config["model_type"]])
    reader.require("hidden_act", "silu", fix="Only SwiGLU feed-forwards (silu) are native.")
    reader.require("partial_rotary_factor", 1.0, fix="Llama models rotate whole heads.")
    refuse_dropout(reader, "attention_dropout")
    is_llama = config["model_type"] == "llama"
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    # Mistral's own code has neither of these biases, whatever its configuration says.
    attention_bias = is_llama and reader.flag("attention_bias")
    layer = LayerSpec(
        mixer=read_attention(
            reader,
            rope=read_head_rope(reader),
            qkv_bias=attention_bias,
            out_bias=attention_bias,
            # A sliding window in a Llama configuration means nothing to Transformers either.
            window=None if is_llama else _window(reader),
        ),
        feed_forward=GatedSpec(reader.size("intermediate_size"), bias=is_llama and reader.flag("mlp_bias")),
        norm=norm,
    )
    return read_decoder(reader, layer, family="llama", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())


def _window(reader: ConfigReader) -> int | None:
    """The sliding window, None for full attention; mixtures of the two by layer are refused."""
    window = reader.optional_size("sliding_window")
    expected = FULL if window is None else SLIDING
    layer_types = reader.get("layer_types")
    if layer_types is not None and (not isinstance(layer_types, list) or set(map(str, layer_types)) != {expected}):
        raise reader.error(
            f"layer_types contradicts sliding_window = {window}, and a Mistral model has one kind of attention."
        )
    return window
