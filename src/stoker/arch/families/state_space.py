"""What the families with state-space layers share: readings of their settings and the names of their weights.

Hugging Face's module names are the same in all of them: `in_proj`, `conv1d`, `x_proj` and `dt_proj` (Mamba-1), `A_log`,
`D`, `dt_bias` and `norm` (Mamba-2), `out_proj`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from stoker.arch.families.common import FULL
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import Mamba2Spec

UNBOUNDED_POSITIONS = 2**20
"""Context of a model without positions, in tokens: its state has one size whatever came before, so any length runs."""

BESIDE_ATTENTION: Mapping[str, Any] = {
    "vocab_size": 128000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
"""Defaults of Transformers' BambaConfig, which FalconH1Config has too."""

LINEAR = "linear_attention"
"""Transformers' name of the kind of layer whose mixer is a state space."""

_LAYER_TYPES = {"mamba": LINEAR, LINEAR: LINEAR, "attention": FULL, FULL: FULL}
_PEFT_REFUSES_OUT_PROJ = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})


def peft_loads_out_proj(model_type: str) -> bool:
    """Whether PEFT loads an adapter on a state-space layer's output projection of this model type.

    It refuses those of some, because fused kernels read the weight past the adapter (peft 0.21,
    `_check_lora_target_modules_mamba`).
    """
    return model_type not in _PEFT_REFUSES_OUT_PROJ


def time_step_rank(reader: ConfigReader, key: str, hidden_size: int) -> int:
    """The rank of the bottleneck of the step sizes; "auto" is a sixteenth of the hidden size."""
    return math.ceil(hidden_size / 16) if reader.get(key, "auto") == "auto" else reader.size(key)


def time_step_limit(reader: ConfigReader, key: str = "time_step_limit") -> tuple[float, float]:
    """The interval that step sizes are clamped to; Transformers writes infinity as {"__float__": "Infinity"}."""
    value = reader.get(key)
    if value is None:
        return 0.0, math.inf
    bounds = [_number(bound) for bound in value] if isinstance(value, list | tuple) else []
    if len(bounds) != 2 or None in bounds or not bounds[0] <= bounds[1]:
        raise reader.error(f"{key} = {value!r} is not a pair of a lower and an upper bound.")
    return float(bounds[0]), float(bounds[1])


def _number(value: Any) -> Any:
    """The number that `value` stands for, None for none."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        value = value["__float__"]
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def layer_types(reader: ConfigReader, values: Any, *, allowed: Iterable[str] = ()) -> list[str]:
    """The kinds of the layers by Transformers' present names, from a list with those or the older ones."""
    known = _LAYER_TYPES | {kind: kind for kind in allowed}
    if not isinstance(values, list) or not all(value in known for value in values):
        raise reader.error(f"the layers' kinds are {values!r}; known are {', '.join(known)}.")
    return [known[value] for value in values]


def mamba2(reader: ConfigReader, *, inner_size: int | None = None, **changes: Any) -> Mamba2Spec:
    """A Mamba-2 mixer from the `mamba_*` settings that most hybrids have; `changes` replace or add fields.

    `inner_size`: of all heads together; None: `mamba_expand` times the hidden size.
    """
    num_heads = reader.size("mamba_n_heads", 128)
    inner_size = inner_size or reader.size("mamba_expand", 2) * reader.size("hidden_size")
    if inner_size % num_heads:
        raise reader.error(f"the state space's {inner_size} channels are not a multiple of {num_heads} heads.")
    head_dim = reader.get("mamba_d_head", "auto")
    if head_dim not in ("auto", inner_size // num_heads):
        raise reader.error(f"mamba_d_head = {head_dim!r}, but {inner_size} channels / {num_heads} heads differ.")
    num_groups = reader.size("mamba_n_groups", 1)
    if num_heads % num_groups:
        raise reader.error(f"mamba_n_heads = {num_heads} is not a multiple of mamba_n_groups = {num_groups}.")
    fields: dict[str, Any] = {
        "num_heads": num_heads,
        "head_dim": inner_size // num_heads,
        "state_size": reader.size("mamba_d_state", 256),
        "num_groups": num_groups,
        "conv_kernel": reader.size("mamba_d_conv", 4),
        "chunk_size": reader.size("mamba_chunk_size", 256),
        "conv_bias": reader.flag("mamba_conv_bias", True),
        "bias": reader.flag("mamba_proj_bias", False),
        "time_step_limit": time_step_limit(reader),
        "norm_groups": num_groups,
    }
    return Mamba2Spec(**(fields | changes))


def module_names(ours: str = "mixer", theirs: str = "mamba") -> dict[str, str]:
    """Names of a state-space mixer's parts for `families.names.Names`: ours within the block, theirs within the layer.

    Those of Mamba-1 and Mamba-2 together; a family that lacks some has no use for their lines.
    """
    modules = {"in_proj": "in_proj", "conv": "conv1d", "x_proj": "x_proj", "out_proj": "out_proj", "norm": "norm"}
    modules |= {f"{part}_norm": f"{part}_layernorm" for part in ("dt", "b", "c")}
    parameters = {"A_log": "A_log", "D": "D"}
    return {f"{ours}.{mine}": f"{theirs}.{stored}" for mine, stored in (modules | parameters).items()}


def mamba1_names(ours: str = "mixer", theirs: str = "mamba") -> dict[str, str]:
    """The same with Mamba-1's step sizes, whose matrix and bias are parameters of no module of ours."""
    step_sizes = {f"{ours}.dt_weight": f"{theirs}.dt_proj.weight", f"{ours}.dt_bias": f"{theirs}.dt_proj.bias"}
    return module_names(ours, theirs) | step_sizes


def mamba2_names(ours: str = "mixer", theirs: str = "mamba") -> dict[str, str]:
    """The same with Mamba-2's step sizes."""
    return module_names(ours, theirs) | {f"{ours}.dt_bias": f"{theirs}.dt_bias"}
