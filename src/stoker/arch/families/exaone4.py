"""EXAONE 4: norms after each part, normed queries and keys, and (32B) every fourth layer without window or positions.

Checked against transformers 5.24: `configuration_exaone4.py`, `modeling_exaone4.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import layer_kinds, read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, WeightEntry

_SLIDING, _FULL = "sliding_attention", "full_attention"
_NAMES = Names(
    {
        **SEPARATE,
        "attention_post_norm": "post_attention_layernorm",
        "feed_forward_post_norm": "post_feedforward_layernorm",
    }
)


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of an "exaone4" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, {"num_key_value_heads": 32, "sliding_window": 4096})
    refuse_dropout(reader, "attention_dropout")
    hidden_size = reader.size("hidden_size", 4096)
    num_layers = reader.size("num_hidden_layers", 32)
    max_positions = reader.size("max_position_embeddings", 2048)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps", 1e-5))
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    rope = read_rope(reader, head_dim=head_dim, max_positions=max_positions)
    window = reader.optional_size("sliding_window")
    feed_forward = GatedSpec(reader.size("intermediate_size", 16384), read_activation(reader, "silu"))
    kinds = _kinds(reader, num_layers, window)
    layers = {
        kind: LayerSpec(
            mixer=AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                rope=rope if window is None or kind == _SLIDING else None,
                window=window if kind == _SLIDING else None,
                qk_norm=norm,
            ),
            feed_forward=feed_forward,
            norm=norm,
            placement="post",
        )
        for kind in kinds
    }
    return ArchSpec(
        family="exaone4",
        model_type="exaone4",
        vocab_size=reader.size("vocab_size", 102400),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=tuple(layers[kind] for kind in kinds),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)


def _kinds(reader: ConfigReader, num_layers: int, window: int | None) -> tuple[str, ...]:
    """Which layers have a window: all but each last of `sliding_window_pattern`."""
    pattern = 0 if window is None else reader.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):  # "LLLG": local and global
        pattern = len(pattern)
    every = pattern or 1
    default = [_SLIDING if (index + 1) % every else _FULL for index in range(num_layers)]
    return layer_kinds(reader, num_layers, (_SLIDING, _FULL), default)
