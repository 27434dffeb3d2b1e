"""Nemotron-H: layers of one part each, Mamba-2, attention without positions, or a plain feed-forward with relu²
(arXiv:2504.03624).

Mixtures of experts (Nemotron 3) are refused. Checked against transformers 5.24: `configuration_nemotron_h.py`,
`modeling_nemotron_h.py`; files name the modules "backbone.", the modules themselves are "model.".
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stoker.arch.families import state_space
from stoker.arch.families.common import FULL, read_attention, read_decoder, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, Mamba2Spec, NormSpec, PlainSpec, WeightEntry

_NAMES = Names(
    layers={
        "attention_norm": "norm",
        "attention.qkv": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
        "attention.out": "mixer.o_proj",
        "mixer_norm": "norm",
        **state_space.mamba2_names(theirs="mixer"),
        "feed_forward_norm": "norm",
        "feed_forward.up": "mixer.up_proj",
        "feed_forward.down": "mixer.down_proj",
    },
    embedding="model.embeddings",
    final_norm="model.norm_f",
)
_PATTERN = {"M": state_space.LINEAR, "*": FULL, "-": "mlp", "E": "moe"}
_DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "layer_norm_epsilon": 1e-5,
    "mlp_bias": False,
}
# The names that older files have for the same settings.
_OLD_NAMES = {"n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv", "use_conv_bias": "mamba_conv_bias"}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "nemotron_h" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(
        config, where, _DEFAULTS | {key: config[old] for key, old in _OLD_NAMES.items() if old in config}
    )
    reader.require("mlp_hidden_act", "relu2", fix="Only relu2 is native.")
    reader.require("mamba_hidden_act", "silu", fix="Only silu is native.")
    reader.require("sliding_window", None, fix="Only full attention is native.")
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("layer_norm_epsilon"))
    plain = PlainSpec(reader.size("intermediate_size"), "relu_squared", bias=reader.flag("mlp_bias"))
    parts = {
        state_space.LINEAR: LayerSpec(mixer=_state_space(reader, norm), feed_forward=None, norm=norm),
        FULL: LayerSpec(mixer=read_attention(reader, rope=None), feed_forward=None, norm=norm),
        "mlp": LayerSpec(mixer=None, feed_forward=plain, norm=norm),
    }
    layers = [parts[kind] for kind in _kinds(reader)]
    # Transformers' class has a head of its own, whatever tie_word_embeddings says.
    return read_decoder(reader, layers, family="nemotron_h", final_norm=norm, tied_head=False)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return tuple(replace(entry, stored=tuple(map(_stored, entry.theirs))) for entry in entries(spec, _NAMES))


def _stored(name: str) -> str:
    """The name in a file of what the model calls `name`."""
    return f"backbone.{name.removeprefix('model.')}" if name.startswith("model.") else name


def _kinds(reader: ConfigReader) -> list[str]:
    """The kinds of the layers, of a list or of the older string of one letter each."""
    values = reader.get("layers_block_type", reader.get("layer_types"))
    if values is None:
        pattern = reader.get("hybrid_override_pattern")
        if not isinstance(pattern, str) or not set(pattern) <= set(_PATTERN):
            raise reader.error(f"hybrid_override_pattern = {pattern!r} is not a string of {', '.join(_PATTERN)}.")
        values = [_PATTERN[letter] for letter in pattern]
    kinds = state_space.layer_types(reader, values, allowed=("mlp", "moe"))
    if "moe" in kinds:
        raise reader.error(
            f"layer {kinds.index('moe')} is a mixture of plain experts, which is not native yet.",
            fix="Nemotron-H models without experts run. Until then, Transformers with PEFT trains this model.",
        )
    return kinds


def _state_space(reader: ConfigReader, norm: NormSpec) -> Mamba2Spec:
    num_heads, num_groups = reader.size("mamba_num_heads", 128), reader.size("n_groups", 8)
    if num_heads % num_groups:
        raise reader.error(f"mamba_num_heads = {num_heads} is not a multiple of n_groups = {num_groups}.")
    return Mamba2Spec(
        num_heads=num_heads,
        head_dim=reader.size("mamba_head_dim", 64),
        state_size=reader.size("ssm_state_size", 128),
        num_groups=num_groups,
        conv_kernel=reader.size("conv_kernel", 4),
        chunk_size=reader.size("chunk_size", 128),
        conv_bias=reader.flag("use_conv_bias", True),
        bias=reader.flag("use_bias", False),
        norm=norm,
        norm_groups=num_groups,
        # Transformers takes the lower bound from time_step_min and has no upper one, whatever time_step_limit says.
        time_step_limit=(reader.positive("time_step_min", 0.001), math.inf),
    )
