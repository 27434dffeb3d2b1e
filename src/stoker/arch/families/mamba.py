"""Mamba and Falcon-Mamba: a stack of Mamba-1 mixers without feed-forwards (arXiv:2312.00752, arXiv:2410.05355).

Falcon-Mamba norms B, C and the step sizes, without weights. `residual_in_fp32` concerns bf16 alone: Transformers then
adds layers up in fp32, Stoker in the compute type, as it does for all models (over 32 layers of random weights, logits
in bf16 were off by 4.6% of their size so, by 4.2% in Transformers). Checked against transformers 5.24:
`configuration_mamba.py`, `configuration_falcon_mamba.py`, and the modelling files beside them.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families import state_space
from stoker.arch.families.common import read_decoder
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.stored import stored_quantization
from stoker.arch.spec import ArchSpec, LayerSpec, Mamba1Spec, NormSpec, WeightEntry

NAMES = Names(
    layers={"mixer_norm": "norm", **state_space.mamba1_names(theirs="mixer")},
    layer="backbone.layers.{}",
    embedding="backbone.embeddings",
    final_norm="backbone.norm_f",
)
_DEFAULTS = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "tie_word_embeddings": True}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "mamba" or "falcon_mamba" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    reader.require("hidden_act", "silu", fix="Only silu is native.")
    stored_quantization(config, where)
    hidden_size = reader.size("hidden_size")
    is_falcon = config["model_type"] == "falcon_mamba"
    mixer = Mamba1Spec(
        # A configuration may carry an inner size that is not `expand` times the hidden size; it counts.
        inner_size=reader.size("intermediate_size", reader.size("expand", 2) * hidden_size),
        state_size=reader.size("state_size", 16),
        conv_kernel=reader.size("conv_kernel", 4),
        time_step_rank=state_space.time_step_rank(reader, "time_step_rank", hidden_size),
        conv_bias=reader.flag("use_conv_bias", True),
        bias=reader.flag("use_bias", False),
        parameter_norm=NormSpec(epsilon=reader.positive("mixer_rms_eps", 1e-6), weight=False) if is_falcon else None,
    )
    norm = NormSpec(epsilon=reader.positive("layer_norm_epsilon", 1e-5))
    layer = LayerSpec(mixer=mixer, feed_forward=None, norm=norm)
    unbounded = state_space.UNBOUNDED_POSITIONS
    return read_decoder(reader, layer, family="mamba", final_norm=norm, max_positions=unbounded)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, NAMES)
