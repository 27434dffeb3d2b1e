"""gpt-oss: attention with sinks, every second layer with a window, and mixtures with biases and a clamped gate.

A key that is absent has the default that Transformers gives it; a key whose value Stoker does not compute is refused.
The Hub's folders hold experts in MXFP4, which is not read: save them in bf16 first. Checked against transformers 5.24:
`configuration_gpt_oss.py`, `modeling_gpt_oss.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import layer_kinds, read_heads, refuse_dropout
from stoker.arch.families.mixtures import read_auxiliary_loss
from stoker.arch.families.names import SEPARATE, ExpertNames, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, ExpertsSpec, LayerSpec, NormSpec, RouterSpec, WeightEntry

_ALPHA = 1.702
_DEFAULTS = {
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "rope_theta": 150000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


def _expert_names(kind: str, suffix: str) -> ExpertNames:
    name, is_gate_up = f"mlp.experts.{kind}_proj{suffix}", kind == "gate_up"
    return ExpertNames((name,), f"mlp.experts.{kind}_proj", transposed=not suffix, interleaved=is_gate_up)


_NAMES = Names(
    {
        **SEPARATE,
        "attention.sinks": "self_attn.sinks",
        "feed_forward.router": "mlp.router",
        "feed_forward.experts.gate_up.weight": _expert_names("gate_up", ""),
        "feed_forward.experts.gate_up.bias": _expert_names("gate_up", "_bias"),
        "feed_forward.experts.down.weight": _expert_names("down", ""),
        "feed_forward.experts.down.bias": _expert_names("down", "_bias"),
    }
)


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "gpt_oss" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    reader.require("swiglu_alpha", _ALPHA, fix=f"The experts' gate is native for swiglu_alpha = {_ALPHA}.")
    hidden_size, num_layers = reader.size("hidden_size", 2880), reader.size("num_hidden_layers", 36)
    max_positions = reader.size("max_position_embeddings", 131072)
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps", 1e-5))
    has_bias, window = reader.flag("attention_bias", True), reader.optional_size("sliding_window")
    rope = read_rope(reader, head_dim=head_dim, max_positions=max_positions)
    experts = ExpertsSpec(
        num_experts=reader.size("num_local_experts", 128),
        top_k=reader.size("num_experts_per_tok", 4),
        intermediate_size=reader.size("intermediate_size", 2880),
        router=RouterSpec(score="softmax_of_chosen", bias=True),
        bias=True,
        gate_limit=reader.positive("swiglu_limit", 7.0),
        auxiliary_loss=read_auxiliary_loss(reader),
    )
    usual = ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]
    layers = [
        LayerSpec(
            AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                rope=rope,
                qkv_bias=has_bias,
                out_bias=has_bias,
                window=window if kind == "sliding_attention" else None,
                sinks=True,
            ),
            experts,
            norm,
        )
        for kind in layer_kinds(reader, num_layers, ("sliding_attention", "full_attention"), usual)
    ]
    return ArchSpec(
        family="gpt_oss",
        model_type="gpt_oss",
        vocab_size=reader.size("vocab_size", 201088),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=tuple(layers),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
