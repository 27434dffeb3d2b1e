"""Cohere's Command R (1 and 2): attention and feed-forward side by side on one layer norm, neighbours turned together.

The logits of the tied head are scaled. Command R+ norms each head of queries and keys; version 2 gives three of four
layers a window and the fourth no positions. Checked against transformers 5.24: the configurations and models of
"cohere" and "cohere2".
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
from stoker.arch.spec import ArchSpec, AttentionSpec, LayerSpec, NormSpec, WeightEntry

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "logit_scale": 0.0625,
    "attention_bias": False,
    "sliding_window": 4096,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "cohere" or "cohere2" configuration; raises ModelError for what it does not compute."""
    is_second = config["model_type"] == "cohere2"
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec("layer", reader.positive("layer_norm_eps"))
    layers = {
        kind: LayerSpec(
            mixer=_attention(reader, kind, norm, is_second=is_second),
            feed_forward=read_gated(reader),
            norm=norm,
            placement="parallel_one_norm",
        )
        for kind in (SLIDING, FULL)
    }
    return read_decoder(
        reader,
        [layers[kind] for kind in _kinds(reader, is_second=is_second)],
        family="cohere",
        final_norm=norm,
        logit_scale=reader.positive("logit_scale"),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())


def _attention(reader: ConfigReader, kind: str, norm: NormSpec, *, is_second: bool) -> AttentionSpec:
    rope = read_head_rope(reader, theta=10_000.0 if is_second else 500_000.0, interleaved=True)
    bias = reader.flag("attention_bias")
    return read_attention(
        reader,
        rope=None if is_second and kind == FULL else rope,
        qkv_bias=bias,
        out_bias=bias,
        window=reader.size("sliding_window") if kind == SLIDING else None,
        qk_norm=norm if not is_second and reader.get("use_qk_norm", False) else None,
        qk_norm_over="each_head",
    )


def _kinds(reader: ConfigReader, *, is_second: bool) -> tuple[str, ...]:
    num_layers = reader.size("num_hidden_layers")
    if not is_second:
        return (FULL,) * num_layers
    every = reader.get("sliding_window_pattern", 4)
    return layer_kinds(reader, [SLIDING if (index + 1) % every else FULL for index in range(num_layers)])
