"""DeepSeek-V2 and V3: latent attention, dense first layers, then mixtures with shared experts and grouped routing.

A key that is absent has the default that Transformers gives it for that model type; a key whose value Stoker does not
compute is refused. Checked against transformers 5.24: `configuration_*.py` and `modeling_*.py` of the two.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from stoker.arch.families import latent
from stoker.arch.families.common import LIKE_LLAMA, read_decoder, refuse_dropout
from stoker.arch.families.mixtures import read_auxiliary_loss
from stoker.arch.families.names import ExpertNames, Held, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import (
    ArchSpec,
    ExpertsSpec,
    FeedForwardSpec,
    GatedSpec,
    LayerSpec,
    NormSpec,
    RouterSpec,
    WeightEntry,
)

_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **LIKE_LLAMA,
        **latent.DEFAULTS,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        **latent.DEFAULTS,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "tie_word_embeddings": False,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
    },
}
EXPERT_NAMES: Mapping[str, Held] = {
    "feed_forward.router": "mlp.gate",
    "feed_forward.router.correction": "mlp.gate.e_score_correction_bias",
    "feed_forward.experts.gate_up.weight": ExpertNames(
        ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"), "mlp.experts.gate_up_proj"
    ),
    "feed_forward.experts.down.weight": ExpertNames(("mlp.experts.{}.down_proj.weight",), "mlp.experts.down_proj"),
    "feed_forward.shared.gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "feed_forward.shared.down": "mlp.shared_experts.down_proj",
}
"""Of a mixture with shared experts, within a layer."""


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "deepseek_v2" or "deepseek_v3" configuration; raises ModelError for what it does not compute."""
    model_type = config["model_type"]
    reader = ConfigReader(config, where, _DEFAULTS[model_type])
    refuse_dropout(reader, "attention_dropout")
    reader.require("hidden_act", "silu", fix="Only SwiGLU feed-forwards (silu) are native.")
    reader.require("mlp_bias", False, fix="DeepSeek's feed-forwards have no biases.")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps", 1e-6))
    interleaved = model_type == "deepseek_v2" or reader.flag("rope_interleave", True)
    attention = latent.read_attention(reader, interleaved=interleaved)
    dense = GatedSpec(reader.size("intermediate_size"))
    experts = sigmoid_experts(reader) if model_type == "deepseek_v3" else _softmax_experts(reader)
    layers = [LayerSpec(attention, part, norm) for part in dense_first(reader, dense, experts)]
    later = later_layers(reader)
    return read_decoder(reader, layers, family="deepseek", final_norm=norm, left_out=later.left_out, unused=later.names)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names({**latent.names(spec), **EXPERT_NAMES}))


def dense_first(reader: ConfigReader, dense: GatedSpec, experts: ExpertsSpec) -> list[FeedForwardSpec]:
    """The feed-forward of each layer: `first_k_dense_replace` dense ones, then mixtures."""
    num_dense = reader.get("first_k_dense_replace")
    if not isinstance(num_dense, int) or num_dense < 0:
        raise reader.error(f"first_k_dense_replace = {num_dense!r} is not a number of layers.")
    return [dense if index < num_dense else experts for index in range(reader.size("num_hidden_layers"))]


class LaterLayers(NamedTuple):
    """Layers that predict tokens after the next one (arXiv:2412.19437, section 2.2): what is said of leaving them out,
    and the beginnings of their tensors' names."""

    left_out: tuple[str, ...]
    names: tuple[str, ...]


def later_layers(reader: ConfigReader) -> LaterLayers:
    """Those that a folder may hold after its layers. Transformers' class leaves them aside too."""
    count, first = reader.get("num_nextn_predict_layers") or 0, reader.size("num_hidden_layers")
    if not isinstance(count, int) or count < 0:
        raise reader.error(f"num_nextn_predict_layers = {count!r} is not a number of layers.")
    names = tuple(f"model.layers.{first + index}." for index in range(count))
    return LaterLayers(reader.left_out("num_nextn_predict_layers"), names)


def sigmoid_experts(reader: ConfigReader) -> ExpertsSpec:
    """V3's mixture: each expert's sigmoid, a stored correction for the choice, groups by the sum of their best two."""
    inner = reader.size("moe_intermediate_size")
    return ExpertsSpec(
        num_experts=reader.size("n_routed_experts"),
        top_k=reader.size("num_experts_per_tok"),
        intermediate_size=inner,
        router=RouterSpec(
            score="sigmoid",
            normalized=reader.flag("norm_topk_prob", True),
            scale=reader.positive("routed_scaling_factor"),
            groups=reader.optional_size("n_group") or 1,
            chosen_groups=reader.optional_size("topk_group") or 1,
            group_top=2,
            correction=True,
        ),
        shared_size=reader.size("n_shared_experts") * inner,
    )


def _softmax_experts(reader: ConfigReader) -> ExpertsSpec:
    """V2's."""
    inner = reader.size("moe_intermediate_size")
    method = reader.get("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise reader.error(f"topk_method = {method!r} is not native.", fix="Known: greedy, group_limited_greedy.")
    return ExpertsSpec(
        num_experts=reader.size("n_routed_experts"),
        top_k=reader.size("num_experts_per_tok"),
        intermediate_size=inner,
        router=RouterSpec(
            normalized=False,  # the setting of this name does nothing in Transformers
            scale=reader.positive("routed_scaling_factor"),
            groups=(reader.optional_size("n_group") or 1) if method == "group_limited_greedy" else 1,
            chosen_groups=reader.optional_size("topk_group") or 1,
        ),
        shared_size=reader.size("n_shared_experts") * inner,
        auxiliary_loss=read_auxiliary_loss(reader),
    )
