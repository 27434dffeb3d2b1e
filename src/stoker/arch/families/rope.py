"""Reads rotary embeddings from a `config.json`, in both forms that Transformers accepts.

Old: `rope_theta` beside `rope_scaling: {"type" or "rope_type": ..., "factor": ...}`. New (transformers 5):
`rope_parameters: {"rope_type": ..., "rope_theta": ..., "factor": ...}`. Precedence and defaults follow
`modeling_rope_utils.py` of transformers 5.24.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import DynamicScaling, LinearScaling, Llama3Scaling, RopeScaling, RopeSpec, YarnScaling

_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(reader: ConfigReader, *, head_dim: int, max_positions: int) -> RopeSpec:
    """The rotary embedding of every head; raises ModelError for an unknown type, key or value."""
    parameters = reader.get("rope_scaling") or reader.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise reader.error(f"rope_scaling = {parameters!r} is not a mapping.")
    theta = parameters.get("rope_theta", reader.get("rope_theta", 10_000.0))
    values = _Values(reader, parameters, max_positions)
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise reader.error(f"partial_rotary_factor = {values.get('partial_rotary_factor')!r} is not supported.")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in _READERS:
        raise reader.error(
            f"rope type {kind!r} is not native to Stoker.",
            fix=f"Known: {', '.join(_READERS)}. Until then, Transformers with PEFT trains this model.",
        )
    keys, read_scaling = _READERS[kind]
    # Keys with the value null say nothing, so they are welcome anywhere.
    unknown = sorted(key for key in parameters if parameters[key] is not None and key not in _COMMON_KEYS | keys)
    if unknown:
        raise reader.error(f"rope type {kind!r} has no settings {', '.join(unknown)}.")
    return RopeSpec(dim=head_dim, theta=reader.number_above(0.0, "rope_theta", theta), scaling=read_scaling(values))


class _Values:
    """The rope's own mapping, with what the rest of the configuration lends it."""

    def __init__(self, reader: ConfigReader, parameters: Mapping[str, Any], max_positions: int) -> None:
        self.reader = reader
        self.parameters = parameters
        self.max_positions = max_positions

    def get(self, key: str, default: Any = None) -> Any:
        value = self.parameters.get(key)
        return default if value is None else value

    def positive(self, key: str, default: float | None = None) -> float:
        return self.reader.number_above(0.0, f"the rope's {key}", self.get(key, default))

    @property
    def original_max_positions(self) -> int:
        """A top-level value wins over the rope's own, as in Transformers; neither: the model's context."""
        own = self.get("original_max_position_embeddings", self.max_positions)
        value = self.reader.get("original_max_position_embeddings") or own
        return int(self.reader.number_above(0.0, "original_max_position_embeddings", value))


def _linear(values: _Values) -> LinearScaling:
    return LinearScaling(factor=values.positive("factor"))


def _dynamic(values: _Values) -> DynamicScaling:
    # Transformers compares with max_position_embeddings and reads no original length here.
    return DynamicScaling(factor=values.positive("factor"), original_max_positions=values.max_positions)


def _llama3(values: _Values) -> Llama3Scaling:
    low, high = values.positive("low_freq_factor"), values.positive("high_freq_factor")
    if high <= low:
        raise values.reader.error(f"the rope's high_freq_factor = {high:g} is not above low_freq_factor = {low:g}.")
    return Llama3Scaling(
        factor=values.positive("factor"),
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_max_positions=values.original_max_positions,
    )


def _yarn(values: _Values) -> YarnScaling:
    original = values.original_max_positions
    factor = values.positive("factor", values.max_positions / original)
    attention_factor = values.get("attention_factor")
    if attention_factor is None:
        if values.get("mscale") and values.get("mscale_all_dim"):
            scale, scale_all = values.positive("mscale"), values.positive("mscale_all_dim")
            attention_factor = _yarn_magnitude(factor, scale) / _yarn_magnitude(factor, scale_all)
        else:
            attention_factor = _yarn_magnitude(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=values.reader.number_above(0.0, "the rope's attention_factor", attention_factor),
        beta_fast=values.positive("beta_fast", 32.0),
        beta_slow=values.positive("beta_slow", 1.0),
        truncate=bool(values.get("truncate", True)),
    )


def _yarn_magnitude(factor: float, scale: float) -> float:
    """YaRN's temperature, equation 22 of arXiv:2309.00071 with DeepSeek's `scale`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


_READERS: dict[str, tuple[set[str], Callable[[_Values], RopeScaling | None]]] = {
    "default": (set(), lambda values: None),
    "linear": ({"factor"}, _linear),
    "dynamic": ({"factor", "original_max_position_embeddings"}, _dynamic),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, _llama3),
    "yarn": (
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
        _yarn,
    ),
}
