"""Llama-shaped layers with a mixture of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and Granite-MoE.

A key that is absent has the default that Transformers gives it for that model type; a key whose value Stoker does not
compute is refused. Checked against transformers 5.24: `configuration_*.py` and `modeling_*.py` of the five, and
`conversion_mapping.py` for the names of experts on disk and in memory.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stoker.arch.families.common import (
    FULL,
    LIKE_LLAMA,
    SLIDING,
    layer_kinds,
    read_attention,
    read_decoder,
    read_head_rope,
    refuse_dropout,
)
from stoker.arch.families.names import SEPARATE, ExpertNames, Held, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import (
    ArchSpec,
    AttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    GatedSpec,
    LayerSpec,
    NormSpec,
    RouterSpec,
    WeightEntry,
)

# Whose conversion of old checkpoints PEFT follows for adapters too (peft 0.21, `transformers_weight_conversion.py`).
_PEFT_CONVERTS = frozenset({"qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"})
_OF_OLD_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_COUNTS = ("num_local_experts", "num_experts")
_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": False,
    "sliding_window": 4096,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    "qwen2_moe": {
        **_QWEN,
        "intermediate_size": 5632,
        "tie_word_embeddings": False,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_local_experts": 60,
        "num_experts_per_tok": 4,
        "router_aux_loss_coef": 0.001,
    },
    "qwen3_moe": {
        **_QWEN,
        "intermediate_size": 6144,
        "tie_word_embeddings": False,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.001,
    },
    "olmoe": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "tie_word_embeddings": False,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    },
    "granitemoe": {
        **LIKE_LLAMA,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
}

_QWEN_NAMES: Mapping[str, Held] = {
    **SEPARATE,
    "feed_forward.router": "mlp.gate",
    "feed_forward.experts.gate_up.weight": ExpertNames(
        ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"), "mlp.experts.gate_up_proj"
    ),
    "feed_forward.experts.down.weight": ExpertNames(("mlp.experts.{}.down_proj.weight",), "mlp.experts.down_proj"),
    "feed_forward.shared.gate_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "feed_forward.shared.down": "mlp.shared_expert.down_proj",
    "feed_forward.shared_gate": "mlp.shared_expert_gate",
}
_NAMES: dict[str, Names] = {
    "mixtral": Names(
        {
            **SEPARATE,
            "feed_forward.router": "block_sparse_moe.gate",
            "feed_forward.experts.gate_up.weight": ExpertNames(
                ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
                "mlp.experts.gate_up_proj",
            ),
            "feed_forward.experts.down.weight": ExpertNames(
                ("block_sparse_moe.experts.{}.w2.weight",), "mlp.experts.down_proj"
            ),
        }
    ),
    "qwen2_moe": Names(_QWEN_NAMES),
    "qwen3_moe": Names(_QWEN_NAMES),
    "olmoe": Names(_QWEN_NAMES),
    "granitemoe": Names(
        {
            **SEPARATE,
            "feed_forward.router": "block_sparse_moe.router.layer",
            "feed_forward.experts.gate_up.weight": ExpertNames(
                ("block_sparse_moe.input_linear.weight",), "block_sparse_moe.experts.gate_up_proj"
            ),
            "feed_forward.experts.down.weight": ExpertNames(
                ("block_sparse_moe.output_linear.weight",), "block_sparse_moe.experts.down_proj"
            ),
        }
    ),
}


def peft_mistakes_for_experts(model_type: str, adapted: Sequence[str], experts: Collection[str]) -> list[str]:
    """Returns those of the `adapted` layers that PEFT takes for experts as old checkpoints name them; `experts`: the
    names of layers of experts. They are mistaken where an adapter has both."""
    if model_type not in _PEFT_CONVERTS or not any(name in experts for name in adapted):
        return []
    return [name for name in adapted if name not in experts and name.rpartition(".")[2] in _OF_OLD_EXPERTS]


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a configuration of one of the five; raises ModelError for what it does not compute."""
    model_type = config["model_type"]
    reader = ConfigReader(config, where, _DEFAULTS[model_type])
    refuse_dropout(reader, "attention_dropout", "router_jitter_noise")
    reader.require("hidden_act", "silu", fix="Only SwiGLU experts (silu) are native.")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    experts = _experts(reader, model_type)
    residual_scale = reader.positive("residual_multiplier", 1.0) if model_type == "granitemoe" else 1.0
    layers = [
        LayerSpec(attention, feed_forward, norm, residual_scale=residual_scale)
        for attention, feed_forward in zip(
            _attentions(reader, model_type, norm),
            _feed_forwards(reader, experts, has_dense=model_type.startswith("qwen")),
            strict=True,
        )
    ]
    is_granite = model_type == "granitemoe"
    return read_decoder(
        reader,
        layers,
        family="mixtures",
        final_norm=norm,
        embedding_scale=reader.positive("embedding_multiplier", 1.0) if is_granite else 1.0,
        logit_scale=1.0 / reader.positive("logits_scaling", 1.0) if is_granite else 1.0,
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES[spec.model_type])


