"""EXAONE 4: norms after each part, normed queries and keys, and (32B) every fourth layer without window or positions.

Checked against transformers 5.24: `configuration_exaone4.py`, `modeling_exaone4.py`.
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
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, WeightEntry

_NAMES = Names(
    {
        **SEPARATE,
        "attention_post_norm": "post_attention_layernorm",
        "feed_forward_post_norm": "post_feedforward_layernorm",
    }
)
_DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of an "exaone4" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    rope, window = read_head_rope(reader), reader.optional_size("sliding_window")
    layers = {
        kind: LayerSpec(
            mixer=read_attention(
                reader,
                rope=rope if window is None or kind == SLIDING else None,
                window=window if kind == SLIDING else None,
                qk_norm=norm,
            ),
            feed_forward=read_gated(reader),
            norm=norm,
            placement="post",
        )
        for kind in (SLIDING, FULL)
    }
    return read_decoder(reader, [layers[kind] for kind in _kinds(reader, window)], family="exaone4", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)


def _kinds(reader: ConfigReader, window: int | None) -> tuple[str, ...]:
    """Which layers have a window: all but each last of `sliding_window_pattern`."""
    pattern = 0 if window is None else reader.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):  # "LLLG": local and global
        pattern = len(pattern)
    every, num_layers = pattern or 1, reader.size("num_hidden_layers")
    return layer_kinds(reader, [SLIDING if (index + 1) % every else FULL for index in range(num_layers)])
