"""Gemma 1, 2 and 3 (text): scaled embeddings, norms whose weight is stored less one, GELU gates, a tied head.

Gemma 2 puts norms before and after each part, soft-caps scores and logits, and gives every other layer a window; Gemma
3 norms queries and keys instead of capping, and has a rope of its own for layers with a window. Checked against
transformers 5.24: the configurations and models of "gemma", "gemma2" and "gemma3".
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import (
    FULL,
    SLIDING,
    layer_kinds,
    read_activation,
    read_attention,
    read_decoder,
    read_head_rope,
    refuse_dropout,
)
from stoker.arch.families.names import SANDWICH, SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, RopeSpec, WeightEntry

_ALL: dict[str, Any] = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_SECOND: dict[str, Any] = {
    **_ALL,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        **_ALL,
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
    },
    "gemma2": {
        **_SECOND,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {**_SECOND, "vocab_size": 262208, "max_position_embeddings": 131072},
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a Gemma configuration of any of the three types; raises ModelError for what it does not compute."""
    model_type = config["model_type"]
    reader = ConfigReader(config, where, _DEFAULTS[model_type])
    refuse_dropout(reader, "attention_dropout")
    reader.require("use_bidirectional_attention", False, fix="Only causal attention is trained.")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"), weight_offset=1.0)
    is_first = model_type == "gemma"
    kinds = _kinds(reader, model_type)
    layers = {
        kind: LayerSpec(
            mixer=_attention(reader, kind, norm),
            feed_forward=GatedSpec(reader.size("intermediate_size"), _activation(reader, is_first)),
            norm=norm,
            placement="pre" if is_first else "sandwich",
        )
        for kind in kinds
    }
    return read_decoder(
        reader,
        [layers[kind] for kind in kinds],
        family="gemma",
        final_norm=norm,
        embedding_scale=reader.size("hidden_size") ** 0.5,
        logit_softcap=None if is_first else _optional(reader, "final_logit_softcapping"),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names(SEPARATE if spec.model_type == "gemma" else SANDWICH))


def _attention(reader: ConfigReader, kind: str, norm: NormSpec) -> AttentionSpec:
    model_type = reader.get("model_type")
    is_first, is_third = model_type == "gemma", model_type == "gemma3_text"
    if is_third:  # its code reads the setting and does not use it
        reader.require("attn_logit_softcapping", None, fix="Set it to null, as Transformers computes the model.")
    bias = reader.flag("attention_bias")
    return read_attention(
        reader,
        rope=_rope_of(reader, kind) if is_third else read_head_rope(reader),
        qkv_bias=bias,
        out_bias=bias,
        window=(reader.optional_size("sliding_window") or 4096) if kind == SLIDING else None,
        scale=None if is_first else reader.positive("query_pre_attn_scalar", 256) ** -0.5,
        softcap=_optional(reader, "attn_logit_softcapping") if model_type == "gemma2" else None,
        qk_norm=norm if is_third else None,
    )


def _kinds(reader: ConfigReader, model_type: str) -> tuple[str, ...]:
    """Which layers have a window."""
    num_layers = reader.size("num_hidden_layers")
    if model_type == "gemma":
        return (FULL,) * num_layers
    every = 2 if model_type == "gemma2" else reader.get("sliding_window_pattern", 6)
    return layer_kinds(reader, [SLIDING if (index + 1) % every else FULL for index in range(num_layers)])


def _rope_of(reader: ConfigReader, kind: str) -> RopeSpec:
    """Gemma 3's rope of a kind of layer; only that of full attention may be scaled."""
    given = reader.get("rope_parameters") or {}
    parameters = dict(given.get(kind) or {}) if isinstance(given, Mapping) else {}
    if kind == SLIDING:
        return read_head_rope(reader, parameters=parameters, theta=reader.get("rope_local_base_freq", 10_000.0))
    parameters |= reader.get("rope_scaling") or {}
    return read_head_rope(reader, parameters=parameters, theta=reader.get("rope_theta", 1_000_000.0))


def _activation(reader: ConfigReader, is_first: bool) -> Any:
    if not is_first:
        return read_activation(reader, "gelu_pytorch_tanh", key="hidden_activation")
    # The releases say "gelu" and mean its approximation by tanh.
    found = read_activation(reader, "gelu_pytorch_tanh")
    return "gelu_tanh" if found == "gelu" else found


def _optional(reader: ConfigReader, key: str) -> float | None:
    return None if reader.get(key) is None else reader.positive(key)
