"""InternLM 2, 2.5 (whose code comes with their checkpoints) and 3: Llama's layers, the former two's under other names.

InternLM 2 stores queries, keys and values as one tensor, grouped by key/value head; it is checked against Llama's
computation with the same weights (technical report, arXiv:2403.17297, section 2.2). 3 may have biases; it is checked
against transformers 5.24: `configuration_internlm3.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_attention, read_decoder, read_gated, read_head_rope, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, WeightEntry

_SECOND = Names(
    {
        "attention_norm": "attention_norm",
        "feed_forward_norm": "ffn_norm",
        "attention.qkv": "attention.wqkv",
        "attention.out": "attention.wo",
        "feed_forward.gate_up": ("feed_forward.w1", "feed_forward.w3"),
        "feed_forward.down": "feed_forward.w2",
    },
    embedding="model.tok_embeddings",
    head="output",
)
_THIRD = Names(SEPARATE)
_SIZES: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "internlm2": {
        **_SIZES,
        "vocab_size": 103168,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bias": True,
    },
    "internlm3": {
        **_SIZES,
        "vocab_size": 128512,
        "intermediate_size": 10240,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "bias": False,
        "qkv_bias": False,
    },
}
_RENAMED = {"qkv_bias": "attention_bias", "bias": "mlp_bias"}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of an "internlm2" or "internlm3" configuration; raises ModelError for what it does not compute."""
    is_second = config["model_type"] == "internlm2"
    if not is_second:  # Transformers saves InternLM 3's biases under Llama's names
        config = {own: config[name] for own, name in _RENAMED.items() if name in config} | dict(config)
    reader = ConfigReader(config, where, _DEFAULTS[config["model_type"]])
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    bias = reader.flag("bias")
    layer = LayerSpec(
        mixer=read_attention(
            reader,
            rope=read_head_rope(reader),
            qkv_bias=bias if is_second else reader.flag("qkv_bias"),
            out_bias=bias,
            qkv_layout="grouped" if is_second else "blocks",
        ),
        feed_forward=read_gated(reader, bias=not is_second and bias),
        norm=norm,
    )
    return read_decoder(reader, layer, family="internlm", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _SECOND if spec.model_type == "internlm2" else _THIRD)
