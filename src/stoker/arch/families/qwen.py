"""Qwen2, Qwen2.5 and Qwen3: Llama's layers with biased queries, keys and values (2), or with these two normed (3).

The upper layers may have a sliding window. Checked against transformers 5.24: `configuration_qwen2.py`,
`modeling_qwen2.py`, `configuration_qwen3.py`, `modeling_qwen3.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import layer_kinds, read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, WeightEntry

_SLIDING, _FULL = "sliding_attention", "full_attention"
_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "qwen2" or "qwen3" configuration; raises ModelError for what it does not compute."""
    is_qwen3 = config["model_type"] == "qwen3"
    reader = ConfigReader(config, where, {**_DEFAULTS, "head_dim": 128 if is_qwen3 else None})
    refuse_dropout(reader, "attention_dropout")
    hidden_size = reader.size("hidden_size", 4096)
    num_layers = reader.size("num_hidden_layers", 32)
    max_positions = reader.size("max_position_embeddings", 32768)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps", 1e-6))
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    bias = reader.flag("attention_bias", False) if is_qwen3 else False
    rope = read_rope(reader, head_dim=head_dim, max_positions=max_positions)
    feed_forward = GatedSpec(reader.size("intermediate_size", 22016), read_activation(reader, "silu"))
    windows = _windows(reader, num_layers)
    layers = {
        window: LayerSpec(
            mixer=AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                rope=rope,
                qkv_bias=bias or not is_qwen3,
                out_bias=bias,
                window=window,
                qk_norm=norm if is_qwen3 else None,
            ),
            feed_forward=feed_forward,
            norm=norm,
        )
        for window in windows
    }
    return ArchSpec(
        family="qwen",
        model_type=config["model_type"],
        vocab_size=reader.size("vocab_size", 151936),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=tuple(layers[window] for window in windows),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())


def _windows(reader: ConfigReader, num_layers: int) -> list[int | None]:
    """The sliding window of each layer; None: full attention."""
    window = reader.optional_size("sliding_window") if reader.flag("use_sliding_window", False) else None
    first = num_layers if window is None else reader.get("max_window_layers", 28)
    default = [_SLIDING if index >= first else _FULL for index in range(num_layers)]
    kinds = layer_kinds(reader, num_layers, (_SLIDING, _FULL), default)
    return [window if kind == _SLIDING else None for kind in kinds]
