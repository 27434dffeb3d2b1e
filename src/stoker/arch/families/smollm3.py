"""SmolLM3: Llama's layers, of which every fourth has no positions (SmolLM 1 and 2 are "llama").

Checked against transformers 5.24: `configuration_smollm3.py`, `modeling_smollm3.py`.
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

_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 2_000_000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "no_rope_layer_interval": 4,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "smollm3" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    rope, bias = read_head_rope(reader), reader.flag("attention_bias")
    feed_forward = read_gated(reader, bias=reader.flag("mlp_bias"))
    turned = _turned(reader)
    kinds = list(zip(turned, _windows(reader, turned), strict=True))
    layers = {
        (turns, window): LayerSpec(
            mixer=read_attention(reader, rope=rope if turns else None, qkv_bias=bias, out_bias=bias, window=window),
            feed_forward=feed_forward,
            norm=norm,
        )
        for turns, window in kinds
    }
    return read_decoder(reader, [layers[kind] for kind in kinds], family="smollm3", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())


def _turned(reader: ConfigReader) -> tuple[bool, ...]:
    """Which layers have positions; the list's name says the opposite of what its ones mean."""
    given, num_layers = reader.get("no_rope_layers"), reader.size("num_hidden_layers")
    if given is None:
        every = reader.size("no_rope_layer_interval")
        return tuple((index + 1) % every != 0 for index in range(num_layers))
    if not isinstance(given, list) or len(given) != num_layers or not set(given) <= {0, 1}:
        raise reader.error(f"no_rope_layers must hold 0 or 1 for each of {num_layers} layers.")
    return tuple(bool(value) for value in given)


def _windows(reader: ConfigReader, turned: tuple[bool, ...]) -> tuple[int | None, ...]:
    window = reader.optional_size("sliding_window") if reader.flag("use_sliding_window") else None
    kinds = layer_kinds(reader, [FULL if turns or window is None else SLIDING for turns in turned])
    return tuple(window if kind == SLIDING else None for kind in kinds)
