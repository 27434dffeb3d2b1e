"""Cohere's Command R (1 and 2): attention and feed-forward side by side on one layer norm, neighbours turned together.

The logits of the tied head are scaled. Command R+ norms each head of queries and keys; version 2 gives three of four
layers a window and the fourth no positions. Checked against transformers 5.24: the configurations and models of
"cohere" and "cohere2".
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import layer_kinds, read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, WeightEntry

_SLIDING, _FULL = "sliding_attention", "full_attention"
_DEFAULTS: dict[str, Any] = {"num_attention_heads": 64, "hidden_size": 8192}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "cohere" or "cohere2" configuration; raises ModelError for what it does not compute."""
    model_type = config["model_type"]
    is_second = model_type == "cohere2"
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    hidden_size = reader.size("hidden_size")
    num_layers = reader.size("num_hidden_layers", 40)
    max_positions = reader.size("max_position_embeddings", 8192)
    norm = NormSpec("layer", reader.positive("layer_norm_eps", 1e-5))
    kinds = _kinds(reader, num_layers) if is_second else (_FULL,) * num_layers
    layers = {
        kind: LayerSpec(
            mixer=_attention(reader, kind, norm, hidden_size, max_positions, is_second=is_second),
            feed_forward=GatedSpec(reader.size("intermediate_size", 22528), read_activation(reader, "silu")),
            norm=norm,
            placement="parallel_one_norm",
        )
        for kind in kinds
    }
    return ArchSpec(
        family="cohere",
        model_type=model_type,
        vocab_size=reader.size("vocab_size", 256000),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=tuple(layers[kind] for kind in kinds),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", True),
        logit_scale=reader.positive("logit_scale", 0.0625),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())


def _attention(
    reader: ConfigReader, kind: str, norm: NormSpec, hidden_size: int, max_positions: int, *, is_second: bool
) -> AttentionSpec:
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    theta = 10_000.0 if is_second else 500_000.0
    rope = read_rope(reader, head_dim=head_dim, max_positions=max_positions, theta=theta, interleaved=True)
    bias = reader.flag("attention_bias", False)
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=None if is_second and kind == _FULL else rope,
        qkv_bias=bias,
        out_bias=bias,
        window=reader.size("sliding_window", 4096) if kind == _SLIDING else None,
        qk_norm=norm if not is_second and reader.get("use_qk_norm", False) else None,
        qk_norm_over="each_head",
    )


def _kinds(reader: ConfigReader, num_layers: int) -> tuple[str, ...]:
    every = reader.get("sliding_window_pattern", 4)
    default = [_SLIDING if (index + 1) % every else _FULL for index in range(num_layers)]
    return layer_kinds(reader, num_layers, (_SLIDING, _FULL), default)
