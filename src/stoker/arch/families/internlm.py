"""InternLM 2, 2.5 and 3, whose code comes with their checkpoints: Llama's layers under other names.

InternLM 2 stores queries, keys and values as one tensor, grouped by key/value head; 3 has Llama's own names and may
have biases. Checked against Llama's computation with the same weights (InternLM2's technical report, arXiv:2403.17297,
section 2.2).
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, WeightEntry

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
_DEFAULTS: dict[str, dict[str, Any]] = {
    "internlm2": {"vocab_size": 103168, "max_position_embeddings": 2048, "bias": True},
    "internlm3": {"vocab_size": 128512, "max_position_embeddings": 32768, "bias": False, "qkv_bias": False},
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of an "internlm2" or "internlm3" configuration; raises ModelError for what it does not compute."""
    model_type = config["model_type"]
    is_second = model_type == "internlm2"
    reader = ConfigReader(config, where, _DEFAULTS[model_type])
    refuse_dropout(reader, "attention_dropout")
    hidden_size = reader.size("hidden_size", 4096)
    max_positions = reader.size("max_position_embeddings")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps", 1e-6))
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    bias = reader.flag("bias", False)
    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=read_rope(reader, head_dim=head_dim, max_positions=max_positions),
            qkv_bias=bias if is_second else reader.flag("qkv_bias", False),
            out_bias=bias,
            qkv_layout="grouped" if is_second else "blocks",
        ),
        feed_forward=GatedSpec(
            reader.size("intermediate_size", 11008), read_activation(reader, "silu"), False if is_second else bias
        ),
        norm=norm,
    )
    return ArchSpec(
        family="internlm",
        model_type=model_type,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=(layer,) * reader.size("num_hidden_layers", 32),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _SECOND if spec.model_type == "internlm2" else _THIRD)
