"""GPT-2: learned positions, layer norms before each part, weights stored [in, out], a tied head.

Checked against transformers 5.24: `configuration_gpt2.py`, `modeling_gpt2.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.stored import stored_quantization
from stoker.arch.spec import ArchSpec, AttentionSpec, LayerSpec, NormSpec, PlainSpec, WeightEntry

_NAMES = Names(
    {
        "attention_norm": "ln_1",
        "feed_forward_norm": "ln_2",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    },
    layer="transformer.h.{}",
    embedding="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    transposed=frozenset({"attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down"}),
)


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "gpt2" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1})
    reader.require("add_cross_attention", False, fix="Only decoders without an encoder are trained.")
    stored_quantization(reader.config, reader.where)
    hidden_size, num_heads = reader.size("n_embd", 768), reader.size("n_head", 12)
    max_positions = reader.size("n_positions", 1024)
    if hidden_size % num_heads:
        raise reader.error(f"n_embd = {hidden_size} is not a multiple of n_head = {num_heads}.")
    norm = NormSpec("layer", reader.positive("layer_norm_epsilon", 1e-5), bias=True)
    inner = reader.optional_size("n_inner") or 4 * hidden_size
    feed_forward = PlainSpec(inner, read_activation(reader, "gelu_new", key="activation_function"))
    layers = tuple(
        LayerSpec(
            mixer=AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_heads,
                head_dim=hidden_size // num_heads,
                rope=None,
                qkv_bias=True,
                out_bias=True,
                scale=_scale(reader, hidden_size // num_heads, index),
            ),
            feed_forward=feed_forward,
            norm=norm,
        )
        for index in range(reader.size("n_layer", 12))
    )
    return ArchSpec(
        family="gpt2",
        model_type="gpt2",
        vocab_size=reader.size("vocab_size", 50257),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=layers,
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", True),
        learned_positions=max_positions,
        left_out=reader.left_out("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)


def _scale(reader: ConfigReader, head_dim: int, index: int) -> float | None:
    """The scale of a layer's scores, None for the usual one."""
    is_scaled = reader.flag("scale_attn_weights", True)
    if not reader.flag("scale_attn_by_inverse_layer_idx", False):
        return None if is_scaled else 1.0
    return (head_dim**-0.5 if is_scaled else 1.0) / (index + 1)