def read_auxiliary_loss(reader: ConfigReader) -> float:
    """The coefficient of the load-balancing loss, 0 where the configuration does not ask for it in training."""
    asked = reader.flag("output_router_logits", False)
    return reader.positive("router_aux_loss_coef", 0.001) if asked and reader.get("router_aux_loss_coef") else 0.0


def _attentions(reader: ConfigReader, model_type: str, norm: NormSpec) -> list[AttentionSpec]:
    has_biases = model_type != "mixtral" and reader.flag("attention_bias", False)
    rope = read_head_rope(reader)
    qk_norm = norm if model_type in ("qwen3_moe", "olmoe") else None
    clip = reader.get("clip_qkv") if model_type == "olmoe" else None
    return [
        read_attention(
            reader,
            rope=rope,
            qkv_bias=reader.flag("qkv_bias", True) if model_type == "qwen2_moe" else has_biases,
            out_bias=model_type != "qwen2_moe" and has_biases,
            window=window,
            scale=reader.positive("attention_multiplier", 1.0) if model_type == "granitemoe" else None,
            qk_norm=qk_norm,
            qk_norm_over="all" if model_type == "olmoe" else "head",
            clip_qkv=None if clip is None else reader.number_above(0.0, "clip_qkv", clip),
        )
        for window in _windows(reader, model_type)
    ]


def _windows(reader: ConfigReader, model_type: str) -> list[int | None]:
    """The sliding window of each layer."""
    num_layers = reader.size("num_hidden_layers")
    if model_type in ("olmoe", "granitemoe"):
        return [None] * num_layers
    if model_type == "mixtral":
        return [reader.optional_size("sliding_window")] * num_layers
    window = reader.optional_size("sliding_window") if reader.flag("use_sliding_window", False) else None
    if model_type == "qwen3_moe" or window is None:
        return [window] * num_layers
    last = reader.size("max_window_layers", 28)
    kinds = layer_kinds(reader, [SLIDING if not i % 2 and i < last else FULL for i in range(num_layers)])
    return [window if kind == SLIDING else None for kind in kinds]


def _experts(reader: ConfigReader, model_type: str) -> ExpertsSpec:
    is_qwen = model_type.startswith("qwen")
    has_shared = model_type == "qwen2_moe"
    return ExpertsSpec(
        # Two names of one setting: the Hub's folders and those that Transformers writes differ.
        num_experts=reader.size(next((key for key in _COUNTS if key in reader.config), _COUNTS[0])),
        top_k=reader.size("num_experts_per_tok"),
        intermediate_size=reader.size("moe_intermediate_size" if is_qwen else "intermediate_size"),
        router=RouterSpec(
            score="softmax_of_chosen" if model_type == "granitemoe" else "softmax",
            normalized=model_type == "mixtral" or (model_type != "granitemoe" and reader.flag("norm_topk_prob", False)),
        ),
        shared_size=reader.size("shared_expert_intermediate_size") if has_shared else 0,
        shared_gate=has_shared,
        auxiliary_loss=read_auxiliary_loss(reader),
    )


def _feed_forwards(reader: ConfigReader, experts: ExpertsSpec, *, has_dense: bool) -> list[FeedForwardSpec]:
    """Of each layer; Qwen's may be dense every so often, or where the configuration says so."""
    num_layers = reader.size("num_hidden_layers")
    if not has_dense:
        return [experts] * num_layers
    step, only = reader.size("decoder_sparse_step", 1), reader.get("mlp_only_layers") or []
    if not isinstance(only, list):
        raise reader.error(f"mlp_only_layers = {only!r} is not a list of layers.")
    dense = GatedSpec(reader.size("intermediate_size"))
    return [dense if index in only or (index + 1) % step else experts for index in range(num_layers)]
