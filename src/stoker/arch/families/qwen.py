"""Qwen2, Qwen2.5 and Qwen3: Llama's layers with biased queries, keys and values (2), or with these two normed (3).

The upper layers may have a sliding window. Checked against transformers 5.24: `configuration_qwen2.py`,
`modeling_qwen2.py`, `configuration_qwen3.py`, `modeling_qwen3.py`.
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
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, WeightEntry

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_THIRD: dict[str, Any] = {**_DEFAULTS, "head_dim": 128, "attention_bias": False}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "qwen2" or "qwen3" configuration; raises ModelError for what it does not compute."""
    is_third = config["model_type"] == "qwen3"
    reader = ConfigReader(config, where, _THIRD if is_third else _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    bias = is_third and reader.flag("attention_bias")
    special = {"qkv_bias": bias, "out_bias": bias, "qk_norm": norm} if is_third else {"qkv_bias": True}
    rope, windows = read_head_rope(reader), _windows(reader)
    layers = {
        window: LayerSpec(read_attention(reader, rope=rope, window=window, **special), read_gated(reader), norm)
        for window in windows
    }
    return read_decoder(reader, [layers[window] for window in windows], family="qwen", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())


def _windows(reader: ConfigReader) -> list[int | None]:
    """The sliding window of each layer; None: full attention."""
    num_layers = reader.size("num_hidden_layers")
    window = reader.optional_size("sliding_window") if reader.flag("use_sliding_window") else None
    first = num_layers if window is None else reader.get("max_window_layers")
    kinds = layer_kinds(reader, [SLIDING if index >= first else FULL for index in range(num_layers)])
    return [window if kind == SLIDING else None for kind in kinds]
