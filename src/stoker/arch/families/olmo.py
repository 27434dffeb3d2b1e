"""OLMo 1, 2 and 3: Llama's layers with other norms.

OLMo 1 has layer norms without weights and may clamp queries, keys and values; OLMo 2 norms what comes out of each part,
and queries and keys over all heads at once; OLMo 3 gives three of four layers a window. Checked against transformers
5.24: the configurations and models of "olmo", "olmo2" and "olmo3".
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import layer_kinds, read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, RopeSpec, WeightEntry

_SLIDING, _FULL = "sliding_attention", "full_attention"
_AFTER = Names(
    {
        **SEPARATE,
        "attention_post_norm": "post_attention_layernorm",
        "feed_forward_post_norm": "post_feedforward_layernorm",
    }
)


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of an "olmo", "olmo2" or "olmo3" configuration; raises ModelError for what it does not compute."""
    model_type = config["model_type"]
    reader = ConfigReader(config, where, {})
    refuse_dropout(reader, "attention_dropout")
    hidden_size = reader.size("hidden_size", 4096)
    num_layers = reader.size("num_hidden_layers", 32)
    max_positions = reader.size("max_position_embeddings", 2048)
    is_first = model_type == "olmo"
    # OLMo 1's epsilon is fixed in its code.
    norm = NormSpec("layer", 1e-5, weight=False) if is_first else NormSpec("rms", reader.positive("rms_norm_eps", 1e-5))
    kinds = _kinds(reader, model_type, num_layers)
    layers = {
        kind: LayerSpec(
            mixer=_attention(reader, kind, norm, hidden_size, max_positions),
            feed_forward=GatedSpec(reader.size("intermediate_size", 11008), read_activation(reader, "silu")),
            norm=norm,
            placement="pre" if is_first else "post",
        )
        for kind in kinds
    }
    return ArchSpec(
        family="olmo",
        model_type=model_type,
        vocab_size=reader.size("vocab_size", 50304),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=tuple(layers[kind] for kind in kinds),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names() if spec.model_type == "olmo" else _AFTER)


def _attention(reader: ConfigReader, kind: str, norm: NormSpec, hidden_size: int, max_positions: int) -> AttentionSpec:
    is_first = reader.config["model_type"] == "olmo"
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    bias = reader.flag("attention_bias", False)
    clip = reader.get("clip_qkv") if is_first else None
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=_rope(reader, kind, head_dim, max_positions),
        qkv_bias=bias,
        out_bias=bias,
        window=reader.size("sliding_window", 4096) if kind == _SLIDING else None,
        qk_norm=None if is_first else norm,
        qk_norm_over="head" if is_first else "all",
        clip_qkv=None if clip is None else reader.positive("clip_qkv"),
    )


def _rope(reader: ConfigReader, kind: str, head_dim: int, max_positions: int) -> RopeSpec:
    """OLMo 3 has a rope for each kind of layer, of which that of full attention alone may be scaled."""
    sizes = {"head_dim": head_dim, "max_positions": max_positions}
    if reader.config["model_type"] != "olmo3":
        return read_rope(reader, **sizes)
    given = reader.get("rope_parameters") or {}
    by_kind = isinstance(given, Mapping) and bool({_SLIDING, _FULL} & set(given))
    parameters = dict((given.get(kind) if by_kind else None) or {})
    if kind == _FULL:
        parameters |= reader.get("rope_scaling") or {}
    return read_rope(reader, **sizes, parameters=parameters, theta=reader.get("rope_theta", 500_000.0))


def _kinds(reader: ConfigReader, model_type: str, num_layers: int) -> tuple[str, ...]:
    if model_type != "olmo3":
        return (_FULL,) * num_layers
    default = [_SLIDING if (index + 1) % 4 else _FULL for index in range(num_layers)]
    return layer_kinds(reader, num_layers, (_SLIDING, _FULL), default)
