"""OLMo 1, 2 and 3: Llama's layers with other norms.

OLMo 1 has layer norms without weights and may clamp queries, keys and values; OLMo 2 norms what comes out of each part,
and queries and keys over all heads at once; OLMo 3 gives three of four layers a window. Checked against transformers
5.24: the configurations and models of "olmo", "olmo2" and "olmo3".
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import (
    FULL,
    SLIDING,
    layer_kinds,
    read_attention,
    read_decoder,
    read_gated,
    read_head_rope,
    refuse_dropout,
)
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, AttentionSpec, LayerSpec, NormSpec, RopeSpec, WeightEntry

_AFTER = Names(
    {
        **SEPARATE,
        "attention_post_norm": "post_attention_layernorm",
        "feed_forward_post_norm": "post_feedforward_layernorm",
    }
)
_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "sliding_window": 4096,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of an "olmo", "olmo2" or "olmo3" configuration; raises ModelError for what it does not compute."""
    is_first = config["model_type"] == "olmo"
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    # OLMo 1's epsilon is fixed in its code.
    norm = NormSpec("layer", 1e-5, weight=False) if is_first else NormSpec("rms", reader.positive("rms_norm_eps"))
    kinds = _kinds(reader)
    layers = {
        kind: LayerSpec(
            mixer=_attention(reader, kind, norm, is_first=is_first),
            feed_forward=read_gated(reader),
            norm=norm,
            placement="pre" if is_first else "post",
        )
        for kind in kinds
    }
    return read_decoder(reader, [layers[kind] for kind in kinds], family="olmo", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names() if spec.model_type == "olmo" else _AFTER)


def _attention(reader: ConfigReader, kind: str, norm: NormSpec, *, is_first: bool) -> AttentionSpec:
    bias = reader.flag("attention_bias")
    clip = reader.get("clip_qkv") if is_first else None
    return read_attention(
        reader,
        rope=_rope(reader, kind),
        qkv_bias=bias,
        out_bias=bias,
        window=reader.size("sliding_window") if kind == SLIDING else None,
        qk_norm=None if is_first else norm,
        qk_norm_over="head" if is_first else "all",
        clip_qkv=None if clip is None else reader.positive("clip_qkv"),
    )


def _rope(reader: ConfigReader, kind: str) -> RopeSpec:
    """OLMo 3 has a rope for each kind of layer, of which that of full attention alone may be scaled."""
    if reader.config["model_type"] != "olmo3":
        return read_head_rope(reader)
    given = reader.get("rope_parameters") or {}
    by_kind = isinstance(given, Mapping) and bool({SLIDING, FULL} & set(given))
    parameters = dict((given.get(kind) if by_kind else None) or {})
    if kind == FULL:
        parameters |= reader.get("rope_scaling") or {}
    return read_head_rope(reader, parameters=parameters, theta=reader.get("rope_theta", 500_000.0))


def _kinds(reader: ConfigReader) -> tuple[str, ...]:
    num_layers = reader.size("num_hidden_layers")
    if reader.config["model_type"] != "olmo3":
        return (FULL,) * num_layers
    return layer_kinds(reader, [SLIDING if (index + 1) % 4 else FULL for index in range(num_layers)])
