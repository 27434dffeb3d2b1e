"""Falcon: 7B (one key/value head, both parts behind one norm), 40B (grouped heads, a norm for each part) and 11B.

Falcon 3 has Llama's model type. Falcon-RW's linear biases (alibi) are not native. Checked against transformers 5.24:
`configuration_falcon.py`, `modeling_falcon.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation, read_decoder, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, LayerSpec, NormSpec, Placement, PlainSpec, WeightEntry

_LAYERS = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.qkv": "self_attention.query_key_value",
    "attention.out": "self_attention.dense",
    "feed_forward.up": "mlp.dense_h_to_4h",
    "feed_forward.down": "mlp.dense_4h_to_h",
}
_TWO_NORMS = {**_LAYERS, "attention_norm": "ln_attn", "feed_forward_norm": "ln_mlp"}
_DEFAULTS = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bias": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "falcon" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout", "hidden_dropout")
    reader.require("alibi", False, fix="Positions by linear biases (ALiBi) are not native.")
    norm = NormSpec("layer", reader.positive("layer_norm_epsilon"), bias=True)
    bias = reader.flag("bias")
    inner = reader.optional_size("ffn_hidden_size") or 4 * reader.size("hidden_size")
    layer = LayerSpec(
        mixer=_attention(reader, bias=bias),
        feed_forward=PlainSpec(inner, read_activation(reader, "gelu", key="activation"), bias),
        norm=norm,
        placement=_placement(reader),
    )
    return read_decoder(reader, layer, family="falcon", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    has_two = any(layer.placement == "parallel" for layer in spec.layers)
    names = Names(
        _TWO_NORMS if has_two else _LAYERS,
        layer="transformer.h.{}",
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
    )
    return entries(spec, names)


def _attention(reader: ConfigReader, *, bias: bool) -> AttentionSpec:
    hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    if hidden_size % num_heads or hidden_size // num_heads % 2:
        raise reader.error(f"hidden_size = {hidden_size} does not make {num_heads} heads of an even size.")
    num_kv_heads = reader.optional_size("num_kv_heads") or num_heads
    if not reader.flag("new_decoder_architecture"):
        num_kv_heads = 1 if reader.flag("multi_query") else num_heads
    if num_heads % num_kv_heads:
        raise reader.error(f"num_attention_heads = {num_heads} is not a multiple of num_kv_heads = {num_kv_heads}.")
    head_dim = hidden_size // num_heads
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=read_rope(reader, head_dim=head_dim, max_positions=reader.size("max_position_embeddings")),
        qkv_bias=bias,
        out_bias=bias,
        # With one key/value head, groups and blocks are the same.
        qkv_layout="blocks" if num_kv_heads == 1 else "grouped",
    )


def _placement(reader: ConfigReader) -> Placement:
    is_new, is_parallel = reader.flag("new_decoder_architecture"), reader.flag("parallel_attn")
    num_norms = reader.optional_size("num_ln_in_parallel_attn") or (2 if is_new else 1)
    if is_new and is_parallel and num_norms in (1, 2):
        return "parallel" if num_norms == 2 else "parallel_one_norm"
    if is_new or (is_parallel and num_norms != 1):
        raise reader.error(
            f"new_decoder_architecture = {is_new}, parallel_attn = {is_parallel} and num_ln_in_parallel_attn = "
            f"{num_norms} do not go together."
        )
    return "parallel_one_norm" if is_parallel else "pre"
