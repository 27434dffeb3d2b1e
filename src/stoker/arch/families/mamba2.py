"""Mamba-2: a stack of Mamba-2 mixers without feed-forwards (arXiv:2405.21060).

Checked against transformers 5.24: `configuration_mamba2.py`, `modeling_mamba2.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stoker.arch.families import mamba, state_space
from stoker.arch.families.common import read_decoder
from stoker.arch.families.names import entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.stored import stored_quantization
from stoker.arch.spec import ArchSpec, LayerSpec, Mamba2Spec, NormSpec, WeightEntry

_NAMES = replace(mamba.NAMES, layers={"mixer_norm": "norm", **state_space.mamba2_names(theirs="mixer")})
_DEFAULTS = {"vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "tie_word_embeddings": False}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "mamba2" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    reader.require("hidden_act", "silu", fix="Only silu is native.")
    stored_quantization(config, where)
    hidden_size = reader.size("hidden_size")
    num_heads, head_dim = reader.size("num_heads", 128), reader.size("head_dim", 64)
    num_groups = reader.size("n_groups", 8)
    if num_heads * head_dim != reader.size("expand", 2) * hidden_size:
        raise reader.error(f"num_heads * head_dim = {num_heads * head_dim} is not expand * hidden_size.")
    if num_heads % num_groups:
        raise reader.error(f"num_heads = {num_heads} is not a multiple of n_groups = {num_groups}.")
    norm = NormSpec(epsilon=reader.positive("layer_norm_epsilon", 1e-5))
    mixer = Mamba2Spec(
        num_heads=num_heads,
        head_dim=head_dim,
        state_size=reader.size("state_size", 128),
        num_groups=num_groups,
        conv_kernel=reader.size("conv_kernel", 4),
        chunk_size=reader.size("chunk_size", 256),
        conv_bias=reader.flag("use_conv_bias", True),
        bias=reader.flag("use_bias", False),
        norm=norm,
        norm_groups=num_groups,
        time_step_limit=state_space.time_step_limit(reader),
    )
    layer = LayerSpec(mixer=mixer, feed_forward=None, norm=norm)
    unbounded = state_space.UNBOUNDED_POSITIONS
    return read_decoder(reader, layer, family="mamba2", final_norm=norm, max_positions=unbounded)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
