"""SmolLM3: Llama's layers, of which every fourth has no positions (SmolLM 1 and 2 are "llama").

Checked against transformers 5.24: `configuration_smollm3.py`, `modeling_smollm3.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import layer_kinds, read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, WeightEntry

_SLIDING, _FULL = "sliding_attention", "full_attention"


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "smollm3" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, {"num_key_value_heads": 4, "num_attention_heads": 16})
    refuse_dropout(reader, "attention_dropout")
    hidden_size = reader.size("hidden_size", 2048)
    num_layers = reader.size("num_hidden_layers", 36)
    max_positions = reader.size("max_position_embeddings", 32768)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps", 1e-6))
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    rope = read_rope(reader, head_dim=head_dim, max_positions=max_positions, theta=2_000_000.0)
    bias = reader.flag("attention_bias", False)
    feed_forward = GatedSpec(
        reader.size("intermediate_size", 11008), read_activation(reader, "silu"), reader.flag("mlp_bias", False)
    )
    turned = _turned(reader, num_layers)
    windows = _windows(reader, turned)
    layers = {
        (turns, window): LayerSpec(
            mixer=AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                rope=rope if turns else None,
                qkv_bias=bias,
                out_bias=bias,
                window=window,
            ),
            feed_forward=feed_forward,
            norm=norm,
        )
        for turns, window in zip(turned, windows, strict=True)
    }
    return ArchSpec(
        family="smollm3",
        model_type="smollm3",
        vocab_size=reader.size("vocab_size", 128256),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=tuple(layers[key] for key in zip(turned, windows, strict=True)),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", True),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())


def _turned(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Which layers have positions; the list's name says the opposite of what its ones mean."""
    given = reader.get("no_rope_layers")
    if given is None:
        every = reader.size("no_rope_layer_interval", 4)
        return tuple((index + 1) % every != 0 for index in range(num_layers))
    if not isinstance(given, list) or len(given) != num_layers or not set(given) <= {0, 1}:
        raise reader.error(f"no_rope_layers must hold 0 or 1 for each of {num_layers} layers.")
    return tuple(bool(value) for value in given)


def _windows(reader: ConfigReader, turned: tuple[bool, ...]) -> tuple[int | None, ...]:
    window = reader.optional_size("sliding_window") if reader.flag("use_sliding_window", False) else None
    default = [_FULL if turns or window is None else _SLIDING for turns in turned]
    kinds = layer_kinds(reader, len(turned), (_SLIDING, _FULL), default)
    return tuple(window if kind == _SLIDING else None for kind in kinds)
